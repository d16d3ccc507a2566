"""Small pictures for a contact sheet: with boxes, as loss weights, dimmed by them.

Pure functions of pictures; pages are not known here. Sizes are (height, width), boxes
(left, top, width, height).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from trainer.images.crop import Mask, Size

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

PAPER: Colour = (252, 251, 249)
MAIN_FACE: Colour = (255, 184, 0)
OTHER_FACE: Colour = (40, 178, 246)
CROP: Colour = (229, 48, 140)
_SEAM: Colour = (24, 24, 28)


def fitted_size(image: Image.Image, room: Size) -> Size:
    """The (height, width) of a picture as large as fits into a room."""
    scale = min(room[0] / image.height, room[1] / image.width)
    return max(1, round(image.height * scale)), max(1, round(image.width * scale))


def fitted(image: Image.Image, room: Size) -> Image.Image:
    """A picture as large as fits into a room."""
    height, width = fitted_size(image, room)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def marked(
    source: Image.Image,
    source_size: Size,
    room: Size,
    *,
    faces: Sequence[Box] = (),
    crop_box: Box | None = None,
) -> Image.Image:
    """A picture with its boxes, pale where it is not trained.

    Args:
        source: of any size.
        source_size: of the picture in whose pixels the boxes are.
        room: what it is fitted into.
        faces: the main face first.
        crop_box: what is trained; nothing: no part is pale.
    """
    shown = fitted(source, room)
    scale = shown.width / source_size[1], shown.height / source_size[0]
    if crop_box is not None:
        pale = Image.blend(shown, Image.new("RGB", shown.size, PAPER), 0.55)
        corners = _corners(crop_box, scale, shown.size)
        pale.paste(shown.crop(corners), corners[:2])
        shown = pale
    draw = ImageDraw.Draw(shown)
    # The main face last, so that no other covers it.
    for number, face in reversed(list(enumerate(faces))):
        _outline(draw, _corners(face, scale, shown.size), OTHER_FACE if number else MAIN_FACE)
    if crop_box is not None:
        _outline(draw, _corners(crop_box, scale, shown.size), CROP)
    return shown


def _corners(
    box: Box, scale: tuple[float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box as (left, top, right, bottom) in a small picture of (width, height), kept inside."""
    left, top, width, height = box
    right, bottom = (left + width) * scale[0], (top + height) * scale[1]
    first = min(max(round(left * scale[0]), 0), size[0] - 1)
    upper = min(max(round(top * scale[1]), 0), size[1] - 1)
    last = min(max(round(right), first + 1), size[0])
    lower = min(max(round(bottom), upper + 1), size[1])
    return first, upper, last, lower


def _outline(draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], colour: Colour) -> None:
    """A box with a dark seam inside, so that it is seen on any picture; a small one is thin."""
    left, top, right, bottom = corners[0], corners[1], corners[2] - 1, corners[3] - 1
    width = 3 if min(right - left, bottom - top) > 24 else 2
    draw.rectangle((left, top, right, bottom), outline=colour, width=width)
    if width == 3:
        draw.rectangle((left + 3, top + 3, right - 3, bottom - 3), outline=_SEAM, width=1)


def fitted_weights(weights: Mask, size: Size) -> Mask:
    """Loss weights as means over the pixels of a small picture."""
    height, width = size
    image = Image.fromarray(weights.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)).clip(0, 1)


def grey(weights: Mask) -> Image.Image:
    """Loss weights in [0, 1] as brightness."""
    return Image.fromarray(np.rint(weights * 255).astype(np.uint8)).convert("RGB")


def dimmed(crop: Image.Image, weights: Mask) -> Image.Image:
    """A picture, the darker and greyer the less a pixel counts.

    Args:
        weights: (h, w) in [0, 1], of the picture's size.
    """
    pixels = np.asarray(crop, np.float32)
    light = np.asarray(crop.convert("L"), np.float32)[..., None]
    night = light * np.array([0.20, 0.23, 0.34], np.float32) + np.array([8, 10, 22], np.float32)
    share = weights[..., None]
    return Image.fromarray(np.rint(pixels * share + night * (1 - share)).astype(np.uint8))
