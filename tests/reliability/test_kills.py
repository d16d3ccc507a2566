"""A run that is killed anywhere goes on to the same bytes, with each step logged once."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from faulty_disk import Fault, Operation, Outcome
from interrupted import Course
from tiny import digests

Figure = Callable[[str], None]
Courses = Callable[..., Course]

STEPS = 6
PIVOT = 3
PIVOTAL: dict[str, Any] = {
    "train_text_encoder_ti": True,
    "train_text_encoder_ti_frac": 0.5,
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "text_encoder_lr": 1.0,
    "checkpointing_steps": 1,
}
WORKERS = {"cache_latents": False, "num_workers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "workers": WORKERS,
    "full": {"use_lora": False, "learning_rate": 1e-4},
    "dora": {"use_dora": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


def killed(outcome: Outcome) -> Outcome:
    """Asserts that a run was killed and took its processes with it."""
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr
    assert not outcome.has_processes()
    return outcome


def sample(points: Sequence[int], amount: int) -> list[int]:
    """Some of them, drawn with a fixed seed."""
    return sorted(random.Random(7).sample(points, min(amount, len(points))))


def at_step(course: Course, step: int) -> Fault:
    """A kill in the middle of logging this step, in a run from the start."""
    events = course.root / "whole" / "events.jsonl"
    lines = events.read_text().splitlines()
    line = next(n for n, text in enumerate(lines) if f'"event": "step", "step": {step},' in text)
    on_events = course.whole.below(events)
    writes = [
        n for n, done in enumerate(on_events, 1) if (done.name, done.path) == ("write", events)
    ]
    return Fault("kill", at=writes[line])


def test_a_run_killed_at_random_steps_twice_in_one_run_ends_with_the_same_bytes(
    courses: Courses, thorough: bool, figure: Figure
) -> None:
    course, draws = courses(checkpoints_total_limit=1), random.Random(20)
    runs = 6 if thorough else 1
    for _ in range(runs):
        folder = course.start_again("steps")
        step = draws.randrange(1, STEPS)
        first = at_step(course, step)
        killed(course.run("steps", Fault("kill", at=first.at, below=folder / "events.jsonl")))
        # Of the checkpoint after the next one that the run comes by.
        later = draws.choice([later for later in (4, 6) if later >= step])
        killed(course.run("steps", Fault("kill", below=folder / "checkpoints" / f".tmp-{later}")))
        course.ends_alike("steps")
    figure(f"{2 * runs} of {2 * runs} kills in {runs} runs, all bytes equal")


def test_a_run_killed_before_at_and_after_the_pivot_ends_with_the_same_bytes(
    courses: Courses, thorough: bool, figure: Figure
) -> None:
    course = courses(**PIVOTAL)
    folder = course.start_again("pivot")
    around = [PIVOT - 1, PIVOT, PIVOT + 1]
    # While the next checkpoint begins, so that the run goes on from the one of this step.
    faults = [Fault("kill", below=folder / "checkpoints" / f".tmp-{step + 1}") for step in around]
    for fault in faults:
        killed(course.run("pivot", fault))
    course.ends_alike("pivot")
    for fault in faults if thorough else []:
        course.start_again("pivot")
        killed(course.run("pivot", fault))
        course.ends_alike("pivot")
    figure(f"{6 if thorough else 3} kills, resumed from steps 2, 3 and 4, all bytes equal")


def in_full(course: Course, operations: Sequence[Operation], below: str) -> list[int]:
    """Every operation of writing one checkpoint; of what is elsewhere each kind, twice."""
    if below == "checkpoints":
        folder = course.root / "whole" / below
        one, next_one = (
            next(n for n, it in enumerate(operations, 1) if it.path == folder / f".tmp-{step}")
            for step in (4, 6)
        )
        return [1, *range(2, one, 7), *range(one, next_one), *range(next_one, len(operations), 7)]
    places: dict[str, list[int]] = {}
    for number, operation in enumerate(operations, 1):
        places.setdefault(operation.name, []).append(number)
    return sorted({place for found in places.values() for place in (found[0], found[-1])})


def kill_and_cut_power(course: Course, below: str, points: Sequence[int], both: bool) -> int:
    """Kills at each of these operations, and goes on after a power cut there.

    Args:
        both: where the power cut takes something away, go on without it, too.

    Returns:
        How many power cuts took something away.
    """
    folder, kept, cuts = course.root / "cut", course.root / "kept", 0
    for point in points:
        course.start_again("cut")
        outcome = killed(course.run("cut", Fault("kill", at=point, below=folder / below)))
        shutil.copytree(folder, course.start_again("kept"))
        lost = outcome.cut_power()
        course.ends_alike("cut")
        cuts += bool(lost)
        if lost and both:
            shutil.rmtree(folder)
            kept.rename(folder)
            course.ends_alike("cut")
    return cuts


@pytest.mark.parametrize(
    ("below", "few"),
    [
        ("checkpoints", 4),
        (".tmp-delivery", 1),
        ("prepared", 1),
        (".tmp-result.json", 1),
        (".tmp-config.yaml", 1),
        pytest.param("result.json", 2, marks=pytest.mark.thorough),
    ],
)
def test_a_kill_or_a_power_cut_inside_any_file_operation_changes_nothing_in_the_end(
    courses: Courses, below: str, few: int, thorough: bool, figure: Figure
) -> None:
    course = courses(checkpoints_total_limit=1)
    operations = course.whole.below(course.root / "whole" / below)
    if thorough:
        points = in_full(course, operations, below)
    else:
        points = sample(range(1, len(operations) + 1), few)
    cuts = kill_and_cut_power(course, below, points, both=thorough)
    figure(f"{len(points)} of {len(operations)} operations, {cuts} power cuts, all bytes equal")


@pytest.mark.thorough
def test_a_finished_training_that_runs_again_keeps_its_files_until_there_are_new_ones(
    courses: Courses, figure: Figure
) -> None:
    course = courses(checkpoints_total_limit=1)
    folder = course.root / "again"
    staging, outputs = folder / ".tmp-delivery", folder / "outputs"
    length = len(course.whole.below(course.root / "whole" / staging.name))
    half = length // 2
    faults = [Fault("kill", at=at, below=staging) for at in (1, half, length // 4 * 3)]
    faults += [Fault("enospc", at=half, below=staging), Fault("kill", at=1, below=outputs)]
    for fault in faults:
        course.copy_of_the_whole("again")
        outcome = course.run("again", fault)
        assert outcome.returncode == (5 if fault.kind == "enospc" else -signal.SIGKILL)
        assert digests(outputs) == course.expected["outputs"]
        course.ends_alike("again")
    # Between the two names: whole under another, and there again when the next delivery fails.
    course.copy_of_the_whole("again")
    killed(course.run("again", Fault("kill", at=2, below=outputs)))
    assert digests(folder / ".tmp-old-outputs") == course.expected["outputs"]
    assert course.run("again", Fault("enospc", at=half, below=staging)).returncode == 5
    assert digests(outputs) == course.expected["outputs"]
    course.ends_alike("again")
    figure(f"{len(faults) + 1} faults, all files there, all bytes equal")


def done(operations: Sequence[Operation]) -> list[Operation]:
    return [operation for operation in operations if not operation.error]


def test_an_old_checkpoint_goes_only_after_the_new_one_is_durable(
    courses: Courses, figure: Figure
) -> None:
    course = courses(checkpoints_total_limit=1)
    folder = course.root / "whole" / "checkpoints"
    operations = done(course.whole.below(folder))
    for old, new in ((2, 4), (4, 6)):
        named = [n for n, it in enumerate(operations) if it.target == folder / f"step-{new}"]
        gone = [
            n
            for n, it in enumerate(operations)
            if it.path.is_relative_to(folder / f"step-{old}") and it.name in ("rename", "unlink")
        ]
        synced = [n for n, it in enumerate(operations) if (it.name, it.path) == ("fsync", folder)]
        assert len(named) == 1
        assert any(named[0] < n < gone[0] for n in synced)
    figure("2 of 2 removals after name and fsync")


def test_nothing_gets_a_name_before_its_bytes_are_durable_nor_is_done_before_its_name_is(
    courses: Courses, figure: Figure
) -> None:
    course = courses(checkpoints_total_limit=1)
    root = course.root / "whole"
    assert course.whole.renamed_before_durable() == []
    operations = done(course.whole.operations)
    renames = [it for it in operations if it.name == "rename"]
    # Logs are appended to; the lock says nothing of the run.
    transient = [root / ".lock", root / "events.jsonl"]
    lost = []
    for operation in operations:
        name = operation.target or operation.path
        if operation.name not in ("open", "mkdir", "rename") or not name.exists():
            continue
        later = [it for it in operations if it.number > operation.number and it.name == "fsync"]
        if name not in transient and all(it.path != name.parent for it in later):
            lost.append(f"{operation.name} {name}")
    assert lost == []
    figure(f"{len(renames)} renames")


@pytest.mark.thorough
def test_a_training_of_another_kind_is_killed_and_ends_with_the_same_bytes(
    courses: Courses, thorough: bool, figure: Figure
) -> None:
    names, steps = (list(VARIANTS), (4, 6)) if thorough else (["workers"], (4,))
    for name in names:
        course = courses(**VARIANTS[name])
        folder = course.start_again("other")
        for step in steps:
            killed(
                course.run("other", Fault("kill", below=folder / "checkpoints" / f".tmp-{step}"))
            )
        course.ends_alike("other")
    figure(f"{', '.join(names)}: {len(steps) * len(names)} kills")


def test_a_first_checkpoint_that_was_never_finished_is_a_fresh_start_and_said_so(
    courses: Courses, figure: Figure
) -> None:
    course = courses(checkpoints_total_limit=1)
    folder = course.start_again("first")
    killed(course.run("first", Fault("kill", at=3, below=folder / "checkpoints" / ".tmp-2")))
    outcome = course.ends_alike("first")
    assert "ended before its first checkpoint was whole" in outcome.stderr
    figure("1 of 1")
