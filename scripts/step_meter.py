"""Follows the steps of a training from outside: when each ends, and what the GPU does in some.

Steps pass through four parts: those that warm up; timed ones, in which nothing is waited for;
some before which the GPU is waited for, so that what they take is what the host takes to start
their work; and some in which every kernel is seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trainer.readings import Readings

# Steps that still pay for allocations, compiled kernels and the capture of a graph.
WARM_UP_STEPS = 6
TIMED_STEPS = 20
HOST_STEPS = 5
SEEN_STEPS = 3


@contextmanager
def after_each_step(call: Callable[[], None]) -> Iterator[None]:
    """Calls at the end of each step of the engine, when all its work is on its way."""
    keep = Readings.take

    def take(readings: Readings, *figures: Any, **named: Any) -> None:
        keep(readings, *figures, **named)
        call()

    with patch.object(Readings, "take", take):
        yield


@dataclass
class Meter:
    """The figures of a training's steps.

    Args:
        timed: how many are timed.
        warm_up: how many come before these.
    """

    timed: int = TIMED_STEPS
    warm_up: int = WARM_UP_STEPS
    ended: int = 0
    _marks: list[Any] = field(default_factory=list)
    _host_ms: list[float] = field(default_factory=list)
    _started: float = 0.0
    _profile: profile | None = None
    _kernels: list[tuple[float, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps it needs."""
        return self.warm_up + self.timed + HOST_STEPS + SEEN_STEPS

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hears of the end of each step that trainings inside of this take."""
        with after_each_step(self.end_step):
            yield

    def end_step(self) -> None:
        """Hears that all work of a step is on its way to the device."""
        self.ended += 1
        timed = self.ended - self.warm_up
        if 0 <= timed <= self.timed:
            self._marks.append(_mark())
        seen = timed - self.timed - HOST_STEPS
        if timed > self.timed and seen <= 0:
            self._host_ms.append((time.perf_counter() - self._started) * 1e3)
        if timed < self.timed:
            return
        _wait()
        if seen == 0:
            self._watch()
        elif seen == SEEN_STEPS:
            self._look()
        self._started = time.perf_counter()

    def _watch(self) -> None:
        if torch.cuda.is_available():
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()

    def _look(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._kernels = [
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            # Names of what the host does are shown on the GPU too.
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]

    def figures(self) -> dict[str, Any]:
        """What the steps took, in ms; of kernels, copies and fills of memory included."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        each = [_ms_between(*pair) for pair in pairs]
        told: dict[str, Any] = {
            **summary(each),
            "each_ms": [round(ms, 3) for ms in each],
            "host_ms": statistics.median(self._host_ms),
        }
        if self._kernels:
            busy = covered(self._kernels) / 1e3 / SEEN_STEPS
            told |= {
                "kernels": len(self._kernels) / SEEN_STEPS,
                "busy_ms": busy,
                "busy_share": min(1.0, busy / told["step_ms"]),
            }
        return told


def summary(each: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and mean of times."""
    first, _, third = statistics.quantiles(each, method="inclusive")
    return {
        "step_ms": statistics.median(each),
        "quartiles_ms": [first, third],
        "mean_ms": statistics.fmean(each),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of all that is in at least one of the spans."""
    length, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


def _mark() -> Any:
    """Now, on the device's own clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms_between(earlier: Any, later: Any) -> float:
    if isinstance(earlier, float):
        return (later - earlier) * 1e3
    return float(earlier.elapsed_time(later))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
