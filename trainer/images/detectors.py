"""Finds faces in a picture: by the network YuNet, or by the cascades that OpenCV brings along.

What is done with a face is not known here.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import add
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

from trainer.config import FaceConfig
from trainer.errors import InputError
from trainer.images.detector_files import YUNET_FILE, YUNET_HUB, Missing, yunet_file
from trainer.images.faces import Face, Point, largest_first

_OTHER_OPENCV = "pip install 'opencv-python-headless>=4.13,<5'"
_REMEDY = (
    f"put {YUNET_FILE} of huggingface.co/{YUNET_HUB} on this machine and give its path as "
    "face_detector_path"
)

# YuNet is trained on faces of 10 to 300 pixels: pictures are made so small, close-ups smaller.
_YUNET_SIDES = (640, 320)
_YUNET_SCORE = 0.7
_YUNET_OVERLAP = 0.3
_YUNET_MOST = 5000
_NUM_LANDMARKS = 5

# Cascades see faces from 20 to 24 pixels on.
_HAAR_SIDE = 1280
_HAAR_STEP = 1.1
_HAAR_SMALLEST = 24
# One large face alone is seen in a third of the time in a picture of this side. Where that leaves
# a doubt, or several are seen, which count for too little beside the largest here, the larger
# picture is looked at.
_HAAR_COARSE = 640
# The smallest faces take most of the time. As shares of a picture's longer side: upright ones
# teach nothing below the first; tilted ones and profiles are hardly ever seen below the second.
_HAAR_LEAST_UPRIGHT = 1 / 40
_HAAR_LEAST_OTHERS = 1 / 32
# What a face's box must be merged from. Measured on 31 versions of one photograph and five others
# without a face, at three sizes: with fewer boxes, 2 of 11 were faces, with more 73 of 75.
_HAAR_LEAST = 12.0
# Fewer than this share of the best one's are mostly not faces.
_HAAR_LEAST_SHARE = 0.35
# So many leave no doubt; of fewer, another stage may see more.
_HAAR_SURE = 20.0
# Two boxes of which one covers this share of the other are of one face.
_SAME_FACE = 0.4

_QUARTER_TURNS = (90.0, -90.0, 180.0)
# What lies around a turned picture.
_GREY = (128, 128, 128)


class FaceDetector(Protocol):
    """Finds the faces of an upright picture, the largest first."""

    @property
    def identity(self) -> str:
        """Its name and that of its weights: equal identities find equal faces."""

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of a picture, mode RGB, in its own pixels."""


class YuNet:
    """The network YuNet, run by OpenCV: five landmarks, and faces tilted or small.

    Args:
        content: of its .onnx file.

    Raises:
        ValueError: the content is not that of YuNet.
    """

    def __init__(self, content: bytes) -> None:
        self.identity = f"yunet-{hashlib.sha256(content).hexdigest()}"
        weights, no_configuration = np.frombuffer(content, np.uint8), np.zeros(0, np.uint8)
        options = (_YUNET_SCORE, _YUNET_OVERLAP, _YUNET_MOST)
        side = _YUNET_SIDES[-1]
        try:
            self._network: Any = cv2.FaceDetectorYN.create(
                "onnx", weights, no_configuration, (side, side), *options
            )
            self._rows(Image.new("RGB", (side, side)))
        except cv2.error as error:
            raise ValueError(error.err.strip().partition("\n")[0]) from error

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of a picture: upright, else turned by quarters; in small, else smaller."""
        sides = sorted({min(side, max(image.size)) for side in _YUNET_SIDES}, reverse=True)
        for angles, side in product(((0.0,), _QUARTER_TURNS), sides):
            faces = _at_angles(image, side, angles, self._rows)
            if faces:
                return largest_first(_distinct(faces, max))
        return ()

    def _rows(self, image: Image.Image) -> list[Face]:
        self._network.setInputSize(image.size)
        _, rows = self._network.detect(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        return [] if rows is None else [_face_of_row(row) for row in rows.tolist()]


def _face_of_row(row: Sequence[float]) -> Face:
    """A face of YuNet's answer: box, landmarks and score, 15 numbers."""
    left, top, width, height, *points, score = row
    landmarks = tuple(zip(points[0::2], points[1::2], strict=True))
    assert len(landmarks) == _NUM_LANDMARKS
    return Face(left=left, top=top, width=width, height=height, score=score, landmarks=landmarks)


# The faces of a picture of mode L that are no smaller than so many pixels.
_Boxes = Callable[[Image.Image, int], list[Face]]


@dataclass(frozen=True)
class _Stage:
    """One way of cascades to look for faces.

    Args:
        angles: at which the picture is looked at, in degrees, counter-clockwise as seen.
        side: longest side of what is looked at.
        least: smallest face, as a share of the picture's longer side.
    """

    boxes: _Boxes
    angles: tuple[float, ...]
    side: int
    least: float

    def faces(self, grey: Image.Image) -> tuple[Face, ...]:
        """What is seen in a picture of mode L, the best first."""
        smallest = max(_HAAR_SMALLEST, round(self.least * min(self.side, max(grey.size))))
        faces = _at_angles(
            grey, self.side, self.angles, lambda turned: self.boxes(turned, smallest)
        )
        return _distinct(faces, add)


class Haar:
    """OpenCV's cascades, one after the other until a face is found; no landmarks.

    A face's score is the number of boxes merged into its own: the only measure that is the same
    for all cascades.

    Raises:
        ValueError: this OpenCV has none.
    """

    def __init__(self) -> None:
        self.identity = f"haar-opencv-{cv2.__version__}"
        names = ("frontalface_default", "frontalface_alt2", "profileface")
        default, alt2, profile = (_cascade(f"haarcascade_{name}.xml") for name in names)
        upright, tilted = (0.0,), (20.0, -20.0, 40.0, -40.0)

        def by_both(image: Image.Image, smallest: int) -> list[Face]:
            return [*_boxes(default, 5, image, smallest), *_boxes(alt2, 4, image, smallest)]

        by_alt2, by_profile = partial(_boxes, alt2, 4), partial(_boxes_both_ways, profile, 5)
        self._coarse = _Stage(by_both, upright, _HAAR_COARSE, _HAAR_LEAST_UPRIGHT)
        self._stages = (
            _Stage(by_both, upright, _HAAR_SIDE, _HAAR_LEAST_UPRIGHT),
            _Stage(by_alt2, tilted, _HAAR_SIDE, _HAAR_LEAST_OTHERS),
            _Stage(by_profile, upright, _HAAR_SIDE, _HAAR_LEAST_OTHERS),
            _Stage(by_alt2, _QUARTER_TURNS, _HAAR_SIDE, _HAAR_LEAST_OTHERS),
        )

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of the first stage that is sure of one, else of the surest stage."""
        grey = image.convert("L")
        if max(grey.size) > _HAAR_COARSE:
            large = self._coarse.faces(grey)
            if len(large) == 1 and _best_score(large) >= _HAAR_SURE:
                return large
        surest: tuple[Face, ...] = ()
        for stage in self._stages:
            surest = max(surest, stage.faces(grey), key=_best_score)
            if _best_score(surest) >= _HAAR_SURE:
                break
        least = max(_HAAR_LEAST_SHARE * _best_score(surest), _HAAR_LEAST)
        return largest_first(face for face in surest if face.score >= least)


def _best_score(faces: tuple[Face, ...]) -> float:
    return faces[0].score if faces else 0.0


def _cascade(name: str) -> Any:
    opencv: Any = cv2
    try:
        cascade = opencv.CascadeClassifier(str(Path(opencv.data.haarcascades) / name))
    except AttributeError as error:
        raise ValueError(f"OpenCV {cv2.__version__} has no cascades") from error
    if cascade.empty():
        raise ValueError(f"OpenCV {cv2.__version__} has no file `{name}`")
    return cascade


def _boxes(cascade: Any, neighbours: int, image: Image.Image, smallest: int) -> list[Face]:
    """What a cascade sees in a picture of mode L."""
    boxes, counts = cascade.detectMultiScale2(
        np.asarray(image),
        scaleFactor=_HAAR_STEP,
        minNeighbors=neighbours,
        minSize=(smallest, smallest),
    )
    return [
        Face(left=left, top=top, width=width, height=height, score=count)
        for (left, top, width, height), count in zip(
            np.asarray(boxes).tolist(), np.asarray(counts).tolist(), strict=True
        )
    ]


def _boxes_both_ways(
    cascade: Any, neighbours: int, image: Image.Image, smallest: int
) -> list[Face]:
    """What a cascade that knows one profile sees in a picture and in its mirror."""
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    faces = [
        face.moved(image.width - 2 * face.left - face.width, 0)
        for face in _boxes(cascade, neighbours, mirrored, smallest)
    ]
    return [*_boxes(cascade, neighbours, image, smallest), *faces]


def _distinct(faces: Iterable[Face], together: Callable[[float, float], float]) -> tuple[Face, ...]:
    """Each face once, the best first.

    Args:
        together: the score of a face of which there are two boxes with these scores.
    """
    found: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        for place, known in enumerate(found):
            if _overlap(face, known) > _SAME_FACE:
                score = together(known.score, face.score)
                found[place] = known.model_copy(update={"score": score})
                break
        else:
            found.append(face)
    return tuple(sorted(found, key=lambda face: -face.score))


def _overlap(one: Face, other: Face) -> float:
    """Which share of the smaller box lies in the other."""
    width = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    height = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    return max(width, 0) * max(height, 0) / min(one.area, other.area)


def _at_angles(
    image: Image.Image,
    longest: int,
    angles: Iterable[float],
    find: Callable[[Image.Image], list[Face]],
) -> list[Face]:
    """What is found in a picture made small and turned, in the pixels of the picture itself.

    Args:
        longest: side of the small picture; a smaller one is not enlarged.
        angles: degrees, counter-clockwise as seen.
        find: the faces of a picture in its pixels.
    """
    factor = min(1.0, longest / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    small = image if factor == 1 else image.resize(size, Image.Resampling.BOX)
    faces = []
    for angle in angles:
        grey = 128 if image.mode == "L" else _GREY
        turned = small.rotate(angle, Image.Resampling.BILINEAR, expand=True, fillcolor=grey)
        faces += [_turned_back(face, angle, turned.size, small.size) for face in find(turned)]
    return [face.scaled(1 / factor) for face in faces]


def _turned_back(face: Face, angle: float, turned: tuple[int, int], size: tuple[int, int]) -> Face:
    """A face found in a turned picture, in the pixels of the picture before.

    Args:
        angle: degrees, counter-clockwise as seen.
        turned: (width, height) of the turned picture.
        size: (width, height) of the picture before.
    """
    if angle == 0:
        return face
    cosine, sine = (round(f(math.radians(angle)), 15) for f in (math.cos, math.sin))

    def back(point: Point) -> Point:
        right, down = point[0] - turned[0] / 2, point[1] - turned[1] / 2
        x, y = right * cosine - down * sine, right * sine + down * cosine
        return x + size[0] / 2, y + size[1] / 2

    x, y = back(face.centre)
    width, height = face.width, face.height
    if abs(sine) > abs(cosine):
        width, height = height, width
    landmarks = None if face.landmarks is None else tuple(back(point) for point in face.landmarks)
    return Face(
        left=x - width / 2,
        top=y - height / 2,
        width=width,
        height=height,
        score=face.score,
        landmarks=landmarks,
        turned=angle,
    )


class _PerThread:
    """A detector for each thread that asks: OpenCV's own answer one at a time.

    Args:
        make: makes one; the first at once.
    """

    def __init__(self, make: Callable[[], FaceDetector]) -> None:
        self._make = make
        self._here = threading.local()
        self.identity = self._own().identity

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        """The faces of a picture."""
        with _ONE_THREAD:
            return self._own().find(image)

    def _own(self) -> FaceDetector:
        if not hasattr(self._here, "detector"):
            self._here.detector = self._make()
        detector: FaceDetector = self._here.detector
        return detector


class _OneThread:
    """OpenCV on one thread while anybody finds faces, and then on as many as before.

    Its cascades list boxes in the order in which threads find them, so that merged boxes differ
    between machines; and pictures are prepared beside other work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = cv2.getNumThreads()
                cv2.setNumThreads(1)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                cv2.setNumThreads(self._before)


_ONE_THREAD = _OneThread()


def _haar(_: FaceConfig) -> FaceDetector:
    try:
        return _PerThread(Haar)
    except ValueError as error:
        hint = f"{_OTHER_OPENCV}, or give face_detector=yunet"
        raise InputError.of("face_detector", f"`haar` cannot be used: {error}", hint) from error


def _yunet(settings: FaceConfig) -> FaceDetector:
    try:
        return _found_yunet(settings)
    except Missing as error:
        raise InputError.of("face_detector", f"`yunet` cannot be used: {error}", _REMEDY) from error


def _found_yunet(settings: FaceConfig) -> FaceDetector:
    """YuNet from the user's file or the hub.

    Raises:
        InputError: the user's file is not YuNet's.
        Missing: it cannot be had here.
    """
    if not hasattr(cv2, "FaceDetectorYN"):
        raise Missing(f"OpenCV {cv2.__version__} does not run it; {_OTHER_OPENCV}")
    if settings.face_detector_path is None:
        return _PerThread(partial(YuNet, yunet_file()))
    path = os.path.expanduser(settings.face_detector_path)
    try:
        return _PerThread(partial(YuNet, Path(path).read_bytes()))
    except OSError as error:
        message = f"`{path}` cannot be read ({error.strerror or error})"
        raise InputError.of("face_detector_path", message, "check the path") from error
    except ValueError as error:
        message = f"`{path}` is not YuNet's file ({error})"
        raise InputError.of("face_detector_path", message, f"give {YUNET_FILE}") from error


# A name in `FaceConfig` to how the detector is made ready.
DETECTORS: Mapping[str, Callable[[FaceConfig], FaceDetector]] = {"yunet": _yunet, "haar": _haar}


def detector_of(settings: FaceConfig) -> tuple[FaceDetector, tuple[str, ...]]:
    """The detector that the section asks for, and what the user should know of the choice.

    Raises:
        InputError: it cannot be had.
    """
    if settings.face_detector != "auto":
        return DETECTORS[settings.face_detector](settings), ()
    try:
        return _found_yunet(settings), ()
    except Missing as error:
        warning = (
            f"the face detector YuNet cannot be used: {error}; OpenCV's own cascades are used, "
            f"which miss tilted and small faces; to avoid this, {_REMEDY}"
        )
        return _haar(settings), (warning,)
