"""Line charts as SVG in HTML: lines stretch with the page, words keep their size.

Places are shares of the chart, so the same chart is read on a phone and on paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.axes import (
    Axis,
    Point,
    axis_of,
    even,
    figure_text,
    step_axis,
    thinned,
    tick_label,
)
from trainer.report.markup import bullets, folded, table

# Lines of no more points have them drawn.
_FEW = 40
# Rows of the table beneath a chart.
_ROWS = 9


@dataclass(frozen=True)
class Line:
    """A curve over the steps.

    Args:
        colour: number of one of the page's colours, from 1.
        points: step and value, in order.
        faint: it lies behind another that says the same more clearly.
    """

    name: str
    colour: int
    points: Sequence[Point]
    faint: bool = False

    def known(self) -> list[tuple[float, float]]:
        """The points that have a value."""
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Marks:
    """What happened at steps.

    Args:
        phases: after these steps other parts learn, with words for each.
        checkpoints: after these steps a checkpoint was written.
    """

    phases: Sequence[tuple[int, str]] = ()
    checkpoints: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        title: what y is.
        lines: at least one point of them has a value.
        last: the step at which the chart ends.
        is_wide: it takes the whole width of the page.
        with_decades: see `axis_of`.
    """

    title: str
    lines: Sequence[Line]
    last: int
    marks: Marks = Marks()
    is_wide: bool = False
    with_decades: bool = True


def figure(chart: Chart) -> str:
    """A chart with its legend, and a table of some of its figures."""
    across = step_axis(chart.last)
    values = (y for line in chart.lines for _, y in line.known())
    upward = axis_of(values, with_decades=chart.with_decades)
    scale = ", each decade as high as the other" if upward.is_log else ""
    kind, phases = ("chart whole", _phases(chart.marks)) if chart.is_wide else ("chart", "")
    return (
        f'<figure class="{kind}"><figcaption>{escape(chart.title)}</figcaption>{_legend(chart)}'
        f'<div class="plot"><svg role="img" aria-label="{escape(_told(chart) + scale)}">'
        f"{''.join(_grid(across, upward))}{''.join(_marks(chart.marks, across))}"
        f"{''.join(part for line in chart.lines for part in _drawn(line, across, upward))}</svg>"
        f"</div>{phases}{folded('Figures', _figures(chart))}</figure>"
    )


def _legend(chart: Chart) -> str:
    names = [
        f'<span class="key c{line.colour}{" faint" if line.faint else ""}"></span>'
        f"{escape(line.name)}"
        for line in chart.lines
    ]
    if chart.marks.checkpoints:
        names.append('<span class="key notch"></span>checkpoint')
    return bullets(names, "legend") if len(names) > 1 else ""


def _phases(marks: Marks) -> str:
    words = [
        f"<b>{_letter(place)}</b> {escape(text)}" for place, (_, text) in enumerate(marks.phases)
    ]
    return bullets(words, "phases")


def _letter(place: int) -> str:
    return chr(ord("A") + place % 26)


def _grid(across: Axis, upward: Axis) -> Iterator[str]:
    for tick in upward.ticks:
        y = _share(1 - upward.share(tick))
        yield f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        yield f'<text class="end" x="-8" y="{y}" dy="4">{tick_label(tick)}</text>'
    for tick in across.ticks:
        x = _share(across.share(tick))
        yield f'<text class="mid" x="{x}" y="100%" dy="20">{tick_label(tick)}</text>'
    yield '<text class="mid" x="50%" y="100%" dy="38">step</text>'


def _marks(marks: Marks, across: Axis) -> Iterator[str]:
    for step in marks.checkpoints:
        x = _share(across.share(step))
        yield (
            f'<line class="notch" x1="{x}" x2="{x}" y1="97%" y2="100%">'
            f"<title>checkpoint of step {step}</title></line>"
        )
    for place, (step, words) in enumerate(marks.phases):
        x = _share(across.share(step))
        yield (
            f'<line class="phase" x1="{x}" x2="{x}" y1="0" y2="100%">'
            f"<title>{escape(words)}</title></line>"
            f'<text class="phase" x="{x}" y="0" dx="5" dy="11">{_letter(place)}</text>'
        )


def _drawn(line: Line, across: Axis, upward: Axis) -> Iterator[str]:
    kind = f"c{line.colour}{' faint' if line.faint else ''}"
    paths = "".join(
        f'<polyline points="{" ".join(part)}"/>' for part in _parts(line, across, upward)
    )
    yield (
        f'<svg class="line {kind}" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'width="100%" height="100%">{paths}</svg>'
    )
    known = line.known()
    for x, y in known if len(known) <= _FEW else ():
        place = f'cx="{_share(across.share(x))}" cy="{_share(1 - upward.share(y))}"'
        words = escape(f"{line.name}, step {x:g}: {figure_text(y)}")
        yield f'<circle class="dot {kind}" {place} r="3"><title>{words}</title></circle>'


def _parts(line: Line, across: Axis, upward: Axis) -> Iterator[list[str]]:
    """Runs of points without a gap."""
    part: list[str] = []
    for x, y in thinned(line.points):
        if y is None:
            yield part
            part = []
        else:
            part.append(f"{1000 * across.share(x):.1f},{1000 * (1 - upward.share(y)):.1f}")
    yield part


def _told(chart: Chart) -> str:
    """What a chart shows, in words."""
    told = []
    for line in chart.lines:
        known = line.known()
        if not known:
            continue
        (first, began), (last, ended) = known[0], known[-1]
        values = [y for _, y in known]
        told.append(
            f"{line.name} from {figure_text(began)} at step {first:g} to {figure_text(ended)} at "
            f"step {last:g}, lowest {figure_text(min(values))}, highest {figure_text(max(values))}"
        )
    return f"{chart.title} by step: {'; '.join(told)}"


def _figures(chart: Chart) -> str:
    """Values at some steps; of a line that has none there, its last before."""
    steps = sorted({int(x) for line in chart.lines for x, _ in line.known()})
    shown = even(steps, _ROWS)
    columns = [_held(line, shown) for line in chart.lines]
    rows = [(f"{step:,}", *cells) for step, *cells in zip(shown, *columns, strict=True)]
    heads = ["step", *(escape(line.name) for line in chart.lines)]
    return table(heads, rows, of=f"figures of {chart.title}", kind="figures")


def _held(line: Line, steps: Sequence[int]) -> list[str]:
    """The values of a line at steps in order, each held until the next."""
    known, cells, value = iter(line.known()), [], ""
    ahead = next(known, None)
    for step in steps:
        while ahead is not None and ahead[0] <= step:
            value, ahead = figure_text(ahead[1]), next(known, None)
        cells.append(value)
    return cells


def _share(value: float) -> str:
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%"
