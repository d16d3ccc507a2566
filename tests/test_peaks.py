"""How much memory the parts of a training took: told once, at its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from trainer import peaks
from trainer.events import Event, MemoryEvent, RunEvent, StageEvent, StepEvent
from trainer.peaks import process_peak, telling_peaks

MADE = "class images"
Take = Callable[[int], None]


def step(number: int) -> StepEvent:
    return StepEvent(
        number, 0, loss=0.0, learning_rate=0.0, grad_norm=0.0, seconds=0.0, smoothed_loss=0.0
    )


def told(events: Iterator[Event]) -> dict[str, dict[str, int]]:
    *_, last = telling_peaks(events, apart=MADE)
    assert isinstance(last, MemoryEvent)
    return last.peaks


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Take:
    """A GPU of which somebody takes memory, and gives it back."""
    most = [0]

    def taken(size: int) -> None:
        most[0] = max(most[0], size)

    def forget() -> None:
        most[0] = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: most[0] + 1)
    return taken


def test_what_each_part_took_of_a_gpu_is_told_at_the_end(take: Take) -> None:
    def training() -> Iterator[Event]:
        take(5)
        yield StageEvent("prepare", 1, 1)
        yield StageEvent(MADE, 0, 1)
        take(9)
        yield StageEvent(MADE, 1, 1)
        yield StageEvent("encode captions", 0, 1)
        take(4)
        yield RunEvent(0, 2, 1, 1, {})
        for number in (1, 2):
            take(6 + number)
            yield StageEvent("encode captions", 1, 1)
            yield step(number)
        take(3)
        yield StageEvent("verify", 1, 1)

    parts = {"preparing": 5, MADE: 9, "steps": 8, "delivery": 3}
    found = told(training())
    assert {part: peak["tensors"] for part, peak in found.items()} == parts
    assert {part: peak["reserved"] - 1 for part, peak in found.items()} == parts


def test_a_training_that_has_all_its_steps_goes_on_with_delivery(take: Take) -> None:
    assert list(told(iter([RunEvent(2, 2, 1, 1, {})]))) == ["preparing", "delivery"]


def test_what_a_processor_took_is_told_in_every_part() -> None:
    found = told(iter([RunEvent(0, 1, 1, 1, {}), step(1)]))
    assert list(found) == ["preparing", "steps", "delivery"]
    assert all(peak.keys() == {"process"} for peak in found.values())
    assert 2**20 < found["steps"]["process"] <= process_peak()


def test_nothing_is_read_in_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    monkeypatch.setattr(peaks, "process_peak", lambda: reads.append(1) or 1)  # type: ignore[func-returns-value]
    told(iter([RunEvent(0, 50, 1, 1, {}), *map(step, range(1, 51))]))
    assert len(reads) == 3


def test_a_processs_peak_holds_what_it_once_had() -> None:
    code = (
        "from trainer.peaks import process_peak; before = process_peak(); "
        "bytearray(2**26).count(1); print(process_peak() - before)"
    )
    # Another process: what this one once had may be larger.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == pytest.approx(2**26, rel=0.1)
