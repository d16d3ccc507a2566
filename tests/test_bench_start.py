"""The benchmark of starts and ends: its arithmetic on invented times, and once on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_start
import pytest
from click.testing import CliRunner


def events(verified: float) -> list[dict[str, Any]]:
    """Of a training whose step began at 108 and ended at 110."""
    return [
        {"event": "file", "role": "config", "time": 104.0},
        {"event": "step", "seconds": 2.0, "time": 110.0},
        {"event": "step", "seconds": 1.0, "time": 111.0},
        {"event": "file", "role": "verification", "time": verified},
    ]


def a_round(bare: float, first: float, second: float, tail: float) -> dict[str, Any]:
    return {
        "bare": bare,
        "first": {"start": first, "tail": tail},
        "second": {"start": second, "tail": tail + 1},
    }


def test_a_training_starts_with_its_process_and_is_delivered_when_it_is_verified() -> None:
    parts = bench_start.spans(events(verified=115.0), 100.0, 115.25)

    assert parts == {"start": 8.0, "delivery": 5.0, "tail": 0.25}


def test_the_shortest_of_all_rounds_counts_and_is_held_to_its_bound() -> None:
    found = bench_start.figures([a_round(4.0, 14.0, 9.0, 2.0), a_round(5.0, 20.0, 5.0, 0.5)])

    # By hand: 5 / 4, (5 - 4) / (14 - 4), 0.5.
    assert [(figure["value"], figure["met"]) for figure in found.values()] == [
        (1.25, True),
        (0.1, True),
        (0.5, True),
    ]
    late = bench_start.figures([a_round(4.0, 14.0, 9.0, 2.0)])
    assert not any(figure["met"] for figure in late.values())


def test_a_person_reads_what_is_within_its_bound() -> None:
    found = bench_start.figures([a_round(4.0, 14.0, 5.0, 2.0)])

    said = bench_start.lines({"figures": found})

    assert [line.split()[-3:] for line in said] == [
        ["1.250", "within", "1.3"],
        ["0.100", "within", "0.2"],
        ["NOT", "within", "1"],
    ]


@pytest.mark.thorough
def test_starts_and_ends_of_real_trainings_are_written_down(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"

    CliRunner().invoke(
        bench_start.main,
        ["--small", "--rounds", "1", "--remark", "tried", "--out", str(out)],
        catch_exceptions=False,
    )

    told = json.loads(out.read_text())
    assert told["remark"] == "tried"
    (seconds,) = told["cases"]["start"]["rounds"]
    assert 0 < seconds["bare"] < seconds["first"]["start"]
    assert seconds["second"]["start"] < seconds["first"]["start"]
