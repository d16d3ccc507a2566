"""Generators that say events on their way to a value."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from trainer.events import Event, StageEvent
from trainer.stages import drained, retold


def counting(total: int) -> Generator[Event, None, str]:
    """Counts, and ends with a word."""
    for done in range(1, total + 1):
        yield StageEvent("count", done, total)
    return "counted"


def even(event: Event) -> Iterator[Event]:
    assert isinstance(event, StageEvent)
    if event.done % 2 == 0:
        yield event


def test_a_stage_that_nobody_listens_to_has_its_value() -> None:
    assert drained(counting(3)) == "counted"


def test_a_retold_stage_says_what_is_told_and_keeps_its_value() -> None:
    said = []

    def listening() -> Iterator[Event]:
        said.append((yield from retold(counting(5), even)))

    assert [event.done for event in listening() if isinstance(event, StageEvent)] == [2, 4]
    assert said == ["counted"]


def test_what_is_raised_after_an_event_ends_the_stage() -> None:
    def stopped(event: Event) -> Iterator[Event]:
        yield event
        raise KeyboardInterrupt

    stage = retold(counting(5), stopped)

    assert next(stage) == StageEvent("count", 1, 5)
    with pytest.raises(KeyboardInterrupt):
        next(stage)
