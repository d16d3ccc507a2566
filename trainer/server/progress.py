"""What a training has said so far, as clients of services are told: lines, share, time left.

Reads `events.jsonl` as it grows. Lines are only ever added, about a hundred for all steps
together: clients ask for all of them ten times a second.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Level = Literal["DEBUG", "INFO", "WARN", "ERROR"]
Event = Mapping[str, Any]

_LINES_OF_STEPS = 100
_REMEMBERED = 256
_LEVELS: Mapping[str, Level] = {"warning": "WARN", "ignored": "WARN"}


@dataclass(frozen=True)
class LogLine:
    """One line of a job's log.

    Args:
        time: ISO 8601, in UTC.
        level: how grave it is.
        message: the text.
    """

    time: str
    level: Level
    message: str


@dataclass
class Progress:
    """How far a job is.

    Args:
        lines: of its log.
        step: optimizer steps done, or pictures made.
        total: of all.
        seconds_of_steps: that are left, by the pace of the latest. None: not known yet.
        seconds_of_pictures: that are left on the way, by the pace of the latest.
    """

    lines: list[LogLine] = field(default_factory=list)
    step: int = 0
    total: int = 0
    seconds_of_steps: float | None = None
    seconds_of_pictures: float = 0.0

    @property
    def share(self) -> float:
        """What is done of all, 0 to 1."""
        return min(1.0, self.step / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, with the pictures on the way. None: not known yet."""
        steps = self.seconds_of_steps
        return None if steps is None else steps + self.seconds_of_pictures


@dataclass
class _Reading:
    progress: Progress = field(default_factory=Progress)
    position: int = 0
    stage: str = ""
    file: int = 0
    chosen: Collection[str] | None = None


class ProgressReader:
    """Follows the event logs of many jobs; safe to be asked from several threads."""

    def __init__(self) -> None:
        self._readings: OrderedDict[Path, _Reading] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, events: Path, chosen: Callable[[], Collection[str] | None] = lambda: None
    ) -> Progress:
        """What a log says up to now.

        Args:
            events: the file, which need not be there yet.
            chosen: gives the options that somebody set on purpose, asked once: of others nobody
                wants to read that they have no effect. None: all deserve a line.
        """
        with self._lock:
            if events not in self._readings:
                self._readings[events] = _Reading(chosen=chosen())
            reading = self._readings[events]
            self._readings.move_to_end(events)
            if len(self._readings) > _REMEMBERED:
                self._readings.popitem(last=False)
            self._follow(events, reading)
            return replace(reading.progress, lines=list(reading.progress.lines))

    def _follow(self, events: Path, reading: _Reading) -> None:
        try:
            state = events.stat()
        except FileNotFoundError:
            return
        size = state.st_size
        if size < reading.position or state.st_ino != reading.file:
            # A run that goes on from a checkpoint takes back what it said after it: in a new file.
            reading.position, reading.stage, reading.progress = 0, "", Progress()
            reading.file = state.st_ino
        if size == reading.position:
            return
        with open(events, "rb") as file:
            file.seek(reading.position)
            whole = file.read(size - reading.position).rpartition(b"\n")[0]
        reading.position += len(whole) + 1 if whole else 0
        for line in whole.split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                # What a loss of power left of a line.
                continue
            if isinstance(event, dict) and "event" in event:
                _take(event, reading)


def _take(event: Event, reading: _Reading) -> None:
    text = _TEXTS.get(event["event"], _nothing)(event, reading)
    if text:
        moment = datetime.fromtimestamp(event.get("time", 0), UTC).isoformat()
        level = _LEVELS.get(event.get("note", ""), "INFO")
        reading.progress.lines.append(LogLine(moment, level, text))


def _nothing(event: Event, reading: _Reading) -> str:
    return ""


def _of_run(event: Event, reading: _Reading) -> str:
    progress = reading.progress
    progress.step, progress.total = event["start_step"], event["total_steps"]
    goes_on = f", going on from step {progress.step}" if progress.step else ""
    pictures = event["num_pictures"] or event["num_examples"]
    return f"Training {progress.total} steps on {pictures} pictures{goes_on}"


def _of_stage(event: Event, reading: _Reading) -> str:
    stage, done, total = event["stage"], event["done"], event["total"]
    if stage == "generate":
        reading.progress.step, reading.progress.total = done, total
    if stage == reading.stage and done < total:
        return ""
    began = stage != reading.stage
    reading.stage = stage if done < total else ""
    return f"{stage}: {done} of {total}" if began or done == total else ""


def _of_step(event: Event, reading: _Reading) -> str:
    progress, step = reading.progress, event["step"]
    progress.step = step
    seconds = event["seconds"]
    if seconds is not None:
        # The pace changes at the pivot and when other programs come and go: the latest counts.
        left = seconds * (progress.total - step)
        before = progress.seconds_of_steps
        progress.seconds_of_steps = left if before is None else 0.9 * before + 0.1 * left
    every = max(1, progress.total // _LINES_OF_STEPS)
    if step % every and step not in (1, progress.total):
        return ""
    return f"step {step} of {progress.total}, loss {event['loss'] or 0:.4f}"


def _of_sample(event: Event, reading: _Reading) -> str:
    # A log of an earlier version does not tell them.
    reading.progress.seconds_of_pictures = event.get("seconds", 0.0) * event.get("left", 0)
    return ""


def _of_phase(event: Event, reading: _Reading) -> str:
    frozen = f", frozen: {', '.join(event['frozen'])}" if event["frozen"] else ""
    return f"learning: {', '.join(event['learning'])}{frozen}"


def _of_note(event: Event, reading: _Reading) -> str:
    field, chosen = event["field"], reading.chosen
    if field == "validation_prompts":
        # It tells that no more pictures are made on the way.
        reading.progress.seconds_of_pictures = 0.0
    is_wanted = chosen is None or field in chosen or field.startswith("request.")
    if event["note"] == "ignored" and not is_wanted:
        return ""
    return f"{event['note']}: {event['field']} {event['message']}"


def _of_file(event: Event, reading: _Reading) -> str:
    return f"wrote {event['path']}"


def _of_verify(event: Event, reading: _Reading) -> str:
    return f"{event['path']} read by {event['reader']}: {event['status']}"


_TEXTS: Mapping[str, Callable[[Event, _Reading], str]] = {
    "run": _of_run,
    "stage": _of_stage,
    "step": _of_step,
    "sample": _of_sample,
    "phase": _of_phase,
    "note": _of_note,
    "file": _of_file,
    "verify": _of_verify,
}
