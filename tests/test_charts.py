"""The page of charts: drawn from its files, current, and honest about what was not measured."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import make_charts
import pytest
from gpu_cases import CHOSEN
from gpu_rows import UNMEASURED
from make_charts import FAMILIES, GPUS, SIDES, case_name, page, step_time, wanted
from svg_charts import Chart, Point, Series, figure

SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


def drawn(html: str) -> list[ET.Element]:
    """The charts, read by a parser of XML."""
    return [ET.fromstring(svg) for svg in SVG.findall(html) if "aria-label" in svg]


def marks(chart: ET.Element, kind: str) -> list[ET.Element]:
    return [one for one in chart.iter() if kind in one.get("class", "").split()]


def test_the_page_is_what_its_files_make_it() -> None:
    assert (make_charts.FOLDER / "charts.html").read_text() == page(make_charts.FOLDER)


def test_the_page_asks_nothing_of_the_network() -> None:
    html = (make_charts.FOLDER / "charts.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<script", html)


def test_nothing_looks_measured_where_nothing_was(tmp_path: Path) -> None:
    html = page(folder_with(tmp_path, {"machine": {"device": UNMEASURED}}))
    charts = drawn(html)
    # Time, memory and cost, each against resolution, batch, rank and GPUs; memory twice.
    assert len(charts) == 4 + 6 + 4
    assert all(marks(chart, "told") and not marks(chart, "measured") for chart in charts)
    assert "No step was measured" in html


def test_a_measured_case_is_full_and_the_rest_stays_dashed(tmp_path: Path) -> None:
    measured = {"step_ms": 50.0, "quartiles_ms": [48.0, 53.0], "peak_gib": 12.0}
    folder = folder_with(tmp_path, {"machine": {"device": "Some GPU"}}, **measured)
    html = page(folder)
    charts = drawn(html)
    counts = [len(marks(chart, "measured")) for chart in charts]
    # Time, memory and cost of one GPU; what several take was not measured, whatever one takes.
    assert counts == [*(1, 1, 1, 0), *(1, 1, 1, 0), *(0, 0), *(1, 1, 1, 0)]
    assert all(marks(chart, "told") for chart in charts)
    assert "Some GPU" in html
    assert "1024: 50.0 (measured) ms" in html


def folder_with(folder: Path, facts: dict[str, Any], **figures: Any) -> Path:
    """The files of a page: every case foretold, and one with these figures."""
    told = {"status": UNMEASURED, "step_ms": UNMEASURED, "predicted_ms": [40.0, 60.0]}
    cases = {name: dict(told) for name in CHOSEN}
    cases["sdxl-1024-b1-lora"] |= figures
    (folder / "gpu-test.json").write_text(json.dumps({**facts, "cases": cases}))
    memory = [{**point, "peak_gib": 9.0} for point in wanted()]
    (folder / "memory.json").write_text(json.dumps({"cases": memory}))
    return folder


def test_cost_is_time_at_a_price(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"machine": {"device": UNMEASURED}})
    html = page(folder, price=36.0)
    # 1000 steps of 40 to 60 ms are 40 to 60 s, at one cent each.
    assert "SDXL, 1024: 0.40 to 0.60 $" in html
    assert "at $36 a GPU hour" in html


def test_two_gpus_share_the_pictures_of_a_job() -> None:
    rows = {case_name(f, resolution=s): {"predicted_ms": [60, 120]} for f, s in SIDES.items()}
    minutes, dollars = make_charts.gpu_charts(rows, price=60.0)
    for series in minutes.series:
        assert [(point.x, point.low) for point in series.points] == [(n, 1 / n) for n in GPUS]
    assert {point.low for series in dollars.series for point in series.points} == {1.0}


def test_every_case_that_the_charts_ask_for_by_name_is_one_of_the_benchmark() -> None:
    found = [
        (family, name)
        for family in FAMILIES
        for side in make_charts.RESOLUTIONS
        if (name := case_name(family, resolution=side)) in CHOSEN
    ]
    assert len(found) == 3 * len(FAMILIES)
    for family, side in SIDES.items():
        assert {case_name(family, resolution=side, rank=rank) for rank in make_charts.RANKS} <= set(
            CHOSEN
        )
        assert case_name(family, resolution=side, batch_size=2) in CHOSEN


def test_what_is_neither_measured_nor_foretold_is_no_point() -> None:
    assert list(step_time({}, "sdxl-512-b1-lora", 512)) == []
    rows = {"a": {"status": "unknown options", "step_ms": UNMEASURED, "predicted_ms": None}}
    assert list(step_time(rows, "a", 512)) == []


def test_a_forecast_of_the_charts_is_of_the_training_that_it_names(flux_folder: Path) -> None:
    kept = {"family": "flux", "resolution": 256, "rank": 4, "batch_size": 8}
    points = [make_charts.settings(**kept, gradient_checkpointing=each) for each in (False, True)]
    told = list(make_charts.forecasts(points, flux_folder.parent))
    assert [{n: v for n, v in one.items() if n != "peak_gib"} for one in told] == points
    most, twice = (one["peak_gib"] for one in told)
    assert most > 2 * twice > 0


def test_a_chart_has_its_figures_in_words_and_in_a_table() -> None:
    points = [Point(1, 10, 8, 12), Point(2, 20, 20, 20, measured=True)]
    html = figure(Chart("Time <of> it", "batch", "ms", [Series("A", 1, points)], [(15, "most")]))
    assert "<td>8.00 to 12.0</td><td>20.0 (measured)</td>" in html
    assert "Time &lt;of&gt; it" in html
    (chart,) = drawn(html)
    heights = [float(dot.get("cy", "0")) for dot in marks(chart, "dot")]
    assert heights[0] > heights[1]
    (line,) = [one for one in marks(chart, "line")]
    assert "told" in line.get("class", "")
    (limit,) = [one for one in marks(chart, "limit") if one.tag == "line"]
    # The axis goes to 20 in steps of 5.
    assert float(limit.get("y1", "0")) == pytest.approx((heights[0] + heights[1]) / 2)
