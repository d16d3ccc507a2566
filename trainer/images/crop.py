"""The one geometric transform: resize to cover, a turn, a window, a mirror.

Pictures and everything that must stay aligned with them (masks, weights) go through the same
`Placement`. Sizes are (height, width) in pixels. Random numbers come only from a passed
generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.images.rotation import Places, turned_places

Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.float32]
# Of a face: left, top, width, height; may reach over the picture's edge.
Box = tuple[float, float, float, float]
Value = TypeVar("Value", np.uint8, np.float32)

# What of a head lies outside the box that detectors draw, as shares of the box's sides.
HAIR = 0.45
CHIN = 0.2
EAR = 0.25

# How far down in a window a face has its middle.
_FACE_HEIGHT = 0.38
# How far down in an upright picture a window has its middle where nothing is known of its subject.
_UPPER_HEIGHT = 0.42
# What every pixel of a mask weighs besides, so that an empty one has its mass in the middle:
# cog-sdxl's 0.01 of 255.
_EVEN_MASS = 0.01 / 255


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels in the resized picture."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Placement:
    """What is seen of a resized picture.

    Args:
        window: what is seen of the picture when it is not turned.
        flipped: whether mirrored, after everything else.
        angle: degrees by which the picture is turned about the window's middle,
            counter-clockwise as seen.
    """

    window: Window
    flipped: bool = False
    angle: float = 0.0

    def apply(self, pixels: npt.NDArray[Value]) -> npt.NDArray[Value]:
        """The window of pixels (h, w, …): cut out as it is, or turned and bilinear.

        Outside the picture its edge is repeated. Whole numbers stay whole when turned.
        """
        if self.angle == 0:
            return self._mirrored(self._cut(pixels))
        turned = self._places().read(pixels)
        whole = np.issubdtype(pixels.dtype, np.integer)
        return self._mirrored((np.rint(turned) if whole else turned).astype(pixels.dtype))

    def valid(self, size: Size) -> Mask:
        """(H, W): 1 where the window shows the picture, 0 where it repeats the edge.

        Args:
            size: of the resized picture.
        """
        if self.angle == 0:
            return np.ones((self.window.height, self.window.width), np.float32)
        return self._mirrored(self._places().inside(size).astype(np.float32))

    def _cut(self, pixels: npt.NDArray[Value]) -> npt.NDArray[Value]:
        window = self.window
        rows = slice(window.top, window.top + window.height)
        return pixels[rows, window.left : window.left + window.width]

    def _places(self) -> Places:
        window = self.window
        size = window.height, window.width
        return turned_places(window.top, window.left, size, self.angle)

    def _mirrored(self, pixels: npt.NDArray[Value]) -> npt.NDArray[Value]:
        return pixels[:, ::-1] if self.flipped else pixels

    def crop_top_left(self, size: Size) -> tuple[int, int]:
        """The corner that SDXL is told: in the mirrored picture if it is mirrored.

        A turned picture has the corner of its window before the turn.
        Following kohya's sd-scripts; diffusers' training scripts leave the corner unmirrored.

        Args:
            size: of the resized picture.
        """
        window = self.window
        mirrored_left = size[1] - window.width - window.left
        return window.top, mirrored_left if self.flipped else window.left


def cover_size(size: Size, target: Size) -> Size:
    """The smallest size of the same aspect that covers the target."""
    height, width = size
    scale = enlargement(size, target)
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


def enlargement(size: Size, target: Size) -> float:
    """How many times longer the sides become when resized to cover the target."""
    return max(target[0] / size[0], target[1] / size[1])


def resize_to_cover(image: Image.Image, target: Size) -> Image.Image:
    """The picture resized once, by LANCZOS, to `cover_size`."""
    height, width = cover_size((image.height, image.width), target)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def center_window(size: Size, target: Size) -> Window:
    """The middle window, at round((h - H) / 2) and round((w - W) / 2)."""
    top, left = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    return Window(top, left, *target)


def random_window(size: Size, target: Size, rng: random.Random) -> Window:
    """A window anywhere inside the picture, each place equally likely."""
    top, left = rng.randint(0, size[0] - target[0]), rng.randint(0, size[1] - target[1])
    return Window(top, left, *target)


def jittered(
    window: Window, size: Size, rng: random.Random, *, offset_x: int, offset_y: int
) -> Window:
    """The window moved by up to so many pixels each way, kept inside the picture."""
    left = window.left + rng.randint(-offset_x, offset_x)
    top = window.top + rng.randint(-offset_y, offset_y)
    return Window(
        _inside(top, window.height, size[0]),
        _inside(left, window.width, size[1]),
        window.height,
        window.width,
    )


def window_around(size: Size, target: Size, y: float, x: float) -> Window:
    """The window whose middle is nearest to a point.

    Args:
        size: of the resized picture.
        target: of the window.
        y: of the point, as a share of the height.
        x: of the point, as a share of the width.
    """
    top, left = round(y * size[0] - target[0] / 2), round(x * size[1] - target[1] / 2)
    return Window(_inside(top, target[0], size[0]), _inside(left, target[1], size[1]), *target)


def upper_window(size: Size, target: Size) -> Window:
    """The middle window of a landscape, a somewhat higher one of an upright picture.

    In upright photographs of people, heads are above the middle.
    """
    return window_around(size, target, _UPPER_HEIGHT if size[0] > size[1] else 0.5, 0.5)


def face_window(size: Size, target: Size, face_box: Box) -> Window:
    """The window that shows a face in its upper half, with all of its head where that fits.

    Args:
        size: of the resized picture.
        target: of the window.
        face_box: in pixels of the resized picture.
    """
    left, top, width, height = face_box
    start_y = top + height / 2 - _FACE_HEIGHT * target[0]
    start_x = left + width / 2 - target[1] / 2
    head_y = top - HAIR * height, top + (1 + CHIN) * height
    head_x = left - EAR * width, left + (1 + EAR) * width
    return Window(
        _start_showing(head_y, start_y, target[0], size[0]),
        _start_showing(head_x, start_x, target[1], size[1]),
        *target,
    )


def face_region(size: Size, face_box: Box, ratio: float) -> Window:
    """The square about a face, moved into the picture and only then, if need be, made smaller.

    Args:
        size: of the picture.
        face_box: in its pixels.
        ratio: side of the square for the longer side of the box (Novita's face_crop_region).
    """
    left, top, width, height = face_box
    side = min(max(round(ratio * max(width, height)), 1), *size)
    square = (side, side)
    return window_around(size, square, (top + height / 2) / size[0], (left + width / 2) / size[1])


def centre_of_mass(mask: Mask) -> tuple[float, float]:
    """Where a mask (h, w) has its weight: (y, x) as shares of height and width.

    As `_center_of_mass` of cog-sdxl's preprocess.py; an empty mask has it in the middle.
    """
    mass = mask.astype(np.float64) + _EVEN_MASS
    rows, columns = mass.sum(axis=1), mass.sum(axis=0)
    return _mean_place(rows), _mean_place(columns)


def _mean_place(mass: npt.NDArray[np.float64]) -> float:
    places = (np.arange(len(mass)) + 0.5) / len(mass)
    return float((places * mass).sum() / mass.sum())


def _start_showing(head: tuple[float, float], start: float, length: int, limit: int) -> int:
    """Where a window starts along one side: as near as can be to a place, with the head inside.

    Args:
        head: where the head starts and ends.
        start: the place.
        length: of the window.
        limit: of the picture.
    """
    first, last = max(head[0], 0), min(head[1], limit)
    start = min(max(start, 0), limit - length)
    if last - first <= length:
        start = min(max(start, last - length), first)
    return _inside(round(start), length, limit)


def _inside(start: int, length: int, limit: int) -> int:
    """The start nearest to this one at which a window lies inside the picture."""
    return min(max(start, 0), limit - length)
