"""How counts of steps and epochs of another program become counts of steps here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """What a count of another program's steps depends on.

    Args:
        examples: pictures of the subject that an epoch shows; None where nobody can count them.
        batch: pictures of a step of one process here, with those that are accumulated.
        repeats: times that an epoch there shows a picture which an epoch here shows once.
        with_class: whether there are pictures of the class, too.
        processes: that show a batch each in a step, as many here as there.
        halved: whether every second step there is of class pictures, which here are in every step.
    """

    examples: int | None = None
    batch: int = 1
    repeats: int = 1
    with_class: bool = False
    processes: int = 1
    halved: bool = False

    def steps(self, steps: float) -> int:
        """Steps here for as many there."""
        return max(1, math.ceil(steps / 2)) if self.halved else max(1, round(steps))

    def of_epochs(self, epochs: float) -> int | None:
        """Steps here that show what so many epochs show; None where nobody can count them."""
        if self.examples is None:
            return None
        shown = max(1, self.batch) * self.processes
        return max(1, round(epochs * math.ceil(self.examples / shown)))
