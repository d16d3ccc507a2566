"""Turns pixels about a point: bilinear, in float64, with the picture's edge repeated outside it.

Arrays only; what is turned and by how much is not known here. Places are in pixels from the
upper left corner of a picture, so that the middle of its first pixel lies at 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

Reals = npt.NDArray[np.float64]

# What a place may lie outside by rounding alone.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Places:
    """Where in a picture each pixel of a turned window comes from.

    Args:
        rows: (H, W), may lie outside the picture.
        columns: (H, W).
    """

    rows: Reals
    columns: Reals

    def read(self, pixels: npt.NDArray[Any]) -> Reals:
        """The values of pixels (h, w, …) at the places, as (H, W, …)."""
        height, width = pixels.shape[:2]
        planes = torch.from_numpy(np.ascontiguousarray(pixels).astype(np.float64))
        planes = planes.reshape(height, width, -1).permute(2, 0, 1)
        # grid_sample takes -1 … 1 from edge to edge, columns first.
        grid = np.stack([2 * self.columns / width - 1, 2 * self.rows / height - 1], axis=-1)
        sampled = functional.grid_sample(
            planes[None],
            torch.from_numpy(grid)[None],
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        values: Reals = sampled[0].permute(1, 2, 0).numpy()
        return values.reshape(*self.rows.shape, *pixels.shape[2:])

    def inside(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Which places (H, W) lie in a picture of this (height, width)."""
        above = (self.rows >= -_TOLERANCE) & (self.columns >= -_TOLERANCE)
        return above & (self.rows <= size[0] + _TOLERANCE) & (self.columns <= size[1] + _TOLERANCE)


def turned_places(top: int, left: int, size: tuple[int, int], angle: float) -> Places:
    """The places of a window of this (height, width) in a picture turned about its middle.

    Args:
        top: of the window.
        left: of the window.
        size: of the window.
        angle: degrees, counter-clockwise as seen, as PIL and `np.rot90` turn.
    """
    height, width = size
    # Rounded so that quarter turns hit pixels exactly.
    cosine, sine = (round(f(math.radians(angle)), 15) for f in (math.cos, math.sin))
    down = (np.arange(height) + 0.5 - height / 2)[:, None]
    right = (np.arange(width) + 0.5 - width / 2)[None, :]
    return Places(
        rows=top + height / 2 + right * sine + down * cosine,
        columns=left + width / 2 + right * cosine - down * sine,
    )
