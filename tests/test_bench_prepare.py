"""The benchmark of preparation, on photographs small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_prepare
import pytest
from click.testing import CliRunner
from PIL import Image

SCRIPT = Path(bench_prepare.__file__)
SMALL = ("--photos", "2", "--megapixels", "0.05", "--resolution", "64")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What the benchmark tells of two photographs."""
    with pytest.MonkeyPatch.context() as patch:
        # For the processes of its runs.
        patch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))
        done = CliRunner().invoke(bench_prepare.main, [*SMALL, "--json"], catch_exceptions=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.thorough
def test_every_run_prepares_all_photographs_and_tells_its_stages(told: dict[str, Any]) -> None:
    assert tuple(told["runs"]) == bench_prepare.RUNS
    for run in told["runs"].values():
        assert run["pictures"] == 2
        assert tuple(run["stages"]) == tuple(bench_prepare.STAGES)
        assert run["peak_megabytes"] >= run["megabytes_before"] > 10


@pytest.mark.thorough
def test_every_stage_takes_time_in_the_first_run(told: dict[str, Any]) -> None:
    first = told["runs"]["first run"]["stages"]

    assert all(stage["seconds"] > 0 for stage in first.values())


@pytest.mark.thorough
@pytest.mark.parametrize("run", bench_prepare.RUNS[1:])
def test_a_later_run_decodes_nothing(told: dict[str, Any], run: str) -> None:
    assert told["runs"][run]["stages"]["decode"]["seconds"] == 0


@pytest.mark.thorough
def test_a_person_reads_shares_of_the_work(told: dict[str, Any]) -> None:
    for run, taken in told["runs"].items():
        first, *stages = bench_prepare.table(run, taken).splitlines()

        assert first.startswith(f"{run}:")
        assert any("decode" in line and "%" in line for line in stages)


@pytest.mark.thorough
def test_a_second_training_on_the_same_photographs_encodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))

    done = CliRunner().invoke(
        bench_prepare.main, [*SMALL, "--training", "--json"], catch_exceptions=False
    )

    told = json.loads(done.stdout)
    first, second = (told["runs"][run] for run in bench_prepare.TRAININGS)
    assert all(first["stages"][stage] > 0 for stage in ("VAE", "text encoders", "open pictures"))
    assert not any(second["stages"][s] for s in ("VAE", "text encoders", "open pictures"))
    assert told["second_to_first"] == second["preparation"] / first["preparation"]


def test_a_person_reads_how_much_sooner_a_second_training_starts() -> None:
    stages = {"VAE": 3.0}
    taken = [{"preparation": seconds, "stages": stages} for seconds in (4.0, 0.5)]
    runs = dict(zip(bench_prepare.TRAININGS, taken, strict=True))

    lines = bench_prepare.table_of_trainings({"runs": runs, "second_to_first": 0.125}).splitlines()

    assert lines[0] == "first training: 4.00 s without imports and weights"
    assert lines[1].split() == ["VAE", "3.00", "s"]
    assert lines[-1] == "second to first: 12.5%"


def test_a_stage_that_says_events_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        def stage(self) -> Iterator[int]:
            yield 1
            return 2

    def whole(work: Work) -> Iterator[int]:
        value = yield from work.stage()
        yield value

    stages = bench_prepare.Stages()
    clock = iter([10.0, 13.5])
    monkeypatch.setattr(bench_prepare.time, "perf_counter", lambda: next(clock))

    stages.watch({"work": ((Work, "stage"),)})

    assert list(whole(Work())) == [1, 2]
    assert stages.passed["work"] == 3.5


def test_photographs_are_the_same_each_time_and_no_two_are_alike(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        bench_prepare.make_photographs(tmp_path / folder, count=2, megapixels=0.05, faces=True)

    first, second = (p.read_bytes() for p in sorted((tmp_path / "one").iterdir()))
    again = sorted((tmp_path / "other").iterdir())[0]
    assert again.read_bytes() == first != second
    with Image.open(again) as image:
        assert image.size == (259, 194)
