"""What watches a training: each takes the same stream of events and shows or keeps it.

Knows events and the run folder, nothing of how a training works.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection
from functools import singledispatchmethod
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from trainer.config import LEAVES
from trainer.durable import disk_errors
from trainer.events import (
    VALIDATION_LOSS,
    CheckpointEvent,
    Event,
    FileEvent,
    MeasuresEvent,
    NoteEvent,
    PhaseEvent,
    PublishedEvent,
    RunEvent,
    SampleEvent,
    StageEvent,
    StepEvent,
    VerifyEvent,
)
from trainer.job import Result, RunFolder

TRAINING = "train"
# The option of pictures on the way: a note on it tells that no more are made.
PICTURES = "validation_prompts"


class Listener(Protocol):
    """Hears every event of a run between entering and leaving its `with` block."""

    def hear(self, event: Event) -> None:
        """Takes one event; events it does not care for are ignored."""

    def __enter__(self) -> Self:
        """Begins to listen."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts away what it holds, however the run ended."""


class Quiet:
    """A listener that holds nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class EarlierResult(Quiet):
    """Removes the result of an earlier run in the folder as soon as a new one begins."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def hear(self, event: Event) -> None:
        """Waits for the beginning: what is refused before it leaves the earlier result."""
        if isinstance(event, RunEvent):
            self._folder.forget_result()


class EventLog(Quiet):
    """Appends every event to `events.jsonl`, each step once however often a run is resumed."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        """Begins to listen; a line that a crash cut short is dropped first."""
        with disk_errors(self._folder.events):
            if self._folder.events.exists():
                written = self._folder.events.read_bytes()
                os.truncate(self._folder.events, written.rfind(b"\n") + 1)
        return self

    def hear(self, event: Event) -> None:
        """Appends the event and its time as one line of JSON; NaN and infinity become null.

        Raises:
            DiskError: the line cannot be written.
        """
        if isinstance(event, RunEvent):
            self._folder.keep_events_through(event.start_step)
        entry = {name: _finite(value) for name, value in event.as_dict().items()}
        line = json.dumps({**entry, "time": round(time.time(), 3)})
        with disk_errors(self._folder.events), open(self._folder.events, "a") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar:
    """Bars on a terminal: one for every stage, and one for the training with loss and ETA.

    Args:
        console: where they are shown.
        explicit: the options set on purpose; that others have no effect is not worth a line.
    """

    def __init__(self, console: Console, explicit: Collection[str] = ()) -> None:
        self._explicit = explicit
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._looking = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """Moves the bar that the event is about."""

    @hear.register
    def _(self, event: StageEvent) -> None:
        self._move(event.stage, event.done, event.total, "")

    @hear.register
    def _(self, event: RunEvent) -> None:
        self._move(TRAINING, event.start_step, event.total_steps, "")

    @hear.register
    def _(self, event: StepEvent) -> None:
        self._move(TRAINING, event.step, None, f"{figures(event)}{self._looking}")

    @hear.register
    def _(self, event: SampleEvent) -> None:
        # The bar's own column knows of steps alone.
        seconds = event.seconds * event.left
        self._looking = f"  + {duration(seconds)} for pictures" if seconds else ""

    @hear.register
    def _(self, event: PhaseEvent) -> None:
        self._progress.console.print(phase_line(event), markup=False, highlight=False)

    @hear.register
    def _(self, event: MeasuresEvent) -> None:
        if line := measures_line(event):
            self._progress.console.print(line, markup=False, highlight=False)

    @hear.register
    def _(self, event: PublishedEvent) -> None:
        self._progress.console.print(published_line(event), markup=False, highlight=False)

    @hear.register
    def _(self, event: NoteEvent) -> None:
        if event.field == PICTURES:
            self._looking = ""
        if deserves_a_line(event.note, event.field, self._explicit):
            self._progress.console.print(note_line(event), markup=False, highlight=False)

    def _move(self, name: str, done: int, total: int | None, text: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(
                name, total=total, completed=done, figures=""
            )
        task = self._tasks[name]
        if total is not None:
            self._progress.update(task, total=total)
        self._progress.update(task, completed=done, figures=text)


class ProgressLines(Quiet):
    """The same where there is no terminal: a line now and then, about twenty in a training."""

    def __init__(self, console: Console, explicit: Collection[str] = ()) -> None:
        self._console = console
        self._explicit = explicit
        self._total = 0
        self._start = 0
        self._seconds = 0.0
        self._looking = 0.0

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """Prints a line if the event deserves one."""

    @hear.register
    def _(self, event: StageEvent) -> None:
        if event.done == event.total:
            self._print(f"{event.stage}: {event.done} of {event.total}")

    @hear.register
    def _(self, event: RunEvent) -> None:
        self._total = event.total_steps
        self._start = event.start_step
        begins = f"goes on after step {event.start_step}" if event.start_step else "begins"
        pictures = f"{event.num_pictures} picture" + ("" if event.num_pictures == 1 else "s")
        sizes = f" at {event.num_sizes} sizes" if event.num_sizes > 1 else ""
        self._print(f"{TRAINING}: {begins}, {event.total_steps} steps in all, {pictures}{sizes}")

    @hear.register
    def _(self, event: StepEvent) -> None:
        self._seconds += event.seconds
        interval = max(1, self._total // 20)
        if event.step % interval == 0 or event.step in (self._start + 1, self._total):
            mean = self._seconds / max(1, event.step - self._start)
            left = duration(mean * (self._total - event.step) + self._looking)
            self._print(f"step {event.step}/{self._total}  {figures(event)}  {left} left")

    @hear.register
    def _(self, event: CheckpointEvent) -> None:
        self._print(f"checkpoint: {event.path}")

    @hear.register
    def _(self, event: MeasuresEvent) -> None:
        if line := measures_line(event):
            self._print(line)

    @hear.register
    def _(self, event: SampleEvent) -> None:
        self._looking = event.seconds * event.left
        self._print(f"picture: {event.path}")

    @hear.register
    def _(self, event: PhaseEvent) -> None:
        self._print(phase_line(event))

    @hear.register
    def _(self, event: PublishedEvent) -> None:
        self._print(published_line(event))

    @hear.register
    def _(self, event: NoteEvent) -> None:
        if event.field == PICTURES:
            self._looking = 0.0
        if deserves_a_line(event.note, event.field, self._explicit):
            self._print(note_line(event))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_for(console: Console, explicit: Collection[str] = ()) -> Listener:
    """Bars on a terminal, lines elsewhere; arguments as for `ProgressBar`."""
    display = ProgressBar if console.is_terminal else ProgressLines
    return display(console, explicit)


def deserves_a_line(note: str, field: str, explicit: Collection[str]) -> bool:
    """Whether people are told of a note: not of options without effect that nobody set."""
    return note != "ignored" or field in explicit or field not in LEAVES


def figures(event: StepEvent) -> str:
    """Loss, learning rate and time of a step, as one line shows them."""
    return f"loss {event.loss:.4f}  lr {event.learning_rate:.3g}  {event.seconds:.2f} s/step"


def note_line(event: NoteEvent) -> str:
    """A note as one line."""
    return f"{event.note}: `{event.field}`: {event.message}"


def measures_line(event: MeasuresEvent) -> str:
    """The loss of held-out pictures as one line; nothing where it is not among the measures."""
    loss = event.values.get(VALIDATION_LOSS)
    return "" if loss is None else f"held-out pictures after step {event.step}: loss {loss:.4f}"


def published_line(event: PublishedEvent) -> str:
    """Where the result is on the hub, and who sees it."""
    who = "private" if event.private else "public"
    return f"on the hub, {who}: {event.url}"


_PARTS = {"denoiser": "the denoiser", "text_encoders": "text encoders", "tokens": "new tokens"}


def phase_line(event: PhaseEvent) -> str:
    """What learns from here on, as one line."""
    learning = ", ".join(_PARTS[part] for part in event.learning)
    frozen = ", ".join(_PARTS[part] for part in event.frozen)
    line = f"from step {event.step + 1} on: {learning} learning"
    return f"{line}; {frozen} frozen" if frozen else line


def duration(seconds: float) -> str:
    """A time span with its two largest units: `2 h 5 min`, `3 min 20 s`, `8 s`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Summary(Quiet):
    """Remembers what was verified, for the table at the end."""

    def __init__(self) -> None:
        self._verdicts: dict[str, list[str]] = {}

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """Takes note of written and verified files."""

    @hear.register
    def _(self, event: FileEvent) -> None:
        self._verdicts.setdefault(event.path, [])

    @hear.register
    def _(self, event: VerifyEvent) -> None:
        self._verdicts.setdefault(event.path, []).append(f"{event.reader}: {event.status}")

    def table(self, result: Result) -> Table:
        """Every result file with its role, size and what each reader said of it."""
        table = Table(title=headline(result), caption=memory_line(result))
        table.add_column("file", overflow="fold")
        table.add_column("role", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("read back by")
        for file in result.files:
            verdicts = "\n".join(self._verdicts.get(file.path, []))
            table.add_row(file.path, file.role, size_text(file.size), verdicts)
        return table


def headline(result: Result) -> str:
    """One line on how a run ended."""
    return f"{result.status}: {result.step} of {result.total_steps} steps"


def memory_line(result: Result) -> str | None:
    """One line on the most memory of each part of a run: the GPU's, where there is one."""
    told = [
        f"{part} {size_text(peak.get('reserved', peak['process']))}"
        for part, peak in result.peak_memory.items()
    ]
    return f"most memory: {', '.join(told)}" if told else None


def size_text(size: int) -> str:
    """A number of bytes as people read it, in powers of 1000."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
