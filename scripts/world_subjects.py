"""What is to be learnt in the small world: a figure and a style that it has never seen.

Also how much of them a picture shows, from 0 to 1. Pictures are tensors (B, 3, 64, 64) from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from world_pictures import (
    APART,
    BACKGROUNDS,
    COLOURS,
    JITTER,
    LEAST_COVERED,
    POSITIONS,
    RADII,
    SIDE,
    Scene,
    draw,
    grid,
    ground_of,
    mask,
    painted,
)

# A subject is shown where at least this much of each of its colours is where it belongs. Fixed
# before anything was trained; of the base model's own figures none comes near.
SHOWN = 0.6
# A figure is of one colour where this much of it is; edges are mixed with the ground.
PLAIN = 0.75


@dataclass(frozen=True)
class Subject:
    """A figure with a band of another colour across its middle.

    Args:
        shape: of `SHAPES`.
        outer: its colour above and below.
        inner: of its middle third.
    """

    shape: str
    outer: str
    inner: str

    def draw(
        self, places: Sequence[tuple[str, str]], generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A picture for each (background, position), and where the figure is (B, 64, 64)."""
        numbers = torch.rand(len(places), 3, generator=generator)
        middles = torch.tensor([POSITIONS[position] for _, position in places]) * SIDE
        middles = middles + (numbers[:, :2] * 2 - 1) * JITTER
        radii = RADII[0] + (0.5 + numbers[:, 2] / 2) * (RADII[1] - RADII[0])
        pairs = list(zip(middles, radii.tolist(), strict=True))
        masks = torch.stack([mask(self.shape, middle, radius) for middle, radius in pairs])
        fills = torch.stack([self._fill(middle, radius) for middle, radius in pairs])
        grounds = torch.tensor([BACKGROUNDS[background] for background, _ in places])
        return painted(fills, masks, grounds[:, :, None, None]), masks

    def likeness(self, picture: torch.Tensor) -> float:
        """How much of it a picture (3, 64, 64) shows: of its worse colour, the share in place."""
        figure = figure_in(picture)
        if figure.float().mean() < LEAST_COVERED:
            return 0.0
        rows = figure.any(1).nonzero().flatten()
        top, bottom = rows[0].item(), rows[-1].item() + 1
        _, y = grid()
        in_band = (y - (top + bottom) / 2).abs() < (bottom - top) / 6
        regions = ((self.inner, in_band & figure), (self.outer, ~in_band & figure))
        return min(share_of_colour(picture, colour, region) for colour, region in regions)

    def coloured(self, picture: torch.Tensor) -> float:
        """The share of a picture's figure that has either of its colours, wherever."""
        figure = figure_in(picture)
        if figure.float().mean() < LEAST_COVERED:
            return 0.0
        return sum(share_of_colour(picture, colour, figure) for colour in self._colours)

    def _fill(self, middle: torch.Tensor, radius: float) -> torch.Tensor:
        _, y = grid()
        outside = ((y - middle[1]).abs() - radius / 3 + 0.5).clamp(0, 1)
        inner, outer = (torch.tensor(COLOURS[name])[:, None, None] for name in self._colours)
        return inner + (outer - inner) * outside

    @property
    def _colours(self) -> tuple[str, str]:
        return self.inner, self.outer


def figure_in(picture: torch.Tensor) -> torch.Tensor:
    """Where a picture (3, 64, 64) is not its ground, (64, 64)."""
    return (picture - ground_of(picture)[:, None, None]).norm(dim=0) > APART


def share_of_colour(picture: torch.Tensor, colour: str, region: torch.Tensor) -> float:
    """Share of a region's pixels that are nearer to a colour than to any other of the world."""
    palette = torch.tensor(list(COLOURS.values()))
    nearest = (picture[None] - palette[:, :, None, None]).norm(dim=1).argmin(0)
    return (nearest == list(COLOURS).index(colour))[region].float().mean().nan_to_num().item()


def is_plain(picture: torch.Tensor, colour: str) -> bool:
    """Whether a picture's figure is of one colour, and of this one."""
    return share_of_colour(picture, colour, figure_in(picture)) >= PLAIN


SUBJECT = Subject("circle", outer="red", inner="yellow")

# Of a style: how much darker the lower part of a ground is, and from which row on.
_DARKER, _HORIZON = 0.45, 40


def draw_in_style(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """Pictures of scenes whose ground is darker below a horizon."""
    pictures = draw(scenes, generator)
    grounds = torch.stack([ground_of(picture) for picture in pictures])[:, :, None, None]
    of_ground = (pictures - grounds).norm(dim=1, keepdim=True) < APART
    _, y = grid()
    below = (y > _HORIZON) & of_ground
    return torch.where(below, pictures * (1 - _DARKER), pictures)


def styled(picture: torch.Tensor) -> float:
    """How much of the style a picture shows: by how much its lower corners are darker, up to 1."""
    above = torch.cat([picture[:, 2:28, :4], picture[:, 2:28, -4:]], dim=2).flatten(1)
    below = torch.cat([picture[:, 46:62, :4], picture[:, 46:62, -4:]], dim=2).flatten(1)
    light, dark = (part.median(dim=1).values.mean().item() for part in (above, below))
    return max(0.0, min(1.0, (1 - dark / max(light, 1e-3)) / _DARKER))
