"""Processes that train together go on from one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
from accelerate import Accelerator

from trainer.errors import CheckpointError
from trainer.processes import Processes
from trainer.spread import Spread


class Two(Processes):
    """A process whose only other one would go on from this step."""

    def __init__(self, other: tuple[int, str]) -> None:
        super().__init__(0, 2)
        self._other = other

    def shared(self, items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        yield items[0], work(items[0])
        yield items[1], self._other


def spread(processes: Processes) -> Spread:
    return Spread(cast(Accelerator, None), processes)


def test_a_checkpoint_that_one_process_cannot_read_is_not_passed_over_by_it_alone() -> None:
    other = 4, "checkpoint `step-8` is damaged and passed over: it cannot be read"
    with pytest.raises(CheckpointError) as caught:
        spread(Two(other)).refuse_several_steps(8, ())
    assert "process 0 from step 8; process 1 from step 4 (checkpoint `step-8`" in str(caught.value)


def test_processes_at_one_step_go_on() -> None:
    spread(Two((8, ""))).refuse_several_steps(8, ())
    spread(Two((4, "another warning"))).refuse_several_steps(4, ("checkpoint `step-8` …",))
    spread(Processes()).refuse_several_steps(3, ())
