"""Faces in a picture: where they are, which one counts, what is odd about them.

What finds them is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from trainer.images.crop import CHIN, EAR, HAIR, Box, Mask, Size
from trainer.images.findings import Remark
from trainer.images.masks import FAINT

Point = tuple[float, float]

# A face smaller than this share of the picture's shorter side has few pixels of its own.
SMALL_FACE = 0.12

# From here on a head is on its side or upside down, not just tilted.
_ON_ITS_SIDE = 60.0
_UPSIDE_DOWN = 135.0
# A box this many pixels from the edge, or nearer, touches it.
_TOUCHING = 1.0
_BOX = ("left", "top", "width", "height")


class Face(BaseModel):
    """A face in an upright picture, in its pixels.

    Args:
        left: of the box from ear to ear and brow to chin, which may reach over the edge.
        score: how sure the detector is, by its own measure.
        landmarks: (x, y) of the person's right eye, left eye, nose, right and left corner of the
            mouth; nothing where the detector gives none.
        turned: degrees, counter-clockwise as seen, by which the picture had to be turned for the
            face to be found.
    """

    model_config = ConfigDict(frozen=True)
    left: float
    top: float
    width: float
    height: float
    score: float
    landmarks: tuple[Point, ...] | None = None
    turned: float = 0.0

    @property
    def box(self) -> Box:
        """Left, top, width and height."""
        return self.left, self.top, self.width, self.height

    @property
    def centre(self) -> Point:
        """(x, y) of the middle of the box."""
        return self.left + self.width / 2, self.top + self.height / 2

    @property
    def area(self) -> float:
        """Of the box, in pixels."""
        return self.width * self.height

    @property
    def lean(self) -> float:
        """Degrees, counter-clockwise as seen, that turn the head upright: from eyes to mouth."""
        if self.landmarks is None:
            return self.turned
        right_eye, left_eye, _, right_corner, left_corner = self.landmarks
        x, y = (
            (right_corner[axis] + left_corner[axis] - right_eye[axis] - left_eye[axis])
            for axis in (0, 1)
        )
        return math.degrees(math.atan2(-x, y))

    def scaled(self, factor: float) -> Face:
        """The face in a picture resized by a factor."""
        box = {side: value * factor for side, value in zip(_BOX, self.box, strict=True)}
        return self._changed(box, [(x * factor, y * factor) for x, y in self.landmarks or ()])

    def moved(self, dx: float, dy: float) -> Face:
        """The face in a picture with its corner elsewhere: so many pixels right and down."""
        corner = {"left": self.left + dx, "top": self.top + dy}
        return self._changed(corner, [(x + dx, y + dy) for x, y in self.landmarks or ()])

    def _changed(self, box: dict[str, float], landmarks: Sequence[Point]) -> Face:
        known = None if self.landmarks is None else tuple(landmarks)
        return self.model_copy(update={**box, "landmarks": known})


def largest_first(faces: Iterable[Face]) -> tuple[Face, ...]:
    """Faces by area; equal ones by score, then from left to right."""
    return tuple(sorted(faces, key=lambda face: (-face.area, -face.score, face.left, face.top)))


def others_removed(mask: Mask, faces: Sequence[Face], size: Size) -> Mask | None:
    """The mask without the heads of every face but the first, which keeps its own head whole.

    Its largest weight stays what it was. Nothing where what is left shows nothing of the subject:
    where above the mask's least weight, which is that of any background, under `FAINT` of its
    height is left.

    Args:
        mask: (h, w) over the same picture, of any resolution.
        faces: the one that counts first.
        size: of the picture whose pixels the faces speak of.
    """
    if len(faces) < 2:
        return mask
    others = np.zeros(mask.shape, np.bool_)
    for face in faces[1:]:
        others |= _head(face, size, mask.shape)
    kept = np.where(others & ~_head(faces[0], size, mask.shape), np.float32(0), mask)
    least, largest, left = mask.min(), mask.max(), kept.max()
    if left == 0 or left - least < FAINT * (largest - least):
        return None
    return kept if left == largest else np.asarray(kept * (largest / left), np.float32)


def _head(face: Face, size: Size, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which pixels (h, w) of a mask over the picture are in the ellipse of a face's head."""
    x = (np.arange(shape[1]) + 0.5)[None, :] * (size[1] / shape[1]) - face.centre[0]
    y = (np.arange(shape[0]) + 0.5)[:, None] * (size[0] / shape[0]) - face.centre[1]
    # As if the picture were turned until the head is upright.
    cosine, sine = math.cos(math.radians(face.lean)), math.sin(math.radians(face.lean))
    across, down = x * cosine + y * sine, y * cosine - x * sine
    # The box is upright in the picture: of a head on its side, its height goes from ear to ear.
    width, height = face.width, face.height
    if abs(sine) > abs(cosine):
        width, height = height, width
    # From the top of the hair to below the chin, from ear to ear.
    down = down + (HAIR - CHIN) / 2 * height
    radii = (0.5 + EAR) * width, (1 + HAIR + CHIN) / 2 * height
    inside: npt.NDArray[np.bool_] = (across / radii[0]) ** 2 + (down / radii[1]) ** 2 <= 1
    return inside


def remarks_on_faces(
    faces: Sequence[Face], size: Size, *, others_count: bool
) -> tuple[Remark, ...]:
    """What is odd about the faces of a picture in which there should be one.

    Args:
        faces: the one that counts first.
        size: of the picture whose pixels the faces speak of.
        others_count: whether the loss counts the faces beside it.
    """
    texts = _about_the_face(faces, size, others_count=others_count)
    return tuple(Remark.warning(text) for text in texts)


def _about_the_face(faces: Sequence[Face], size: Size, *, others_count: bool) -> Iterator[str]:
    if not faces:
        yield "shows no face that can be found; crop it by hand, or leave it out"
        return
    if len(faces) > 1:
        others = "learned too" if others_count else "left out of the loss"
        yield (
            f"shows {len(faces)} faces: the largest is used, the others are {others}; crop it to "
            "one person"
        )
    face = faces[0]
    longer = max(face.width, face.height)
    if longer < SMALL_FACE * min(size):
        yield (
            f"shows a face of only {longer:.0f} pixels, under {SMALL_FACE:.0%} of its shorter "
            "side; crop it closer, or use a larger original"
        )
    if abs(face.lean) > _UPSIDE_DOWN:
        yield "shows a head upside down; turn the photo"
    elif abs(face.lean) > _ON_ITS_SIDE:
        yield "shows a head on its side; turn the photo"
    if _touches_the_edge(face, size):
        yield "shows a face that touches the edge of the picture"


def _touches_the_edge(face: Face, size: Size) -> bool:
    right, bottom = face.left + face.width, face.top + face.height
    return (
        min(face.left, face.top) <= _TOUCHING
        or right >= size[1] - _TOUCHING
        or bottom >= size[0] - _TOUCHING
    )
