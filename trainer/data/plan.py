"""Which examples a step trains, on which process and in which batch: arithmetic without pixels.

A pure function of the step, so that workers, resumed runs and other process counts agree. Beside
each instance picture of a subject with class pictures stands one class picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainer import randomness


@dataclass(frozen=True)
class Slot:
    """One example of a step.

    Args:
        number: of the picture, from 0.
        position: of the example in the run, over all processes; the key of its random draws. A
            class picture has ~position of the instance picture that it stands beside.
        weight: of its loss. The mean over processes of the sum over their instance slots is the
            mean over the step's instance examples; class slots have theirs times the prior's
            weight.
    """

    number: int
    position: int
    weight: float

    @property
    def is_class(self) -> bool:
        """Whether it is a class picture."""
        return self.position < 0


@dataclass(frozen=True)
class Portion:
    """One subject's part of the training pictures, all by number.

    Args:
        instances: pictures of the subject.
        repeats: times that an epoch shows each of them.
        class_images: pictures of its class; empty without prior preservation.
        prior_loss_weight: of the class pictures' loss.
    """

    instances: tuple[int, ...]
    repeats: int = 1
    class_images: tuple[int, ...] = ()
    prior_loss_weight: float = 1.0

    @property
    def uses_per_epoch(self) -> int:
        """Instance slots in one pass over the pictures."""
        return len(self.instances) * self.repeats


@dataclass(frozen=True)
class Plan:
    """The batches of one process.

    Args:
        portions: the subjects' pictures.
        batch_size: instance slots per process and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        num_processes: processes that train together.
        process_index: this one, from 0.
        seed: of the order of the pictures.
    """

    portions: tuple[Portion, ...]
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    process_index: int
    seed: int

    @property
    def num_examples(self) -> int:
        """Instance slots in one pass over the pictures."""
        return sum(portion.uses_per_epoch for portion in self.portions)

    @property
    def examples_per_step(self) -> int:
        """Instance slots of one full optimizer step over all processes."""
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
        """The pass over the instance pictures that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def at(self, step: int) -> list[list[Slot]]:
        """The batches of this process in one optimizer step (from 0).

        A batch is its instance slots, then the class slots beside them in the same order. A
        process that a short step leaves without examples repeats the step's last instance slot
        with weight 0, so that all processes run equally many forward passes.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.examples_per_step
        places = _places(self.seed, epoch, self.portions)
        places = places[step_in_epoch * size : (step_in_epoch + 1) * size]
        weight = self.num_processes / len(places)
        passes = math.ceil(len(places) / (self.num_processes * self.batch_size))
        batches = []
        for number_of_pass in range(passes):
            start = (number_of_pass * self.num_processes + self.process_index) * self.batch_size
            mine = range(len(places))[start : start + self.batch_size]
            if mine:
                first = step * size + mine.start
                batches.append(_batch(places[mine.start : mine.stop], first, weight))
            else:
                batches.append([Slot(places[-1].number, step * size + len(places) - 1, 0.0)])
        return batches


@dataclass(frozen=True)
class _Place:
    """One place in the order of an epoch: an instance picture, and the class picture beside it."""

    number: int
    class_number: int | None
    prior_loss_weight: float


def _batch(places: Sequence[_Place], first: int, weight: float) -> list[Slot]:
    """The instance slots of neighbouring places, then their class slots."""
    instances = [Slot(place.number, first + j, weight) for j, place in enumerate(places)]
    classes = [
        Slot(place.class_number, ~(first + j), weight * place.prior_loss_weight)
        for j, place in enumerate(places)
        if place.class_number is not None
    ]
    return instances + classes


@lru_cache(maxsize=2)
def _places(seed: int, epoch: int, portions: tuple[Portion, ...]) -> tuple[_Place, ...]:
    """The order of one epoch.

    Class pictures come from a shuffled cursor of their own that goes on over the epochs, so that
    the pairs change and every class picture is used equally often.
    """
    members = [
        (index, number)
        for index, portion in enumerate(portions)
        for number in portion.instances * portion.repeats
    ]
    used = [epoch * portion.uses_per_epoch for portion in portions]
    places = []
    for member in randomness.permutation(seed, "order", epoch, len(members)):
        index, number = members[member]
        portion = portions[index]
        class_number = _class_number(seed, index, portion.class_images, used[index])
        used[index] += 1
        places.append(_Place(number, class_number, portion.prior_loss_weight))
    return tuple(places)


def _class_number(seed: int, index: int, class_images: tuple[int, ...], use: int) -> int | None:
    """The class picture of one use in the run, or nothing where a portion has none."""
    if not class_images:
        return None
    turn, place = divmod(use, len(class_images))
    return class_images[_class_order(seed, index, turn, len(class_images))[place]]


# Few: the portions' cursors move on together.
@lru_cache(maxsize=64)
def _class_order(seed: int, index: int, turn: int, size: int) -> tuple[int, ...]:
    return tuple(randomness.permutation(seed, f"class order {index}", turn, size))
