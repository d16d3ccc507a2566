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

from trainer.data.rotation import Places, turned_places

Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.float32]
Value = TypeVar("Value", np.uint8, np.float32)


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
        min(max(top, 0), size[0] - window.height),
        min(max(left, 0), size[1] - window.width),
        window.height,
        window.width,
    )
