"""Trained sizes of one area and many aspects, which of them is a picture's own, and smaller areas.

Numbers only: neither pictures nor batches are known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from trainer.images.crop import Size

# Real models halve their latents, an eighth of the pixels, three times: sides of kohya's step.
_STEP = 64
# Below this side only models made for trials train, with less halving.
_SMALL = 256
_SMALL_STEP = 16
_SMALLEST_SIDE = 256

# Sides that each priority trains, as shares of the base model's own, ascending. BFL's page says
# only that `speed` makes steps faster, and caps pictures at 1 MP, FLUX.1's own size.
_WHOLE = Fraction(1)
_SHARES: Mapping[str | None, tuple[Fraction, ...]] = {
    None: (_WHOLE,),
    "speed": (Fraction(1, 2),),
    "quality": (Fraction(1, 2), Fraction(3, 4), _WHOLE),
    "high_res_only": (_WHOLE,),
}


def largest_side(native: int, priority: str | None) -> int:
    """The side of the largest pictures that a priority trains.

    Args:
        native: the base model's own side, in pixels.
        priority: see the option.
    """
    return _part(native, _SHARES[priority][-1])


def native_side(largest: int, priority: str | None) -> int:
    """The base model's own side, from `largest_side`."""
    return round(largest / _SHARES[priority][-1])


def smaller_shapes(width: int, height: int, priority: str | None) -> tuple[tuple[int, int], ...]:
    """(width, height) of the other sizes that a priority trains, the larger first, each once.

    Args:
        width: of the largest, in pixels.
        height: of the largest, in pixels.
    """
    *others, largest = _SHARES[priority]
    shares = [share / largest for share in reversed(others)]
    shapes = dict.fromkeys((_part(width, share), _part(height, share)) for share in shares)
    return tuple(shape for shape in shapes if shape != (width, height))


def bucket_sizes(width: int, height: int) -> tuple[Size, ...]:
    """The sizes (height, width) of about the area width x height, in ascending order.

    kohya's list (sd-scripts, `make_bucket_resolutions`), with sides up to twice the larger one
    given: its default, 1024 whatever the resolution, leaves a 1024 x 1024 training only sizes of
    smaller area. The given size is always among them, and lying on its side too.

    Args:
        width: of the trained size, in pixels.
        height: of the trained size, in pixels.
    """
    step = _step(min(width, height))
    largest = _floored(2 * max(width, height), step)
    smallest = max(step, _floored(min(_SMALLEST_SIDE, min(width, height) // 2), step))
    square = _floored(math.isqrt(width * height), step)
    upright = {(square, square), (height, width)}
    upright |= set(_of_area(width * height, smallest, largest, step))
    return tuple(sorted(upright | {(right, down) for down, right in upright}))


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect is nearest: the least is cut off there.

    Of equally near ones the larger, then the wider. Exact, so that ties are ties.

    Args:
        size: (height, width) of a picture.
        sizes: to choose from, at least one.
    """
    return min(sizes, key=lambda other: (_stretch(size, other), -other[0] * other[1], -other[1]))


def bucket_table(counts: Mapping[Size, int]) -> tuple[str, ...]:
    """A line for each size, as width x height, with its pictures: the fullest first.

    Args:
        counts: pictures of each (height, width).
    """
    fullest_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(
        f"{width}x{height}: {count} {'picture' if count == 1 else 'pictures'}"
        for (height, width), count in fullest_first
    )


def _of_area(area: int, smallest: int, largest: int, step: int) -> Iterator[Size]:
    """Each width with the tallest height that stays within the area and the largest side."""
    for width in range(smallest, largest + 1, step):
        height = min(largest, _floored(area // width, step))
        if height >= smallest:
            yield height, width


def _stretch(size: Size, other: Size) -> Fraction:
    """How many times one aspect is the other, at least 1: the order of their logs' distance."""
    ratio = Fraction(size[0] * other[1], size[1] * other[0])
    return max(ratio, 1 / ratio)


def _part(side: int, share: Fraction) -> int:
    """A share of a side, in whole steps unless it is all of it."""
    if share == 1:
        return side
    part = int(side * share)
    step = _step(part)
    return max(step, _floored(part, step))


def _step(side: int) -> int:
    return _STEP if side >= _SMALL else _SMALL_STEP


def _floored(length: int, step: int) -> int:
    return length // step * step
