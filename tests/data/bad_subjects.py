"""Rows 65 to 72 and 81 of the bad inputs: faces, masks, and what cannot be cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from asking import REFUSED, Case, Content, Place, alone, photograph
from bad_captions import settled
from grid import encoded
from huggingface_hub import constants
from PIL import Image, ImageDraw

from trainer.config import FaceConfig, MaskConfig
from trainer.data.picture_set import PictureSet
from trainer.images.detectors import YUNET_FILE, YUNET_HUB

# Sees a red square on a blue one as a face.
SQUARES = Path(__file__).parent.parent / "samples" / "red_square_yunet.onnx"
FACE = FaceConfig(face_detector_path=str(SQUARES))
CLOSE = FACE.model_copy(update={"face_crop_region": 1.6})
# Finds what is bright, whatever it is asked for.
LIGHT = MaskConfig(clip_seg_mask_prompt="head", segmenter="luminance")


def person(*heads: tuple[int, int, int], number: int = 0) -> bytes:
    """Red heads on blue shoulders before a photograph, given as left, top and side of the head."""
    image = photograph(60 * number, 10 + 60 * number, 200, 200).copy()
    draw = ImageDraw.Draw(image)
    for left, top, side in heads:
        draw.rectangle((left, top, left + side - 1, top + side - 1), (255, 0, 0))
        draw.rectangle((left, top + side, left + side - 1, top + 2 * side - 1), (0, 0, 255))
    return encoded(image)


def people(
    *, face: FaceConfig = FACE, mask: MaskConfig | None = None, side: int = 64, **others: Content
) -> Callable[[Place], PictureSet]:
    """Five pictures of one person each, and others."""
    files = {f"p{number}.png": person((60, 40, 60), number=number) for number in range(5)}
    named = {f"{name}.png": content for name, content in others.items()}
    options = {"face": face, "mask": mask, "width": side, "height": side}
    return alone({**files, **named}, **options, face_aware_cropping=True)


def lying() -> bytes:
    image = photograph(60, 250, 200, 200).copy()
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 60, 119, 119), (255, 0, 0))
    draw.rectangle((120, 60, 179, 119), (0, 0, 255))
    return encoded(image)


def astronauts(place: Place) -> PictureSet:
    """Five pictures in which OpenCV's cascades find the face."""
    boxes = [(100 + 5 * n, 10, 240, 240) for n in range(5)]
    files = {f"a{n}.jpg": encoded(photograph(*box), "JPEG") for n, box in enumerate(boxes)}
    return alone(files, face_aware_cropping=True)(place)


def without_detector(place: Place) -> PictureSet:
    # The hub itself is out of reach in tests.
    place.machine.setattr(constants, "HF_HUB_CACHE", str(place.folder / "hub"))
    return astronauts(place)


def with_another_file(place: Place) -> PictureSet:
    repository = place.folder / "hub" / f"models--{YUNET_HUB.replace('/', '--')}"
    snapshot = repository / "snapshots" / "a-commit"
    for folder in (repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    (snapshot / YUNET_FILE).write_bytes(b"another network")
    return without_detector(place)


CASES = (
    Case(
        65,
        "no face in one picture; a warning too where it is so in all: not all subjects are people",
        people(nobody=lambda: encoded(photograph(250, 300, 130, 130))),
        6,
        (
            (
                "warning: `nobody.png` shows no face that can be found; crop it by hand, or "
                "leave it out"
            ),
        ),
    ),
    Case(
        66,
        "several faces",
        people(mask=LIGHT, three=person((20, 20, 30), (70, 40, 60), (150, 20, 30))),
        6,
        (
            (
                "warning: `three.png` shows 3 faces: the largest is used, the others are left "
                "out of the loss; crop it to one person"
            ),
        ),
    ),
    Case(
        67,
        "what the mask should keep is not in the picture",
        people(mask=LIGHT, night=lambda: encoded(Image.new("RGB", (90, 90), (5, 5, 5)))),
        6,
        (
            "warning: `night.png` is (almost) one flat colour",
            (
                "warning: `night.png` shows no face that can be found; crop it by hand, or "
                "leave it out"
            ),
            "warning: `night.png` shows nothing like `head`: the whole picture is learned",
        ),
    ),
    Case(
        68,
        "a crop that is enlarged",
        people(face=CLOSE, side=96, small=person((60, 40, 20))),
        6,
        (
            (
                "warning: `small.png` (32x32) is enlarged 3.0 times and teaches blur; use a "
                "larger one"
            ),
        ),
    ),
    Case(
        69,
        "a head on its side",
        people(lying=lying),
        6,
        ("warning: `lying.png` shows a head on its side; turn the photo",),
    ),
    Case(
        70,
        "a face at the border",
        people(cut=person((0, 60, 60))),
        6,
        ("warning: `cut.png` shows a face that touches the edge of the picture",),
    ),
    Case(
        71,
        "a detector that cannot be downloaded",
        without_detector,
        5,
        (
            (
                "warning of face_detector: the face detector YuNet cannot be used: its file "
                "(0.2 MB) could not be downloaded (…); OpenCV's own cascades are used, which "
                "miss tilted and small faces; to avoid this, put "
                "face_detection_yunet_2023mar.onnx of "
                "huggingface.co/opencv/face_detection_yunet on this machine and give its path "
                "as face_detector_path"
            ),
        ),
    ),
    Case(
        72,
        "a detector's file with another checksum",
        with_another_file,
        5,
        (
            (
                "warning of face_detector: the face detector YuNet cannot be used: "
                "`face_detection_yunet_2023mar.onnx`: its checksum differs (got …); it is "
                "deleted here and downloaded again next time; OpenCV's own cascades are used, "
                "which miss tilted and small faces; to avoid this, put "
                "face_detection_yunet_2023mar.onnx of "
                "huggingface.co/opencv/face_detection_yunet on this machine and give its path "
                "as face_detector_path"
            ),
        ),
    ),
    Case(
        81,
        "latents cached while pictures are turned and moved",
        lambda _: {"cache_latents": True, "random_rotation_end": 2, "center_crop": False},
        REFUSED,
        (
            (
                "error of center_crop: got false with `cache_latents` true; allowed: one of "
                "the two, a cached latent shows one fixed window"
            ),
            "hint: set `cache_latents: false` or `center_crop: true`",
            (
                "error of random_rotation_end: got 2 with `cache_latents` true; allowed: one "
                "of the two, a cached latent shows one fixed window"
            ),
            "hint: set `cache_latents: false` or `random_rotation_end: 0`",
        ),
        door=settled,
    ),
)
