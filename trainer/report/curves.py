"""How the training went, as charts: loss, rates, gradients and what was measured beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from trainer.events import VALIDATION_LOSS, PhaseEvent
from trainer.listeners import phase_line
from trainer.report.axes import Point
from trainer.report.charts import Chart, Line, Marks, figure
from trainer.report.markup import paragraph, section
from trainer.report.record import Event, Record

_TOKENS = "tokens/"
_TITLES: Mapping[str, str] = {
    "train/prodigy_d": "Prodigy's estimate of the step size, d",
}


def curves(record: Record) -> str:
    """The charts of a run, or why there are none."""
    steps = record.told("step")
    if not steps:
        return section("curves", "Curves", paragraph("No step was done, so there is no curve."))
    charts = [chart for chart in _charts(record) if any(line.known() for line in chart.lines)]
    drawn = "".join(figure(chart) for chart in charts)
    return section("curves", "Curves", f'<div class="charts">{drawn}</div>')


def _charts(record: Record) -> Iterator[Chart]:
    steps, measured = record.told("step"), _measured(record)
    marks = _marks(record)
    last = max(int(steps[-1]["step"]), 1)
    lines = [
        Line("each step", 1, _series(steps, "loss"), faint=True),
        Line("smoothed", 1, _series(steps, "smoothed_loss")),
        Line("of pictures left out of training", 2, measured.pop(VALIDATION_LOSS, [])),
    ]
    known = [line for line in lines if line.known()]
    yield Chart("Loss", known, last, marks, is_wide=True)
    small = replace(marks, checkpoints=())
    rates = Line("learning rate", 1, _series(steps, "learning_rate"))
    yield Chart("Learning rate", [rates], last, small, with_decades=False)
    norms = Line("norm", 1, _series(steps, "grad_norm"))
    yield Chart("Norm of the gradients", [norms], last, small)
    for name, points in measured.items():
        if not name.startswith(_TOKENS):
            yield Chart(_TITLES.get(name, name), [Line(name, 1, points)], last, small)
    for encoder, tokens in _by_encoder(measured).items():
        named = [Line(name, place % 6 + 1, tokens[name]) for place, name in enumerate(tokens)]
        yield Chart(f"Norm of new tokens in {encoder}", named, last, small)


def _series(events: Sequence[Event], name: str) -> list[Point]:
    """What events tell by step."""
    return [(event["step"], _finite(event[name])) for event in events if name in event]


def _measured(record: Record) -> dict[str, list[Point]]:
    """What was measured beside the loss, by name."""
    found: dict[str, list[Point]] = {}
    for event in record.told("measures"):
        for name, value in event["values"].items():
            found.setdefault(name, []).append((event["step"], _finite(value)))
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _by_encoder(measured: Mapping[str, list[Point]]) -> dict[str, dict[str, list[Point]]]:
    """Norms of new tokens by text encoder and token."""
    found: dict[str, dict[str, list[Point]]] = {}
    for name, points in measured.items():
        if name.startswith(_TOKENS):
            encoder, _, token = name.removeprefix(_TOKENS).partition("/")
            found.setdefault(encoder, {})[token] = points
    return found


def _marks(record: Record) -> Marks:
    phases = [
        PhaseEvent(event["step"], tuple(event["learning"]), tuple(event["frozen"]))
        for event in record.told("phase")
    ]
    return Marks(
        phases=[(phase.step, phase_line(phase)) for phase in phases],
        checkpoints=[event["step"] for event in record.told("checkpoint")],
    )
