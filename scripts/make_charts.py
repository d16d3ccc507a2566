#!/usr/bin/env python3
"""Makes docs/benchmarks/charts.html: time, memory and cost against resolution, batch, rank, GPUs.

`page` draws what the JSON files beside it hold: step times of gpu-*.json, measured or foretold,
and memory.json, which `forecast` writes: what `trainer estimate` foresees for models of true size.
Nothing is looked up or downloaded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from gpu_cases import ATTENTION
from gpu_rows import UNMEASURED, commit, today
from make_random_models import GIB, describe
from svg_charts import Chart, Point, Series, figure

from trainer import base_model
from trainer.machine import precision_of
from trainer.memory import Forecast
from trainer.resolve import Layer, resolve

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
PRICE = 5.49
PRICE_SOURCE = "Replicate's price of one H100, $0.001525 a second, as published in autumn 2026"
JOB = 1000

FAMILIES: Mapping[str, str] = {"sdxl": "SDXL", "flux": "FLUX.1 [dev]"}
# Where a family is looked at, as what else changes: its usual size, or the one that fits.
SIDES: Mapping[str, int] = {"sdxl": 1024, "flux": 512}
RANK = 32
RESOLUTIONS = (512, 768, 1024, 1280)
BATCHES = (1, 2, 4, 8)
RANKS = (8, 32, 128)
GPUS = (1, 2, 4, 8)
MEMORIES = ((24, "24 GiB"), (80, "80 GiB"))

STYLE = """
:root { --page: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --grid: #e1e0d9; --c1: #2a78d6;
  --c2: #eb6834; --limit: #898781; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --grid: #383835; --c1: #3987e5;
    --c2: #d95926; } }
body { background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif;
  margin: 0 auto; max-width: 1200px; padding: 16px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 1.5rem 0 0.3rem; }
h3 { font-size: 1.1rem; margin: 1.8rem 0 0.3rem; }
p { color: var(--soft); margin: 0.3rem 0; max-width: 75ch; }
.told-only { border-left: 4px solid var(--c2); color: var(--ink); padding-left: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; }
.legend svg { height: 12px; margin-right: 6px; vertical-align: middle; width: 30px; }
.charts { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(265px, 1fr)); }
figure { margin: 0; min-width: 0; max-width: 560px; } figcaption { font-weight: 600; }
figure svg { display: block; height: auto; width: 100%; }
text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--grid); } line.limit { stroke: var(--limit); }
text.limit { paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.line { fill: none; stroke-linecap: round; stroke-width: 2; }
.line.told { stroke-dasharray: 5 5; } .band { opacity: 0.15; } .near { fill: transparent; }
.line.c1, .dot.c1 { stroke: var(--c1); } .line.c2, .dot.c2 { stroke: var(--c2); }
.band.c1, .measured.c1 { fill: var(--c1); } .band.c2, .measured.c2 { fill: var(--c2); }
.dot { stroke-width: 2; } .dot.told { fill: var(--page); }
details { color: var(--soft); font-size: 0.85rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 10px 2px 0; text-align: left; white-space: nowrap; }
"""


def settings(**given: Any) -> dict[str, Any]:
    """A point of the memory charts: the usual training but for what is given."""
    usual = {"batch_size": 1, "rank": RANK, "gradient_checkpointing": False}
    return {**usual, **given}


def wanted() -> Iterator[dict[str, Any]]:
    """The points of the memory charts."""
    for family, side in SIDES.items():
        for twice in (False, True):
            kept = {"family": family, "gradient_checkpointing": twice}
            yield from (settings(resolution=each, **kept) for each in RESOLUTIONS)
            yield from (settings(resolution=side, batch_size=each, **kept) for each in BATCHES[1:])
        for rank in RANKS:
            if rank != RANK:
                yield settings(family=family, resolution=side, rank=rank)


def forecasts(points: Iterable[Mapping[str, Any]], models: Path) -> Iterator[dict[str, Any]]:
    """What `trainer estimate` foresees for points, in bf16 and with AdamW.

    Args:
        models: folder of base models, of which only the configurations are read.
    """
    made: dict[str, Forecast] = {}
    for point in points:
        leaves = {name: point[name] for name in ("batch_size", "rank", "gradient_checkpointing")}
        family, side = point["family"], point["resolution"]
        model = {"model_url": str(models / family), "images_data_url": "photos"}
        size = {"resolution_width": side, "resolution_height": side}
        how = {"target_unet_modules": list(ATTENTION), "mixed_precision": "bf16"}
        config = resolve([Layer("charts", {**model, **size, **how, **leaves}, explicit=True)])
        if family not in made:
            made[family] = Forecast(base_model.locate(config.model), torch.device("cpu"))
        footprint = made[family].footprint(config, precision_of(config))
        yield {**point, "peak_gib": round(footprint.peak_bytes / GIB, 3)}


def case_name(family: str, *, resolution: int, batch_size: int = 1, rank: int = RANK) -> str:
    """What the GPU benchmark calls this training, with nothing forced."""
    end = "" if rank == RANK else f"-r{rank}"
    return f"{family}-{resolution}-b{batch_size}-lora{end}"


def step_time(rows: Mapping[str, Any], name: str, x: float, factor: float = 1) -> Iterator[Point]:
    """The step time of a case, measured or foretold; nothing where neither is there.

    Args:
        factor: what it is told times.
    """
    row = rows.get(name, {})
    if row.get("step_ms", UNMEASURED) != UNMEASURED:
        low, high = row["quartiles_ms"]
        yield Point(x, row["step_ms"] * factor, low * factor, high * factor, measured=True)
    elif row.get("predicted_ms"):
        low, high = (each * factor for each in row["predicted_ms"])
        yield Point(x, (low + high) / 2, low, high)


def lines(points_of: Mapping[str, Sequence[Iterable[Point]]]) -> list[Series]:
    """A line of each family that has points."""
    made = [
        Series(FAMILIES[family], colour, list(chain.from_iterable(points_of[family])))
        for colour, family in enumerate(FAMILIES, start=1)
    ]
    return [series for series in made if series.points]


def time_charts(rows: Mapping[str, Any], factor: float, of: str, unit: str) -> list[Chart]:
    """Time, or what is proportional to it, against resolution, batch and rank."""
    sizes = {
        family: [
            step_time(rows, case_name(family, resolution=side), side, factor)
            for side in RESOLUTIONS
        ]
        for family in FAMILIES
    }
    batches = {
        family: [
            step_time(rows, case_name(family, resolution=side, batch_size=each), each, factor)
            for each in BATCHES
        ]
        for family, side in SIDES.items()
    }
    ranks = {
        family: [
            step_time(rows, case_name(family, resolution=side, rank=each), each, factor)
            for each in RANKS
        ]
        for family, side in SIDES.items()
    }
    return [
        Chart(f"{of} by resolution", "pixels a side", unit, lines(sizes)),
        Chart(f"{of} by batch", "pictures a step", unit, lines(batches)),
        Chart(f"{of} by rank", "rank of the adapter", unit, lines(ranks)),
    ]


def foretold(points: Iterable[Point]) -> list[Point]:
    """The same as foretold of several GPUs: what was measured was measured on one."""
    return [replace(point, measured=False) for point in points]


def gpu_charts(rows: Mapping[str, Any], price: float) -> tuple[Chart, Chart]:
    """Time and cost of one job by several GPUs, each with a share of its pictures."""

    def by_gpus(factor: float, power: int) -> list[Series]:
        points = {
            family: [
                foretold(
                    step_time(
                        rows, case_name(family, resolution=side), count, factor * count**power
                    )
                )
                for count in GPUS
            ]
            for family, side in SIDES.items()
        }
        return lines(points)

    minutes = JOB / 60_000
    return (
        Chart(f"minutes for {JOB} pictures", "GPUs", "minutes", by_gpus(minutes, -1)),
        Chart(f"$ for {JOB} pictures by GPUs", "GPUs", "$", by_gpus(minutes / 60 * price, 0)),
    )


def memory_charts(memory: Sequence[Mapping[str, Any]], rows: Mapping[str, Any]) -> list[Chart]:
    """Memory against resolution, batch, rank and GPUs."""
    known = {_key(row): row["peak_gib"] for row in memory}

    def point(x: float, family: str, resolution: int, **given: Any) -> Iterator[Point]:
        at = settings(family=family, resolution=resolution, **given)
        plain = {name: given[name] for name in ("batch_size", "rank") if name in given}
        row = rows.get(case_name(family, resolution=resolution, **plain), {})
        measured = row.get("peak_gib", UNMEASURED)
        if measured != UNMEASURED and not at["gradient_checkpointing"]:
            yield Point(x, measured, measured, measured, measured=True)
        elif _key(at) in known:
            value = known[_key(at)]
            yield Point(x, value, value, value)

    def sizes(twice: bool) -> list[Series]:
        how = {"gradient_checkpointing": twice}
        return lines({f: [point(s, f, s, **how) for s in RESOLUTIONS] for f in FAMILIES})

    def batches(twice: bool) -> list[Series]:
        how = {"gradient_checkpointing": twice}
        return lines(
            {f: [point(b, f, s, batch_size=b, **how) for b in BATCHES] for f, s in SIDES.items()}
        )

    ranks = {f: [point(r, f, s, rank=r) for r in RANKS] for f, s in SIDES.items()}
    gpus = {f: [foretold(point(n, f, s)) for n in GPUS] for f, s in SIDES.items()}
    shapes = [
        ("GiB by resolution", "pixels a side", sizes(twice=False)),
        ("GiB by batch", "pictures a step", batches(twice=False)),
        ("GiB by rank", "rank of the adapter", lines(ranks)),
        ("GiB on each GPU", "GPUs", lines(gpus)),
        ("GiB by resolution, checkpointing", "pixels a side", sizes(twice=True)),
        ("GiB by batch, checkpointing", "pictures a step", batches(twice=True)),
    ]
    return [Chart(title, across, "GiB", series, MEMORIES) for title, across, series in shapes]


def _sides() -> str:
    return " and ".join(f"{FAMILIES[family]} at {side} px" for family, side in SIDES.items())


def _key(point: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("family", "resolution", "batch_size", "rank", "gradient_checkpointing")
    return tuple(point[name] for name in names)


def section(title: str, words: str, charts: Iterable[Chart]) -> str:
    """Charts under one heading; those without a figure are left out."""
    drawn = "".join(figure(chart) for chart in charts if chart.series)
    return f'<h3>{escape(title)}</h3><p>{escape(words)}</p><div class="charts">{drawn}</div>'


def sections_of(
    name: str, told: Mapping[str, Any], memory: Sequence[Mapping[str, Any]], price: float
) -> str:
    """What one GPU takes."""
    rows, device = told["cases"], told["machine"]["device"]
    missing = sum(row["step_ms"] == UNMEASURED for row in rows.values())
    if device == UNMEASURED:
        device = f"{name.upper()}, not measured yet"
        warning = "No step was measured on this GPU: all times and costs are foretold."
    else:
        warning = f"{missing} of {len(rows)} cases are not measured: foretold where dashed."
    with_gpus, cost_with_gpus = gpu_charts(rows, price)
    times = [*time_charts(rows, 1, "ms a step", "ms"), with_gpus]
    dollars = JOB / 3_600_000 * price
    costs = [*time_charts(rows, dollars, f"$ for {JOB} steps", "$"), cost_with_gpus]
    return "".join(
        [
            f"<h2>{escape(device)}</h2>",
            f'<p class="told-only">{escape(warning)}</p>' if missing else "",
            section(
                "Time",
                f"LoRA on attention in bf16, of rank {RANK} and one picture a step where nothing "
                f"else is said; by batch, rank and GPUs {_sides()}. The trainer chooses how it "
                "runs. Several GPUs share pictures; what they tell each other is left out.",
                times,
            ),
            section(
                "Memory",
                "The same trainings. Tensors alone: driver, workspaces and fragments come on top. "
                "Each GPU of several holds the whole model.",
                memory_charts(memory, rows),
            ),
            section(
                "Cost",
                f"Steps alone, at ${price:g} a GPU hour ({PRICE_SOURCE}).",
                costs,
            ),
        ]
    )


def page(folder: Path, price: float = PRICE) -> str:
    """The page as the files in a folder make it."""
    memory = json.loads((folder / "memory.json").read_text())["cases"]
    files = {
        file.stem.removeprefix("gpu-"): json.loads(file.read_text())
        for file in sorted(folder.glob("gpu-*.json"))
    }
    sample = '<svg viewBox="0 0 30 12"><line class="line {}" x1="2" x2="28" y1="6" y2="6"/></svg>'
    names = [(f"c{number}", name) for number, name in enumerate(FAMILIES.values(), start=1)]
    kinds = [*names, ("limit", "measured"), ("limit told", "foretold (band: from best to worst)")]
    legend = "".join(f"<li>{sample.format(kind)}{escape(name)}</li>" for kind, name in kinds)
    body = "".join(sections_of(name, told, memory, price) for name, told in files.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Time, memory and cost</title><style>{STYLE}</style></head><body>"
        "<h1>Time, memory and cost of a training</h1>"
        "<p>Made by scripts/make_charts.py of the JSON files beside this page; README.md there "
        f'says what they hold.</p><ul class="legend">{legend}</ul>{body}</body></html>\n'
    )


@click.group(help=__doc__)
def main() -> None:
    """Makes the charts, or the forecasts that they draw."""


@main.command(name="forecast")
def forecast_command() -> None:
    """Foresees the memory of all points anew: a few minutes, no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            describe(family, Path(folder) / family, small=False, t5_layers=24)
        cases = []
        for case in forecasts(wanted(), Path(folder)):
            print(case, flush=True)
            cases.append(case)
    told = {"torch": torch.__version__, "date": today(), "commit": commit(), "cases": cases}
    (FOLDER / "memory.json").write_text(json.dumps(told, indent=1) + "\n")


@main.command(name="page", context_settings={"show_default": True})
@click.option("--price", default=PRICE, help=f"Dollars an hour of one GPU: {PRICE_SOURCE}.")
def page_command(price: float) -> None:
    """Draws the page anew."""
    (FOLDER / "charts.html").write_text(page(FOLDER, price))


if __name__ == "__main__":
    main()
