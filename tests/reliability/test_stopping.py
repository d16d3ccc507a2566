"""Signals: a wish to stop leaves a checkpoint of the last step, a second Ctrl-C ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from faulty_disk import Fault, FaultyDisk, Kind, Outcome
from rich.console import Console
from short_runs import (
    TRACE,
    checkpoints,
    command,
    line_of_step,
    photographs,
    results,
    steps,
    wait_for_step,
)

from trainer import runner
from trainer.errors import InputError
from trainer.printing import Unfailing
from trainer.runner import stop_on_signals

STOPPED = 75
STEPS = 5
LONG = 400


@dataclass(frozen=True)
class Whole:
    """A training that no signal reached, and the way to others like it.

    Args:
        disk: where it ran.
        arguments: its command, by run folder.
        run: its folder.
        writes: which operations on its log of events are writes, from 1.
    """

    disk: FaultyDisk
    arguments: Callable[..., list[str]]
    run: Path
    writes: list[int] = field(default_factory=list)

    def logging(self, step: int) -> int:
        """Which operation on the log of events opens it for this step, in a run from the start."""
        return self.writes[line_of_step(self.run, step)] - 1

    def ended(self) -> Whole:
        """Runs to its end, and remembers which operations on the log of events are lines."""
        outcome, events = self.same(self.run.name), self.run / "events.jsonl"
        assert outcome.returncode == 0, outcome.stderr
        done = enumerate(outcome.below(events), 1)
        return replace(self, writes=[number for number, it in done if it.name == "write"])

    def same(self, name: str, fault: Fault | None = None) -> Outcome:
        """The same training in another folder."""
        return self.disk.run(self.arguments(self.disk.root / name), fault)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, photo_folder: Path
) -> Iterator[Whole]:
    root = tmp_path_factory.mktemp("signals")
    photos = photographs(tmp_path_factory.mktemp("subject") / "photos", photo_folder)

    def arguments(folder: Path, **leaves: object) -> list[str]:
        usual = {"max_train_steps": STEPS, "checkpointing_steps": LONG, "tensorboard": False}
        return command(sd15_folder, photos, folder, **{**usual, **leaves})

    with FaultyDisk(root) as disk:
        yield Whole(disk, arguments, root / "whole").ended()


def ended_as(whole: Path, run: Path) -> None:
    """Asserts that a run has the files and the log of one that no signal reached."""
    assert results(run) == results(whole)
    assert checkpoints(run).items() >= checkpoints(whole).items()
    assert steps(run) == steps(whole)


def was_stopped(outcome: Outcome, run: Path) -> int:
    """Asserts how a stopped training ends, and returns its last step."""
    assert outcome.returncode == STOPPED, outcome.stderr
    assert TRACE not in outcome.stderr
    assert "error[interrupted]" in outcome.stderr
    assert "run the same command again" in outcome.stderr
    assert json.loads((run / "result.json").read_bytes())["status"] == "interrupted"
    last = steps(run)[-1][0] if steps(run) else 0
    published = [path.name for path in (run / "checkpoints").glob("*")]
    assert published == ([f"step-{last}"] if last else [])
    return last


@pytest.mark.parametrize("kind", ["term", pytest.param("int", marks=pytest.mark.thorough)])
def test_a_signal_in_a_step_leaves_its_checkpoint_and_the_same_command_ends_to_the_same_bytes(
    kind: Kind, whole: Whole, figure: Callable[[str], None]
) -> None:
    run = whole.disk.root / f"stopped by {kind}"
    fault = Fault(kind, at=whole.logging(3), below=run / "events.jsonl")
    outcome = whole.same(run.name, fault)
    last = was_stopped(outcome, run)
    assert 3 <= last <= 5
    again = whole.same(run.name)
    assert again.returncode == 0, again.stderr
    ended_as(whole.run, run)
    figure(f"checkpoint of step {last} for a signal in step 3")


def moments(whole: Whole, thorough: bool) -> list[tuple[str, int]]:
    """Files, and which operation on them a signal comes with."""
    few = [(".lock", 1), (".tmp-delivery", 9)]
    if not thorough:
        return few
    more = [("prepared/000.png", 1), ("checkpoints", 5), ("result.json", 1)]
    return few + more + [("events.jsonl", n) for n in range(1, 60, 15)]


def test_a_signal_at_any_other_time_ends_the_run_in_order_and_the_same_command_ends_it(
    whole: Whole, thorough: bool, figure: Callable[[str], None]
) -> None:
    chosen = moments(whole, thorough)
    codes = []
    for turn, (name, at) in enumerate(chosen):
        run = whole.disk.root / f"any time {turn}"
        outcome = whole.same(run.name, Fault("term", at=at, below=run / name))
        assert outcome.returncode in (0, STOPPED), outcome.stderr
        assert TRACE not in outcome.stderr
        assert json.loads((run / "result.json").read_bytes())["exit_code"] == outcome.returncode
        codes.append(outcome.returncode)
        if outcome.returncode:
            assert whole.same(run.name).returncode == 0
        assert results(run) == results(whole.run)
    assert codes[:2] == [STOPPED, STOPPED]
    figure(f"{len(codes)} moments, {codes.count(STOPPED)} stopped and gone on with")


@pytest.fixture(scope="module")
def with_readers(whole: Whole) -> Whole:
    """The same with processes that read pictures; figures are read every ten steps."""

    def arguments(folder: Path, **leaves: object) -> list[str]:
        own = {"max_train_steps": 16, "checkpointing_steps": 7, "checkpoints_total_limit": 1}
        reading = {"report_steps": 10, "cache_latents": False, "num_workers": 2}
        return whole.arguments(folder, **{**own, **reading, **leaves})

    return Whole(whole.disk, arguments, whole.disk.root / "with readers").ended()


def test_a_repeated_sigterm_changes_nothing_and_steps_end_within_two(
    with_readers: Whole, figure: Callable[[str], None]
) -> None:
    run = with_readers.disk.root / "five times"
    # Between two readings of figures.
    fault = Fault("term", below=run / "checkpoints" / ".tmp-7")
    running = with_readers.disk.start(with_readers.arguments(run), fault)
    while not list((run / "checkpoints").glob("*7")):
        time.sleep(0.001)
    for _ in range(4):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    last = was_stopped(running.wait(), run)
    assert 7 <= last <= 9
    again = with_readers.same(run.name)
    assert again.returncode == 0, again.stderr
    assert f"goes on after step {last}" in again.stderr
    ended_as(with_readers.run, run)
    figure(f"{last - 7} steps after the first of five signals, then equal bytes")


def test_a_second_ctrl_c_ends_a_training_at_once_with_its_readers_and_it_goes_on_to_equal_bytes(
    with_readers: Whole, figure: Callable[[str], None]
) -> None:
    run = with_readers.disk.root / "twice"
    # In the reading after step 10: the second one comes at the next operation.
    fault = Fault("int", at=with_readers.logging(9), below=run / "events.jsonl", twice=True)
    outcome = with_readers.same(run.name, fault)
    assert outcome.returncode == -signal.SIGINT, outcome.stderr
    assert TRACE not in outcome.stderr
    assert not outcome.has_processes()
    assert steps(run) == steps(with_readers.run)[:8]
    again = with_readers.same(run.name)
    assert again.returncode == 0, again.stderr
    assert "goes on after step 7" in again.stderr
    ended_as(with_readers.run, run)
    figure("no step and no process more, then equal bytes")


def test_a_signal_to_the_whole_group_leaves_readers_of_pictures_alive_until_the_checkpoint(
    whole: Whole, figure: Callable[[str], None]
) -> None:
    run = whole.disk.root / "group"
    leaves = {"max_train_steps": LONG, "cache_latents": False, "num_workers": 2}
    running = whole.disk.start(whole.arguments(run, **leaves))
    wait_for_step(run, 2)
    os.killpg(running.pid, signal.SIGTERM)
    outcome = running.wait()
    last = was_stopped(outcome, run)
    assert not outcome.has_processes()
    figure(f"checkpoint of step {last}, no process left")


def test_talk_that_nobody_can_read_changes_no_exit_code(figure: Callable[[str], None]) -> None:
    # As where `tee` was ended by the same Ctrl-C, and where a log is on a full disk.
    reading, closed = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        for unread in (closed, full.fileno()):
            refused = subprocess.run(
                [sys.executable, "-m", "trainer", "train", "--rank", "0"],
                cwd=Path(__file__).parent.parent.parent,
                stderr=unread,
                timeout=60,
                check=False,
            )
            assert refused.returncode == InputError.exit_code
            shown = Console(file=Unfailing(os.dup(unread)))
            shown.print("words")
            assert shown.file.isatty() is False
    os.close(closed)
    figure("a closed pipe and a full disk")


# What torch computes, Python does not interrupt: a digest of many rounds stands for it.
BUSY = """
import hashlib, sys
from trainer.runner import stop_on_signals
with stop_on_signals() as stop:
    print("begun", flush=True)
    while not stop():
        pass
    print("wished", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_ctrl_c_ends_at_once_in_the_middle_of_a_computation(
    figure: Callable[[str], None],
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "wished\n"
    time.sleep(0.1)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    took = time.monotonic() - asked
    # A shell shows the end by this signal as 130.
    assert process.returncode == -signal.SIGINT
    assert said == ""
    assert took < 1
    figure(f"{took:.2f} s")


def test_the_first_process_of_a_container_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    child = os.fork()
    if child == 0:
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert runner._ending() != signal.SIG_DFL
    figure("exit 130")


@pytest.mark.parametrize(("before", "wished"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_is_a_wish_to_stop_unless_nohup_says_otherwise(
    before: signal.Handlers, wished: bool, figure: Callable[[str], None]
) -> None:
    earlier = signal.signal(signal.SIGHUP, before)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() is wished
        assert signal.getsignal(signal.SIGHUP) == before
        figure("a wish to stop" if wished else "not heard")
    finally:
        signal.signal(signal.SIGHUP, earlier)
