"""The benchmark of steps: its arithmetic on invented times, its loops on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_step
import click
import pytest
import step_contest
import torch
from bench_step import CASES, chosen, held, median_of_ratios, row
from click.testing import CliRunner
from step_contest import Operations, Places, Setting

TINY = Setting(64, 1, "bf16")
SCRIPT = Path(bench_step.__file__)


@pytest.fixture
def places(sdxl_folder: Path, photo_folder: Path, tmp_path: Path) -> Places:
    """A tiny SDXL, photographs and an empty folder."""
    return Places(sdxl_folder, photo_folder, tmp_path)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them to see each part of a contest."""
    monkeypatch.setattr(step_contest, "WARM_UP", 1)
    monkeypatch.setattr(step_contest, "TIMED", 1)
    monkeypatch.setattr(step_contest.Follower, "STEPS", 2 + step_contest.COUNTED)


def invented(
    mode: str, loops: Sequence[str], setting: Setting, *, slow: float = 1.0
) -> Mapping[str, Any]:
    """What a machine would say on which every loop but the engine's LoRA takes `slow` times it."""
    if mode == "race":
        return {loop: [1.0 if loop == "engine-lora" else slow] * 20 for loop in loops}
    kinds = ("operations", "views", "host_reads", "megabytes", "first_megabytes", "waiting")
    return {loop: dict.fromkeys(kinds, 0.01) | {"host_reads": 0.0} for loop in loops}


def test_a_ratio_is_the_median_of_pairs_not_of_times() -> None:
    # By hand: 2/1, 3/2, 4/4 and 5/10; the medians of the times alone would give 3.5 / 3.
    figure = median_of_ratios([2, 3, 4, 5], [1, 2, 4, 10])

    assert figure == {"value": 1.25, "interval": [0.5, 2.0], "pairs": 4}


@pytest.mark.parametrize(("pairs", "lowest"), [(6, 1), (10, 2), (20, 6), (25, 8)])
def test_an_interval_lies_between_the_order_statistics_of_a_table(pairs: int, lowest: int) -> None:
    # Conover 1999, table A3: the ranks that hold the median with 95 %.
    figure = median_of_ratios(range(1, pairs + 1), [1] * pairs)

    assert figure["interval"] == [lowest, pairs + 1 - lowest]


def test_every_case_tells_all_its_figures() -> None:
    for case in CASES.values():
        told = row(case, bench_step.measure(case, invented))

        assert told["figures"].keys() == case.bounds.keys()
        assert told["loops"].keys() == set(case.loops)
        assert told["settings"]["mixed_precision"] in ("bf16", "no")


def test_a_slow_form_breaks_the_strict_bound_before_the_loose_one() -> None:
    def slow(*asked: Any) -> Mapping[str, Any]:
        return invented(*asked, slow=1.2)

    case = replace(CASES["forms"], loops=["engine-lora", "engine-dora"])
    told = {"forms": row(case, bench_step.measure(case, slow))}

    (figure,) = told["forms"]["figures"].values()
    assert figure["value"] == pytest.approx(1.2)
    assert figure["interval"] == [figure["value"]] * 2
    assert not held(told, "met")
    assert held(told, "met_loosely")


def test_another_setting_has_figures_without_bounds() -> None:
    (case,) = chosen("loha", "lora,loha", {"resolution": 64}).values()
    told = row(case, bench_step.measure(case, invented), bounded=False)

    assert told["settings"]["resolution"] == 64
    assert all("bound" not in figure for figure in told["figures"].values())


def test_a_race_needs_two_loops_of_the_wanted_forms() -> None:
    assert list(chosen("*", "dora", {})) == ["alone"]
    assert list(chosen("forms,loha", "lora,lokr", {})) == ["forms"]
    with pytest.raises(click.UsageError, match=r"no case is left; there are step, .*dora"):
        chosen("setp", "lora", {})


def test_rounds_alternate_and_those_that_warm_up_do_not_count() -> None:
    order: list[str] = []

    def steps(name: str) -> Iterator[None]:
        while True:
            order.append(name)
            yield

    taken = step_contest.race({name: steps(name) for name in "ab"}, rounds=2)

    assert "".join(order[-4:]) in ("abba", "baab")
    assert len(order) == 2 * (step_contest.WARM_UP + 2)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_views_and_allocations_are_not_operations_and_reads_are_seen() -> None:
    with Operations() as operations:
        float((torch.ones(2, 2).t() @ torch.empty(2, 2).fill_(1))[0, 0])

    # Made: ones, filled, multiplied, read. Views: transposed, two selections; allocated: one.
    assert operations.counts == {"operations": 4, "views": 4, "host_reads": 1}


@pytest.mark.thorough
def test_the_engine_races_beside_a_bare_loop_on_the_same_model(
    places: Places, few_steps: None
) -> None:
    loops = ("engine-lora", "bare-lora")

    taken = step_contest.measured("race", loops, TINY, 2, places)

    assert {loop: len(seconds) for loop, seconds in taken.items()} == dict.fromkeys(loops, 2)
    assert all(second > 0 for seconds in taken.values() for second in seconds)


def test_a_step_of_the_engine_reads_nothing_and_waits_little(
    places: Places, few_steps: None
) -> None:
    told = step_contest.alone("engine-lora", TINY, places)

    assert told["host_reads"] == 0
    assert 0 < told["waiting"] < 1
    # At least the six products of each of 136 layers, and as many in one step as in the other.
    assert told["operations"] > 136 * 6
    assert told["operations"].is_integer()


def test_a_bare_loop_has_no_data_to_wait_for(places: Places, few_steps: None) -> None:
    told = step_contest.alone("peft-lora", TINY, places)

    assert told.keys() == {"first_megabytes", "megabytes", "operations", "views", "host_reads"}
    assert told["operations"].is_integer()


@pytest.mark.thorough
def test_operations_are_always_the_same(places: Places, few_steps: None) -> None:
    first, second, bare = (
        step_contest.alone(loop, TINY, replace(places, runs=places.runs / str(number)))
        for number, loop in enumerate(("engine-lora", "engine-lora", "bare-lora"))
    )

    assert first["operations"] == second["operations"]
    # Drawing, and watching for what is not finite: some, whatever the model.
    assert abs(first["operations"] - bare["operations"]) < 100


@pytest.mark.thorough
def test_one_command_writes_figures_and_keeps_those_of_other_cases(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    with pytest.MonkeyPatch.context() as patch:
        # For the processes of its loops.
        patch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))
        for case in ("alone", "forms"):
            words = ["--small", "--pairs", "2", "--forms", "lora,dora", "--cases", case]
            CliRunner().invoke(bench_step.main, [*words, "--out", str(out)], catch_exceptions=False)
    told = json.loads(out.read_text())

    assert list(told["cases"]) == ["forms", "alone"]
    assert told["machine"]["torch"] == torch.__version__
    assert told["cases"]["alone"]["figures"]["megabytes of engine-lora / bare-lora"]["value"] > 0


def test_the_file_has_every_figure_of_the_full_model() -> None:
    told = json.loads((SCRIPT.parent.parent / "docs" / "benchmarks" / "step-cpu.json").read_text())

    assert not told["small"]
    assert told["cases"].keys() == CASES.keys()
    for name, case in CASES.items():
        assert told["cases"][name]["figures"].keys() == case.bounds.keys()
