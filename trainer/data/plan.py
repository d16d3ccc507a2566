"""Which examples a step trains, on which process and in which batch: arithmetic without pixels.

A pure function of the step, so that workers, resumed runs and other process counts agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from trainer import randomness


@dataclass(frozen=True)
class Slot:
    """One example of a step.

    Args:
        number: of the picture, from 0.
        position: of the example in the run, over all processes; the key of its random draws.
        weight: of its loss. The mean over processes of the sum over their slots is the mean
            over the step's examples.
    """

    number: int
    position: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """The batches of one process.

    Args:
        num_examples: training pictures.
        batch_size: slots per process and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        num_processes: processes that train together.
        process_index: this one, from 0.
        seed: of the order of the pictures.
    """

    num_examples: int
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    process_index: int
    seed: int

    @property
    def examples_per_step(self) -> int:
        """Slots of one full optimizer step over all processes."""
        return self.batch_size * self.gradient_accumulation_steps * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the pictures; the last one may be short."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def total_steps(self, max_train_steps: int, num_train_epochs: int | None) -> int:
        """Optimizer steps of the run; epochs decide where they are given."""
        if num_train_epochs is None:
            return max_train_steps
        return num_train_epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The pass over the pictures that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def at(self, step: int) -> list[list[Slot]]:
        """The batches of this process in one optimizer step (from 0).

        A process that a short step leaves without examples repeats the step's last one with
        weight 0, so that all processes run equally many forward passes.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.num_examples)
        size = self.examples_per_step
        numbers = order[step_in_epoch * size : (step_in_epoch + 1) * size]
        weight = self.num_processes / len(numbers)
        slots = [Slot(n, step * size + j, weight) for j, n in enumerate(numbers)]
        idle = Slot(slots[-1].number, slots[-1].position, 0.0)
        passes = math.ceil(len(slots) / (self.num_processes * self.batch_size))
        starts = [
            (m * self.num_processes + self.process_index) * self.batch_size for m in range(passes)
        ]
        return [slots[start : start + self.batch_size] or [idle] for start in starts]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> tuple[int, ...]:
    return tuple(randomness.permutation(seed, "order", epoch, num_examples))
