"""Axes of charts: round numbers, where values are on them, and curves of few enough points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What a round step is a multiple of.
_STEPS = (1, 2, 2.5, 5, 10)
_WITHIN_DECADE = (1, 2, 5)
_MOST_LOG_TICKS = 7
# From this ratio of the largest value to the smallest an axis has equal room for each decade.
_DECADES = 50
# An axis of which less than this share lies below the smallest value begins at zero.
_NEAR_ZERO = 0.7

# A point of a curve; no value where it was not finite.
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        low: the value at one end; above 0 on an axis of decades.
        high: the value at the other.
        ticks: round numbers between them.
        is_log: equal room for each decade.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value is, from 0 at the low end to 1; values beyond the ends are at them."""
        held = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(held / self.low) / math.log(self.high / self.low)
        return (held - self.low) / (self.high - self.low)


def axis_of(values: Iterable[float], *, with_decades: bool = True) -> Axis:
    """The axis of finite values: with decades where they span some, from zero where it is near.

    Args:
        with_decades: false where equal steps mean more than equal ratios.
    """
    known = list(values)
    low, high = min(known), max(known)
    if with_decades and low > 0 and high / low >= _DECADES:
        return decades(low, high)
    if 0 <= low <= _NEAR_ZERO * high or low == high > 0:
        low = 0.0
    if low == high:
        low, high = (low - 1, high + 1) if low else (0.0, 1.0)
    numbers = ticks(low, high)
    return Axis(numbers[0], numbers[-1], tuple(numbers))


def step_axis(last: int) -> Axis:
    """The axis of steps: from 0 to the last one, with whole numbers.

    Args:
        last: above 0.
    """
    numbers = ticks(0, last, count=6)
    return Axis(0, last, tuple(each for each in numbers if each <= last and each % 1 == 0))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in equal steps, about `count` of them, from at most `low` to at least `high`.

    Args:
        low: below `high`.
    """
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in _STEPS if each * power >= rough)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def decades(low: float, high: float) -> Axis:
    """An axis with equal room for each decade, with its powers of ten; of few, with 2 and 5 too.

    Args:
        low: above 0, below `high`.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    numbers = [each * 10.0**power for power in range(first, last) for each in _WITHIN_DECADE]
    numbers.append(10.0**last)
    start = max(place for place, number in enumerate(numbers) if number <= low)
    end = min(place for place, number in enumerate(numbers) if number >= high)
    ends = numbers[start], numbers[end]
    if end - start < _MOST_LOG_TICKS:
        return Axis(*ends, tuple(numbers[start : end + 1]), is_log=True)
    powers = [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 6))]
    return Axis(*ends, tuple(p for p in powers if ends[0] <= p <= ends[1]), is_log=True)


def tick_label(value: float) -> str:
    """A round number as an axis has it: `0.05`, `2,500`, `1e-5`."""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.4g}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return _short_exponent(f"{value:.3g}")


def figure_text(value: float) -> str:
    """A figure with the digits that count: `0.0834`, `12.5`, `2e-05` as `2e-5`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else _short_exponent(f"{value:.3g}")


def _short_exponent(text: str) -> str:
    digits, e, exponent = text.partition("e")
    return f"{digits}e{int(exponent)}" if e else digits


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """A curve with fewer points: of equal parts their lowest, highest and a missing one, and ends.

    Args:
        points: in the order of x.
        most: points that are left at most; all are where there are no more.
    """
    if len(points) <= most:
        return list(points)
    num_parts = (most - 2) // (3 if any(y is None for _, y in points) else 2)
    kept = {0, len(points) - 1}
    for part in range(num_parts):
        start, end = (len(points) * place // num_parts for place in (part, part + 1))
        known = [place for place in range(start, end) if points[place][1] is not None]
        if known:
            kept.add(min(known, key=lambda place: points[place][1] or 0.0))
            kept.add(max(known, key=lambda place: points[place][1] or 0.0))
        kept.update([place for place in range(start, end) if points[place][1] is None][:1])
    return [points[place] for place in sorted(kept)]


def even(items: Sequence[int], most: int) -> list[int]:
    """At most so many of some numbers, at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    places = [round(place * (len(items) - 1) / (most - 1)) for place in range(most)]
    return [items[place] for place in places]
