"""Faults that tests bring about from outside, by the environment; inert where it says nothing.

`TRAINER_FAULT=KIND@STEP`: in that step, counted from 1,

- `nan` makes the loss NaN,
- `oom` runs out of the device's memory,
- `rankfail` lets the last of several processes fail, and no other.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trainer.errors import InputError

VARIABLE = "TRAINER_FAULT"


def _not_a_number(loss: torch.Tensor, _: bool) -> torch.Tensor:
    return loss * math.nan


def _out_of_memory(loss: torch.Tensor, _: bool) -> torch.Tensor:
    raise torch.OutOfMemoryError(f"out of memory, as {VARIABLE} asks for. Nothing was allocated")


def _failing_process(loss: torch.Tensor, is_last_process: bool) -> torch.Tensor:
    if is_last_process:
        raise RuntimeError(f"this process fails, as {VARIABLE} asks for")
    return loss


KINDS: Mapping[str, Callable[[torch.Tensor, bool], torch.Tensor]] = {
    "nan": _not_a_number,
    "oom": _out_of_memory,
    "rankfail": _failing_process,
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and in which step.

    Args:
        kind: a key of `KINDS`.
        step: from 1.
    """

    kind: str
    step: int

    def strike(self, loss: torch.Tensor, *, step: int, is_last_process: bool) -> torch.Tensor:
        """The loss of a step, as the fault leaves it.

        Raises:
            RuntimeError: that is the fault; out of memory is one of its kinds.
        """
        return KINDS[self.kind](loss, is_last_process) if step == self.step else loss


def wanted_fault() -> Fault | None:
    """The fault that the environment asks for, if any.

    Raises:
        InputError: it asks for something unknown.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return None
    found = re.fullmatch(rf"({'|'.join(KINDS)})@([1-9]\d*)", wanted)
    if found is None:
        allowed = ", ".join(f"`{kind}@STEP`" for kind in KINDS)
        raise InputError.of(VARIABLE, f"`{wanted}` is not one of {allowed}", "unset it")
    return Fault(found[1], int(found[2]))
