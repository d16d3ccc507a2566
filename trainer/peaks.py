"""The most memory that each part of a training took, as torch and the system counted it anyway."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.events import Event, MemoryEvent, RunEvent, StageEvent, StepEvent

PREPARING, STEPS, DELIVERY = "preparing", "steps", "delivery"

# Of one part, in bytes: `tensors` and `reserved` for them on a GPU, `process` in the computer's
# memory, which is counted from the beginning of the process.
Peak = dict[str, int]


def telling_peaks(events: Iterator[Event], *, apart: str) -> Iterator[Event]:
    """The events of a training, and after the last of them what each of its parts took.

    Args:
        events: of the whole training.
        apart: stage of preparing that is a part by itself.
    """
    peaks: dict[str, Peak] = {}
    part, total_steps = PREPARING, 0
    _begin()
    for event in events:
        if isinstance(event, RunEvent):
            total_steps = event.total_steps
        entered = _entered(event, part, total_steps, apart)
        if entered != part:
            _add(peaks, part)
            part = entered
        yield event
    _add(peaks, part)
    yield MemoryEvent(peaks)


def process_peak() -> int:
    """The most bytes of the computer's memory that this process had at once."""
    status = Path("/proc/self/status")
    # A process starts with its parent's peak in `ru_maxrss`.
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _entered(event: Event, part: str, total_steps: int, apart: str) -> str:
    """The part that an event is the first of, or else the same as before it."""
    match event:
        case RunEvent():
            return STEPS if event.start_step < total_steps else DELIVERY
        case StepEvent(step=step) if step == total_steps:
            return DELIVERY
        case StageEvent(stage=stage) if part in (PREPARING, apart):
            return apart if stage == apart else PREPARING
        case _:
            return part


def _begin() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _add(peaks: dict[str, Peak], part: str) -> None:
    """Reads what was taken in a part, which may have been interrupted by another, and begins."""
    peak = {"process": process_peak()}
    if torch.cuda.is_available():
        peak["tensors"] = torch.cuda.max_memory_allocated()
        peak["reserved"] = torch.cuda.max_memory_reserved()
    earlier = peaks.get(part, {})
    peaks[part] = {kind: max(size, earlier.get(kind, 0)) for kind, size in peak.items()}
    _begin()
