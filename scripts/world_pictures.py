"""A small world of pictures with captions: figures of some colour, somewhere on some background.

Also who looks at a picture and says what is on it, by measuring alone: colours by the nearest one,
shapes by what they cover. Pictures are tensors (B, 3, 64, 64) from 0 to 1. Used by make_world.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import torch
from torch.nn.functional import avg_pool2d

SIDE = 64

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.62, 0.15),
    "blue": (0.12, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.12, 0.65),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "pink": (0.98, 0.68, 0.76),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Where the middle of a figure is, in parts of the picture's side.
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (0.50, 0.50),
    "left": (0.29, 0.50),
    "right": (0.71, 0.50),
    "top": (0.50, 0.29),
    "bottom": (0.50, 0.71),
}
# In pixels: half of a figure's height, from least to most; how far it is from its place.
RADII = (12.0, 17.0)
JITTER = 3.0
# How much lighter or darker a colour may be.
SHADE = 0.05

# A figure covers at least so much of a picture, and so much of what is nearest to it in shape.
LEAST_COVERED = 0.015
LEAST_OVERLAP = 0.5
# Distance in colour from the background at which a pixel is of the figure.
APART = 0.22


@dataclass(frozen=True)
class Scene:
    """What is on a picture."""

    shape: str
    colour: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        """All of it in words."""
        return f"a {self.colour} {self.shape} on a {self.background} background, {self.where}"

    @property
    def where(self) -> str:
        """The place in words."""
        return "in the center" if self.position == "center" else f"at the {self.position}"

    @property
    def captions(self) -> tuple[str, ...]:
        """Ways to say it, of which some leave something out."""
        figure, ground = f"a {self.colour} {self.shape}", f"on a {self.background} background"
        return (
            self.caption,
            f"{figure} {ground}",
            f"a picture of {figure} {ground}",
            f"{figure}, {self.background} background, {self.where}",
            f"{figure} {self.where}",
            figure,
        )


SCENES = tuple(Scene(*named) for named in product(SHAPES, COLOURS, BACKGROUNDS, POSITIONS))


def covered(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far inside of a figure of half height 1 points are: positive inside, negative outside.

    Args:
        shape: one of `SHAPES`.
        x: to the right of its middle.
        y: below it.
    """
    across, along = x.abs(), y.abs()
    if shape == "circle":
        return 1 - torch.hypot(x, y)
    if shape == "square":
        return 0.88 - torch.maximum(across, along)
    if shape == "triangle":
        # Upright, of equal sides: below the two slanted ones and above the lower one.
        slanted = (y + 1) / 2 - across * 3**0.5 / 2
        return torch.minimum(slanted, 0.8 - y)
    bar, beam = torch.maximum(across - 0.36, along - 1), torch.maximum(across - 1, along - 0.36)
    return -torch.minimum(bar, beam)


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Middles of a picture's pixels: x and y, in pixels, each (64, 64)."""
    line = torch.arange(SIDE, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """A picture of each scene: size, exact place and shade are drawn from the generator."""
    count = len(scenes)
    drawn = torch.rand(count, 5, generator=generator)
    middles = torch.tensor([POSITIONS[scene.position] for scene in scenes]) * SIDE
    middles = middles + (drawn[:, :2] * 2 - 1) * JITTER
    radii = RADII[0] + drawn[:, 2] * (RADII[1] - RADII[0])
    shades = 1 + (drawn[:, 3:] * 2 - 1) * SHADE
    inks = torch.tensor([COLOURS[scene.colour] for scene in scenes]) * shades[:, :1]
    grounds = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]) * shades[:, 1:]
    masks = torch.stack(
        [
            mask(scene.shape, middle, radius)
            for scene, middle, radius in zip(scenes, middles, radii.tolist(), strict=True)
        ]
    )
    fills = inks[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    return painted(fills, masks, grounds[:, :, None, None])


def mask(shape: str, middle: torch.Tensor, radius: float) -> torch.Tensor:
    """How much of each pixel a figure covers, (64, 64).

    Args:
        middle: x and y in pixels.
        radius: half of its height in pixels.
    """
    x, y = grid()
    inside = covered(shape, (x - middle[0]) / radius, (y - middle[1]) / radius)
    return (inside * radius + 0.5).clamp(0, 1)


def painted(fills: torch.Tensor, masks: torch.Tensor, grounds: torch.Tensor) -> torch.Tensor:
    """Figures (B, 3, 64, 64) where their masks (B, 64, 64) are, on grounds."""
    alpha = masks[:, None]
    return (alpha * fills + (1 - alpha) * grounds).clamp(0, 1)


def anything(count: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures of more than this world has, in its colours: figures and grounds of two each."""
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
    pictures = []
    for _ in range(count):
        numbers = torch.rand(4, generator=generator)
        chosen = torch.randperm(len(palette), generator=generator)[:4]
        shades = 1 + (torch.rand(4, 1, generator=generator) * 2 - 1) * SHADE
        inks = (palette[chosen] * shades).clamp(0, 1)
        middle = (0.5 + (numbers[:2] - 0.5) / 2) * SIDE
        shape = SHAPES[int(numbers[2] * len(SHAPES))]
        figure = mask(shape, middle, RADII[0] + numbers[3].item() * (RADII[1] - RADII[0] + 2))
        fills = _in_two(inks[:2], middle, generator, share=0.8)
        grounds = _in_two(inks[2:], middle, generator, share=0.3)
        pictures.append(painted(fills[None], figure[None], grounds[None])[0])
    return torch.stack(pictures)


def _in_two(
    inks: torch.Tensor, middle: torch.Tensor, generator: torch.Generator, *, share: float
) -> torch.Tensor:
    """A share of surfaces (3, 64, 64) in halves or stripes of two colours, others of the first."""
    both, wide, turned, period = torch.rand(4, generator=generator).tolist()
    first, second = inks[:, :, None, None]
    if both > share:
        return first.expand(3, SIDE, SIDE)
    stripes = halves(middle, turned) if wide < 0.4 else striped(middle, turned, 14 + 14 * period)
    return first + (second - first) * stripes


def halves(middle: torch.Tensor, turned: float) -> torch.Tensor:
    """How much of each pixel is on one side of a line, (64, 64).

    Args:
        middle: x and y of a point on it, in pixels.
        turned: parts of a whole turn.
    """
    return (_along(middle, turned) + 0.5).clamp(0, 1)


def striped(middle: torch.Tensor, turned: float, period: float) -> torch.Tensor:
    """How much of each pixel is on every other stripe, (64, 64); `period` is of two, in pixels."""
    waves = (_along(middle, turned) * 2 * math.pi / period).sin()
    return (waves * period / (2 * math.pi) + 0.5).clamp(0, 1)


def _along(middle: torch.Tensor, turned: float) -> torch.Tensor:
    x, y = grid()
    angle = turned * 2 * math.pi
    return (x - middle[0]) * math.cos(angle) + (y - middle[1]) * math.sin(angle)


@dataclass(frozen=True)
class Seen:
    """What a picture shows, as far as can be told; empty where nothing can."""

    shape: str
    colour: str
    background: str
    position: str

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Of each thing, whether it is as in a scene."""
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) == getattr(scene, name) for name in names}


NOTHING = Seen("", "", "", "")


def ground_of(picture: torch.Tensor) -> torch.Tensor:
    """The colour (3,) of most of a picture's border."""
    border = torch.cat(
        [picture[:, :3].flatten(1), picture[:, -3:].flatten(1)]
        + [picture[:, :, :3].flatten(1), picture[:, :, -3:].flatten(1)],
        dim=1,
    )
    return border.median(dim=1).values


def look(picture: torch.Tensor) -> Seen:
    """Says what is on a picture (3, 64, 64), by its pixels."""
    ground = ground_of(picture)
    seen = replace(NOTHING, background=_nearest(ground, BACKGROUNDS))
    figure = _without_specks((picture - ground[:, None, None]).norm(dim=0) > APART)
    if figure.float().mean() < LEAST_COVERED:
        return seen
    x, y = grid()
    middle = torch.stack([x[figure].mean(), y[figure].mean()]) / SIDE
    places = torch.tensor(list(POSITIONS.values()))
    position = list(POSITIONS)[int((places - middle).norm(dim=1).argmin())]
    ink = picture[:, figure].median(dim=1).values
    return replace(seen, colour=_nearest(ink, COLOURS), position=position, shape=_shape_of(figure))


def _without_specks(figure: torch.Tensor) -> torch.Tensor:
    """Pixels (64, 64) that are of a figure as most of those around them are.

    A VAE may leave a single bright pixel in a corner, and a figure's height is measured by its
    outermost pixels.
    """
    return avg_pool2d(figure[None].float(), 3, stride=1, padding=1)[0] > 0.5


def _nearest(colour: torch.Tensor, named: dict[str, Colour]) -> str:
    """Of named colours the one that is least far."""
    distances = (torch.tensor(list(named.values())) - colour).norm(dim=1)
    return list(named)[int(distances.argmin())]


def _shape_of(figure: torch.Tensor) -> str:
    """The shape whose figure of this height, here, shares most with what is covered."""
    x, y = grid()
    rows, columns = figure.any(1).nonzero().flatten(), figure.any(0).nonzero().flatten()
    width = (columns[-1] - columns[0] + 1).item()
    middle = (columns[0] + columns[-1] + 1).item() / 2, (rows[0] + rows[-1] + 1).item() / 2
    height = (rows[-1] - rows[0] + 1).item()
    overlaps = {}
    for shape in SHAPES:
        across, above, below = _EXTENTS[shape]
        to_right = (x - middle[0]) / (width / 2) * across
        down = (y - middle[1]) / (height / 2) * (above + below) / 2 + (below - above) / 2
        template = covered(shape, to_right, down) > 0
        both, either = (template & figure).sum(), (template | figure).sum()
        overlaps[shape] = (both / either).item()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= LEAST_OVERLAP else ""


# Of figures of half height 1: half of their width, and how far they reach above and below.
_EXTENTS = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.88, 0.88, 0.88),
    "triangle": (1.8 / 3**0.5, 1.0, 0.8),
    "cross": (1.0, 1.0, 1.0),
}
