"""Stages: generators that say events on their way to a value, and what can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from trainer.events import Event

Value = TypeVar("Value")


def drained(stage: Generator[Event, None, Value]) -> Value:
    """The value of a stage that nobody listens to."""
    while True:
        try:
            next(stage)
        except StopIteration as end:
            value: Value = end.value
            return value


def retold(
    stage: Generator[Event, None, Value], tell: Callable[[Event], Iterable[Event]]
) -> Generator[Event, None, Value]:
    """A stage that says other events for each of its own.

    Args:
        tell: what is said for an event; taken one by one, so that it may also act in between.
    """
    while True:
        try:
            event = next(stage)
        except StopIteration as end:
            value: Value = end.value
            return value
        yield from tell(event)
