"""Draws line charts as SVG in HTML, for light and dark, and for narrow screens.

What was measured is a full line with full points; anything else is dashed, with hollow points and,
where it is a range, a band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.axes import ticks

WIDTH, HEIGHT = 300, 210
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 36


@dataclass(frozen=True)
class Point:
    """One figure.

    Args:
        x: what it stands over.
        low: the smallest it may be; with `high`, the range of a prediction or the quartiles.
        measured: not foretold.
    """

    x: float
    y: float
    low: float
    high: float
    measured: bool = False


@dataclass(frozen=True)
class Series:
    """A line.

    Args:
        colour: number of one of the page's colours, from 1.
    """

    name: str
    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        across: what x is.
        unit: of y.
        limits: values of y to be marked, with their names.
    """

    title: str
    across: str
    unit: str
    series: Sequence[Series]
    limits: Sequence[tuple[float, str]] = ()


def figure(chart: Chart) -> str:
    """A chart with its title, and a table of its figures for those who do not see it."""
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{_svg(chart)}"
        f"<details><summary>figures</summary>{_table(chart)}</details></figure>"
    )


def shown(value: float) -> str:
    """A figure with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class _Scale:
    """Where figures are in the picture: x in equal steps, y from 0."""

    across: Sequence[float]
    top: float

    def x(self, value: float) -> float:
        room = WIDTH - LEFT - RIGHT
        place = (self.across.index(value) + 0.5) / len(self.across)
        return round(LEFT + room * place, 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top, 1)


def _svg(chart: Chart) -> str:
    points = [point for series in chart.series for point in series.points]
    marked = ticks(0, max(point.high for point in points))
    scale = _Scale(sorted({point.x for point in points}), marked[-1])
    limits = [(value, name) for value, name in chart.limits if value <= scale.top]
    parts = [
        *_axes(chart, scale, marked),
        *(_limit(value, scale) for value, _ in limits),
        *(_name_of_limit(value, name, scale) for value, name in limits),
        *(_band(series, scale) for series in chart.series),
        *(part for series in chart.series for part in _line(series, scale)),
        *(
            _dot(series, point, chart.unit, scale)
            for series in chart.series
            for point in series.points
        ),
    ]
    names = ", ".join(series.name for series in chart.series)
    label = escape(f"{chart.title}: {chart.unit} against {chart.across}, of {names}")
    box = f"0 0 {WIDTH} {HEIGHT}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(chart: Chart, scale: _Scale, marked: Sequence[float]) -> list[str]:
    parts = []
    for tick in marked:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4}">{tick:g}</text>')
    for value in scale.across:
        parts.append(f'<text class="mid" x="{scale.x(value)}" y="{HEIGHT - 20}">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{middle}" y="{HEIGHT - 4}">{escape(chart.across)}</text>')
    return parts


def _limit(value: float, scale: _Scale) -> str:
    y = scale.y(value)
    return f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def _name_of_limit(value: float, name: str, scale: _Scale) -> str:
    place = f'x="{LEFT + 2}" y="{scale.y(value) - 4}"'
    return f'<text class="limit" {place}>{escape(name)}</text>'


def _band(series: Series, scale: _Scale) -> str:
    """The range of what is foretold."""
    if not any(point.high > point.low for point in series.points):
        return ""
    there = [f"{scale.x(point.x)},{scale.y(point.high)}" for point in series.points]
    back = [f"{scale.x(point.x)},{scale.y(point.low)}" for point in reversed(series.points)]
    return f'<polygon class="band c{series.colour}" points="{" ".join(there + back)}"/>'


def _line(series: Series, scale: _Scale) -> list[str]:
    return [
        f'<line class="line c{series.colour}{"" if one.measured and other.measured else " told"}"'
        f' x1="{scale.x(one.x)}" y1="{scale.y(one.y)}"'
        f' x2="{scale.x(other.x)}" y2="{scale.y(other.y)}"/>'
        for one, other in zip(series.points, series.points[1:], strict=False)
    ]


def _dot(series: Series, point: Point, unit: str, scale: _Scale) -> str:
    x, y = scale.x(point.x), scale.y(point.y)
    kind = "measured" if point.measured else "told"
    words = escape(f"{series.name}, {point.x:g}: {in_words(point)} {unit}")
    return (
        f'<g><title>{words}</title><circle class="near" cx="{x}" cy="{y}" r="14"/>'
        f'<circle class="dot {kind} c{series.colour}" cx="{x}" cy="{y}" r="4"/></g>'
    )


def in_words(point: Point) -> str:
    """A figure, or its range where it is foretold as one."""
    if point.measured:
        return f"{shown(point.y)} (measured)"
    if point.high > point.low:
        return f"{shown(point.low)} to {shown(point.high)}"
    return shown(point.y)


def _table(chart: Chart) -> str:
    across = sorted({point.x for series in chart.series for point in series.points})
    heads = "".join(f"<th>{value:g}</th>" for value in across)
    rows = []
    for series in chart.series:
        known = {point.x: in_words(point) for point in series.points}
        cells = "".join(f"<td>{known.get(value, '')}</td>" for value in across)
        rows.append(f"<tr><th>{escape(series.name)}</th>{cells}</tr>")
    corner = escape(f"{chart.unit} by {chart.across}")
    return f"<table><tr><th>{corner}</th>{heads}</tr>{''.join(rows)}</table>"
