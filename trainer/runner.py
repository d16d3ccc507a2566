"""One training from outside: folder, lock, signals, listeners, and the result as the last act.

Takes the engine as a function that yields events, so that nothing heavy is imported here.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

from trainer.config import TrainingConfig
from trainer.errors import CheckpointError, DiskError, InputError, TrainerError
from trainer.events import (
    Event,
    FileEvent,
    MemoryEvent,
    NoteEvent,
    PublishedEvent,
    RunEvent,
    StepEvent,
)
from trainer.job import Result, ResultFile, Role, RunFolder
from trainer.launchers import end_at_once, is_main_process
from trainer.listeners import EarlierResult, Listener, note_line

# Failures that refuse what was given: before a run begins, they change nothing.
REFUSALS = (InputError.kind, CheckpointError.kind)

# Signals that are a wish to stop.
_WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Makes a terminal's cursor visible.
_CURSOR = b"\x1b[?25h"

# What reading a folder raises in which somebody else has written.
_UNREADABLE = (LookupError, OSError, TypeError, ValueError)

Stop = Callable[[], bool]
Events = Generator[Event, None, None]
Engine = Callable[[TrainingConfig, RunFolder, Stop], Events]


def way_on() -> tuple[str, str]:
    """What goes on with a stopped training: a sentence, and the command as far as it is known.

    A process does not see the launcher that started it; torchrun and accelerate leave these marks.
    """
    called = Path(sys.argv[0])
    is_module = called.name == "__main__.py"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["…", "-m", "trainer"] if is_module else ["…", called.name]
        sentence = "To go on, run the same launcher command again; it ends in:"
    else:
        words = ["python", "-m", "trainer"] if is_module else [called.name]
        sentence = "To go on, run the same command again:"
    return sentence, f"{' '.join(words)} {shlex.join(sys.argv[1:])}"


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turns the first Ctrl-C, every SIGTERM and a closed terminal into a wish to stop.

    The engine asks for it between steps. A second Ctrl-C ends the program at once, wherever it is:
    the system does that itself, as Python would wait for the end of what torch is computing.
    """
    wished = False

    def wish(number: int, _: FrameType | None) -> None:
        nonlocal wished
        wished = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, _ending())
            _show_cursor()

    # Under nohup a closed terminal is no reason to stop.
    heard = [n for n in _WISHES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, wish) for number in heard}
    try:
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hurry_on_signals(code: int) -> None:
    """From here on a wish to stop hurries Python's own end, which takes a while."""
    for number in _WISHES:
        signal.signal(number, lambda *_: os._exit(code))


def _ending() -> Callable[[int, FrameType | None], None] | signal.Handlers:
    """What ends this process at once when a signal comes.

    The system protects the first process of a container from signals that it does not handle.
    """
    if os.getpid() != 1:
        return signal.SIG_DFL
    return lambda number, _: end_at_once(128 + number)


def _show_cursor() -> None:
    """Shows the cursor that a progress bar hides: the next Ctrl-C leaves no time for it."""
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, _CURSOR)


def supervise(
    config: TrainingConfig,
    folder: RunFolder,
    listeners: Sequence[Listener],
    *,
    engine: Engine,
    stop: Stop,
) -> Result:
    """Runs the engine in a locked folder, lets the listeners hear it, and writes `result.json`.

    A run that began gets its report just before. Of several processes only the main one locks,
    speaks and writes. A run that ends before its first step leaves the result of an earlier one; a
    refused one leaves no folder where there was none.

    Raises:
        InputError: another training is running in the folder.
        DiskError: the folder cannot be made, or its result cannot be written.
    """
    tally = Tally(config, folder)
    if not is_main_process():
        return _listen(tally, engine(config, folder, stop), [])
    made = folder.create()
    with folder.lock():
        result = _listen(tally, engine(config, folder, stop), [*listeners, EarlierResult(folder)])
        if made and not tally.began and result.error_kind in REFUSALS:
            folder.take_back(made)
        elif tally.began or folder.read_result() is None:
            try:
                if tally.began:
                    _write_report(folder, result)
            finally:
                _write_result(folder, result)
    return result


def _write_report(folder: RunFolder, result: Result) -> None:
    """Writes the page of a run; where that fails, a warning says so and the run ends as it did."""
    # Pillow is needed at the end of a training, whose start it would hold up.
    from trainer.report.page import write_report  # noqa: PLC0415

    try:
        write_report(folder, result)
    except (TrainerError, *_UNREADABLE) as error:
        reason = error.message if isinstance(error, TrainerError) else repr(error)
        note = NoteEvent("warning", folder.report.name, f"the report was not written: {reason}")
        print(note_line(note), file=sys.stderr)


def _write_result(folder: RunFolder, result: Result) -> None:
    """Says how the run ended; where that cannot be written, the first failure is still told."""
    try:
        folder.write_result(result)
    except DiskError:
        if result.status == "done":
            raise


def watched(events: Iterator[Event], folder: RunFolder, listeners: Sequence[Listener]) -> None:
    """Runs something short of a training in a locked folder, and lets the listeners hear it.

    A refusal leaves no folder where there was none.

    Raises:
        TrainerError: whatever ended it.
    """
    made = folder.create()
    with folder.lock(), ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        try:
            for event in events:
                for listener in listeners:
                    listener.hear(event)
        except InputError:
            if made:
                folder.take_back(made)
            raise


@contextmanager
def result_left(folder: RunFolder) -> Iterator[None]:
    """Something short of a training, at whose end `result.json` says how it ended."""
    try:
        yield
    except TrainerError as error:
        folder.write_result(Result.of_error(error))
        raise
    folder.write_result(Result(status="done", exit_code=0))


class Tally:
    """Counts a run's steps and files, and says how it ended."""

    def __init__(self, config: TrainingConfig, folder: RunFolder) -> None:
        self._began = False
        self._ignored = config.resolved.ignored_options
        self._explicit = config.resolved.explicit
        self._folder = folder
        self._step = 0
        self._total_steps = 0
        self._files: dict[str, Role] = {}
        self._peak_memory: dict[str, dict[str, int]] = {}
        self._published: str | None = None

    @property
    def began(self) -> bool:
        """Whether the run got as far as its first step."""
        return self._began

    def count(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case RunEvent():
                self._began = True
                self._step, self._total_steps = event.start_step, event.total_steps
            case StepEvent():
                self._step = event.step
            case FileEvent():
                self._files[event.path] = cast(Role, event.role)
            case MemoryEvent():
                self._peak_memory = event.peaks
            case PublishedEvent():
                self._published = event.url
            case _:
                pass

    def done(self) -> Result:
        """The result of a run that reached its end."""
        return Result(
            status="done",
            exit_code=0,
            step=self._step,
            total_steps=self._total_steps,
            ignored_options=self._ignored,
            explicit=self._explicit,
            peak_memory=self._peak_memory,
            files=tuple(self._described()),
            published=self._published,
        )

    def failed(self, error: TrainerError) -> Result:
        """The result of a run that ended in an error."""
        return Result.of_error(error, step=self._step, total_steps=self._total_steps)

    def _described(self) -> Iterator[ResultFile]:
        for path, role in self._files.items():
            yield self._folder.describe(role, self._folder.root / path)


def _listen(tally: Tally, events: Events, listeners: Sequence[Listener]) -> Result:
    try:
        with ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener)
            stack.enter_context(closing(events))
            for event in events:
                _tell(event, listeners, events)
                tally.count(event)
    except TrainerError as error:
        return tally.failed(error)
    return tally.done()


def _tell(event: Event, listeners: Sequence[Listener], events: Events) -> None:
    try:
        for listener in listeners:
            listener.hear(event)
    except TrainerError as error:
        end_of(error, events)


def end_of(error: TrainerError, events: Events) -> NoReturn:
    """Ends an engine of what befell who listens to it: it tells this cause to other processes.

    Raises:
        TrainerError: that failure, or the one that the engine makes of it.
    """
    with suppress(StopIteration):
        events.throw(error)
    raise error
