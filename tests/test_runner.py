"""The run folder from outside: lock, signals, listeners, and the result as the last act."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from trainer import cli, seal
from trainer.config import TrainingConfig
from trainer.errors import (
    CheckpointError,
    DiskError,
    InputError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    TrainerError,
    VerificationError,
)
from trainer.events import Event, FileEvent, MemoryEvent, RunEvent, StageEvent, StepEvent
from trainer.job import Result, RunFolder
from trainer.launchers import EXIT_CODE_FILE
from trainer.listeners import EventLog, Summary
from trainer.runner import Events, stop_on_signals, supervise, way_on

BEGIN = RunEvent(0, 3, 1, 5, {})


def step(number: int) -> StepEvent:
    return StepEvent(number, 0, 0.5, 1e-4, 1.0, 0.1, 0.0)


def never() -> bool:
    return False


def finishing(_: TrainingConfig, folder: RunFolder, stop: Callable[[], bool]) -> Iterator[Event]:
    """An engine that takes three steps and writes one file."""
    yield BEGIN
    for number in (1, 2, 3):
        yield step(number)
    folder.outputs.mkdir()
    (folder.outputs / "lora.safetensors").write_bytes(b"12345")
    yield FileEvent("diffusers_lora", "outputs/lora.safetensors")


def telling(*events: Event) -> Callable[..., Iterator[Event]]:
    """An engine that says these events."""

    def engine(*_: object) -> Iterator[Event]:
        yield from events

    return engine


def run(folder: RunFolder, engine: Callable[..., Iterator[Event]] = finishing) -> Result:
    return supervise(TrainingConfig(), folder, [EventLog(folder)], engine=engine, stop=never)


def test_a_finished_run_names_its_files_with_their_sizes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    result = run(folder)

    assert (result.status, result.exit_code, result.step, result.total_steps) == ("done", 0, 3, 3)
    assert [(file.path, file.size) for file in result.files] == [("outputs/lora.safetensors", 5)]
    assert folder.read_result() == result


def test_a_result_has_the_most_memory_of_each_part(tmp_path: Path) -> None:
    peaks = {"steps": {"process": 5}}
    result = run(RunFolder(tmp_path / "run"), telling(BEGIN, MemoryEvent(peaks)))
    assert result.peak_memory == peaks


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (VerificationError("x"), 1),
        (InputError.of("rank", "x"), 2),
        (NonFiniteError("x"), 3),
        (OutOfMemoryError("x"), 4),
        (DiskError("x"), 5),
        (CheckpointError("x"), 6),
        (Interrupted("x"), 75),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_every_kind_of_failure_leaves_a_result_with_its_exit_code(
    tmp_path: Path, error: TrainerError, code: int
) -> None:
    def failing(*_: object) -> Iterator[Event]:
        yield BEGIN
        yield step(1)
        raise error

    folder = RunFolder(tmp_path)

    result = run(folder, failing)

    assert result.exit_code == code
    assert (result.error_kind, result.step) == (error.kind, 1)
    assert result.status == ("interrupted" if code == 75 else "failed")
    assert folder.read_result() == result


def refusing(error: TrainerError, *before: Event) -> Callable[..., Iterator[Event]]:
    """An engine that says something and then refuses what it was given, before it begins."""

    def engine(*_: object) -> Iterator[Event]:
        yield from before
        raise error

    return engine


READING = StageEvent("read", 1, 5)


@pytest.mark.parametrize("error", [InputError.of("rank", "x"), CheckpointError("x")], ids=repr)
def test_a_refused_run_leaves_the_result_of_the_finished_one(
    tmp_path: Path, error: TrainerError
) -> None:
    folder = RunFolder(tmp_path / "run")
    run(folder)
    folder.answer("fal").write_text("{}")
    before = folder.result.read_bytes()

    refused = run(folder, refusing(error, READING))

    assert refused.exit_code == error.exit_code
    assert folder.result.read_bytes() == before
    assert folder.answer("fal").exists()


def test_a_run_that_begins_removes_the_earlier_result_and_answer_before_its_first_step(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    run(folder)
    folder.answer("fal").write_text("{}")

    def looking(*_: object) -> Iterator[Event]:
        assert folder.result.exists()
        yield BEGIN
        assert not folder.result.exists()
        assert not folder.answer("fal").exists()
        yield step(1)

    run(folder, looking)


def test_bad_input_leaves_no_new_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "me")

    result = run(folder, refusing(InputError.of("rank", "x"), READING))

    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_a_folder_of_before_with_a_result(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)

    result = run(folder, refusing(InputError.of("rank", "x")))

    assert folder.read_result() == result
    assert (tmp_path / "notes.txt").exists()


def test_other_failures_before_the_beginning_are_kept_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    result = run(folder, refusing(OutOfMemoryError("x"), READING))

    assert folder.read_result() == result


@pytest.mark.parametrize(
    ("environment", "called", "expected"),
    [
        ({}, "/bin/trainer", "trainer train 'my photos.yaml'"),
        ({}, "/trainer/__main__.py", "python -m trainer train 'my photos.yaml'"),
        ({"WORLD_SIZE": "2"}, "/trainer/__main__.py", "… -m trainer train 'my photos.yaml'"),
        ({"TORCHELASTIC_RUN_ID": "1"}, "/bin/trainer", "… trainer train 'my photos.yaml'"),
    ],
    ids=str,
)
def test_the_way_on_is_the_command_and_a_launcher_is_mentioned(
    environment: dict[str, str], called: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [called, "train", "my photos.yaml"])

    sentence, command = way_on()

    assert command == expected
    assert ("same launcher command" in sentence) is bool(environment)


def test_a_bug_leaves_no_result_that_would_look_like_an_ending(tmp_path: Path) -> None:
    def buggy(*_: object) -> Iterator[Event]:
        yield BEGIN
        raise ZeroDivisionError

    folder = RunFolder(tmp_path)
    folder.write_result(Result(status="interrupted", exit_code=75))

    with pytest.raises(ZeroDivisionError):
        run(folder, buggy)

    assert folder.read_result() is None


def test_the_result_is_written_after_everything_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    seen: list[bool] = []

    class Watcher(Summary):
        def __exit__(self, *_: object) -> None:
            seen.append(folder.result.exists())

    supervise(TrainingConfig(), folder, [Watcher()], engine=finishing, stop=never)

    assert seen == [False]
    assert folder.result.exists()


def test_a_second_training_in_the_same_folder_is_refused_and_disturbs_nothing(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(Result(status="done", exit_code=0))
    before = folder.result.read_bytes()

    with folder.lock(), pytest.raises(InputError, match="another training is running"):
        run(folder)

    assert folder.result.read_bytes() == before
    assert not folder.events.exists()


def test_the_other_processes_of_a_training_are_silent_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepping(*_: object) -> Iterator[Event]:
        yield BEGIN
        yield step(1)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    result = run(RunFolder(tmp_path / "run"), stepping)

    assert result.exit_code == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_to_stop(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        before = stop()
        os.kill(os.getpid(), number)
        after = stop()

    assert (before, after) == (False, True)


def test_where_no_result_can_be_written_the_first_failure_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def failing(*_: object) -> Iterator[Event]:
        yield BEGIN
        (folder.result / "in the way").mkdir(parents=True)
        raise NonFiniteError("loss nan")

    assert run(folder, failing).exit_code == NonFiniteError.exit_code


def test_a_result_that_cannot_be_written_is_a_failure_of_a_training_without_another(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)

    def blocking(*_: object) -> Iterator[Event]:
        yield BEGIN
        (folder.result / "in the way").mkdir(parents=True)

    with pytest.raises(DiskError, match="result.json"):
        run(folder, blocking)


def test_a_repeated_sigterm_changes_nothing() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

        assert stop()


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)

    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)

    assert signal.getsignal(signal.SIGINT) is before


class Failing(Summary):
    """A listener that cannot write down a step."""

    def hear(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            raise DiskError("`events.jsonl` could not be written: the disk is full")


@pytest.mark.parametrize("is_sealed", [False, True])
def test_an_engine_ends_of_what_keeps_a_listener_from_hearing(
    is_sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BaseException] = []

    def watching(*_: object) -> Events:
        try:
            yield BEGIN
            yield step(1)
        except BaseException as error:
            seen.append(error)
            raise

    folder, config = RunFolder(tmp_path), TrainingConfig()
    # It would keep the network from all later tests.
    monkeypatch.setattr(seal, "seal", lambda: None)
    engine = seal.sealed(watching, config) if is_sealed else watching

    result = supervise(config, folder, [Failing()], engine=engine, stop=never)

    assert [type(error) for error in seen] == [DiskError]
    assert (result.error_kind, result.exit_code) == ("disk", DiskError.exit_code)


def test_an_engine_that_ends_of_something_else_then_has_the_word(tmp_path: Path) -> None:
    def knowing(*_: object) -> Events:
        yield BEGIN
        try:
            yield step(1)
        except DiskError as error:
            raise NonFiniteError("another process ended first") from error

    result = supervise(
        TrainingConfig(), RunFolder(tmp_path), [Failing()], engine=knowing, stop=never
    )

    assert result.error_kind == NonFiniteError.kind


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_engine_that_ends_of_nothing_hides_no_failure(goes_on: bool, tmp_path: Path) -> None:
    def stubborn(*_: object) -> Events:
        yield BEGIN
        with suppress(DiskError):
            yield step(1)
        if goes_on:
            yield step(2)

    result = supervise(
        TrainingConfig(), RunFolder(tmp_path), [Failing()], engine=stubborn, stop=never
    )

    assert (result.error_kind, result.step) == (DiskError.kind, 0)


def test_a_resumed_run_logs_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run(folder, telling(BEGIN, step(1), step(2)))

    run(folder, telling(RunEvent(1, 3, 1, 5, {}), step(2), step(3)))

    steps = [event["step"] for event in folder.read_events() if event["event"] == "step"]
    assert steps == [1, 2, 3]


def test_a_log_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    whole = json.dumps(step(1).as_dict())
    folder.events.write_text(f'{whole}\n{{"event": "run", "details": {{}}')

    run(folder, telling(RunEvent(1, 3, 1, 5, {}), step(2)))

    lines = folder.events.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["step", "run", "step"]


def test_a_first_ctrl_c_shows_the_terminals_cursor_again() -> None:
    # The second one ends the program while a progress bar still hides it.
    terminal, screen = os.openpty()
    real = os.dup(2)
    os.dup2(screen, 2)
    try:
        with stop_on_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(real, 2)
        os.close(real)
        os.close(screen)
    with open(terminal, "rb", buffering=0) as shown:
        assert shown.read(20) == b"\x1b[?25h"


def test_a_signal_while_a_finished_run_is_told_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unheard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))

    def paper() -> Console:
        signal.raise_signal(signal.SIGTERM)
        return Console()

    monkeypatch.setattr(cli, "_engine", finishing)
    monkeypatch.setattr(cli, "paper", paper)
    try:
        code = cli.run(["train", "--images-data-url", ".", "--output", str(tmp_path / "run")])
    finally:
        signal.signal(signal.SIGTERM, before)

    assert (code, unheard) == (0, [])
    assert "Files are in" in capsys.readouterr().out


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where the package is, with signals as a terminal leaves them."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # What runs in the background of a shell ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


# A signal comes after the command, while Python ends.
AT_THE_END = """
import atexit, os, signal
from trainer.cli import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
main()
"""


def test_a_signal_while_python_ends_leaves_the_exit_code() -> None:
    refused = python("-c", AT_THE_END, "train", "--rank", "0", "--json")

    assert refused.returncode == InputError.exit_code
    assert json.loads(refused.stdout)["error_kind"] == InputError.kind


def test_ctrl_c_while_the_program_loads_ends_it_with_one_line(tmp_path: Path) -> None:
    # Stands for a library that takes its time.
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    told = tmp_path / "told"
    told.touch()
    variables = {"PYTHONPATH": str(tmp_path), EXIT_CODE_FILE: str(told)}

    done = python("-m", "trainer", "version", **variables)

    assert (done.returncode, told.read_text()) == (130, "130 0\n")
    assert done.stderr == "stopped at once; nothing was begun\n"
