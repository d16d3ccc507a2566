"""The one geometric transform: resize to cover, a window, a mirror.

Pictures and everything that must stay aligned with them (masks, weights) go through the same
`Placement`. Sizes are (height, width) in pixels. Random numbers come only from a passed
generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels in the resized picture."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Placement:
    """What is seen of a resized picture, and whether mirrored."""

    window: Window
    flipped: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        """The window of pixels (h, w, …), mirrored left to right if it says so."""
        window = self.window
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        seen = pixels[rows, columns]
        return seen[:, ::-1] if self.flipped else seen

    def crop_top_left(self, size: Size) -> tuple[int, int]:
        """The corner that SDXL is told: in the mirrored picture if it is mirrored.

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
