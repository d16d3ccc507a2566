"""Which examples a step trains, on which process and in which batch: arithmetic without pixels.

A pure function of the step, so that workers, resumed runs and other process counts agree. Beside
each instance picture of a subject with class pictures stands one class picture. A batch holds
pictures of one trained size; how a picture came by its size is not known here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice

from trainer import randomness
from trainer.images.crop import Size


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
        instances: pictures of the subject; one that stands here twice is shown twice as often.
        repeats: times that an epoch shows all of them.
        class_images: pictures of its class; empty without prior preservation.
        prior_loss_weight: of the class pictures' loss.
        concept: which subject it is, from 1. One whose pictures are trained at several areas has
            a portion for each, so that pictures of its class stand beside it at the same.
    """

    instances: tuple[int, ...]
    repeats: int = 1
    class_images: tuple[int, ...] = ()
    prior_loss_weight: float = 1.0
    concept: int = 1

    @property
    def uses_per_epoch(self) -> int:
        """Instance slots in one pass over the pictures."""
        return len(self.instances) * self.repeats


@dataclass(frozen=True)
class Plan:
    """The batches of one process.

    Where instance pictures have several trained sizes, each epoch shuffles full batches of one
    size each; the last of a size is filled with pictures of that size. Where they have one, the
    last batch of an epoch stays short.

    Args:
        portions: the subjects' pictures.
        batch_size: instance slots per process and forward pass.
        gradient_accumulation_steps: batches of instances per process and optimizer step.
        num_processes: processes that train together.
        process_index: this one, from 0.
        seed: of the order of the pictures.
        sizes: trained (height, width) by number of the picture; empty where all are alike.
    """

    portions: tuple[Portion, ...]
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    process_index: int
    seed: int
    sizes: tuple[Size, ...] = ()

    @property
    def num_examples(self) -> int:
        """Instance slots in one pass over the pictures, without those that only fill batches."""
        return sum(portion.uses_per_epoch for portion in self.portions)

    @property
    def filled(self) -> int:
        """Instance slots per epoch that repeat a picture of the same size to fill a batch."""
        if len(self._uses) == 1:
            return 0
        return sum(_missing(uses, self.batch_size) for uses in self._uses)

    @property
    def examples_per_step(self) -> int:
        """Instance slots of one full optimizer step over all processes."""
        return self.batch_size * self._batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the pictures; the last one may be short."""
        batches = sum(math.ceil(uses / self.batch_size) for uses in self._uses)
        return math.ceil(batches / self._batches_per_step)

    @property
    def _batches_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.num_processes

    @property
    def _uses(self) -> tuple[int, ...]:
        return _uses_by_size(self.portions, self.sizes)

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

        A batch is its instance slots, then the class slots beside them in the same order; class
        slots of other sizes follow as batches of their own. A process with fewer batches than
        another repeats the step's last instance slot with weight 0, so that all processes run
        equally many forward passes.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self._batches_per_step
        rows = _rows(self.seed, epoch, self.portions, self.sizes, self.batch_size)
        rows = rows[start : start + self._batches_per_step]
        weight = self.num_processes / sum(map(len, rows))
        firsts = [step * self.examples_per_step + j * self.batch_size for j in range(len(rows))]
        passes = [
            self._batches(row, first, weight) for row, first in zip(rows, firsts, strict=True)
        ]
        # Rows lie side by side over the processes, one pass behind the other.
        of_processes = [
            [batch for batches in passes[index :: self.num_processes] for batch in batches]
            for index in range(self.num_processes)
        ]
        mine = of_processes[self.process_index]
        idle = Slot(rows[-1][-1].number, firsts[-1] + len(rows[-1]) - 1, 0.0)
        return mine + [[idle] for _ in range(max(map(len, of_processes)) - len(mine))]

    def _batches(self, row: Sequence[_Place], first: int, weight: float) -> list[list[Slot]]:
        """A row of places as batches of one size each: that of the instances first."""
        slots = [Slot(place.number, first + j, weight) for j, place in enumerate(row)]
        slots += [
            Slot(place.class_number, ~(first + j), weight * place.prior_loss_weight)
            for j, place in enumerate(row)
            if place.class_number is not None
        ]
        batches: dict[Size | None, list[Slot]] = {}
        for slot in slots:
            batches.setdefault(_size_of(slot.number, self.sizes), []).append(slot)
        return list(batches.values())


@dataclass(frozen=True)
class _Place:
    """One place in the order of an epoch: an instance picture, and the class picture beside it."""

    number: int
    class_number: int | None
    prior_loss_weight: float


def _size_of(number: int, sizes: tuple[Size, ...]) -> Size | None:
    return sizes[number] if sizes else None


def _missing(uses: int, batch_size: int) -> int:
    """Places that the last of its batches leaves empty."""
    return -uses % batch_size


@lru_cache(maxsize=2)
def _uses_by_size(portions: tuple[Portion, ...], sizes: tuple[Size, ...]) -> tuple[int, ...]:
    """Instance slots of each trained size in one pass over the pictures, without filling."""
    uses: Counter[Size | None] = Counter()
    for portion in portions:
        for number in portion.instances:
            uses[_size_of(number, sizes)] += portion.repeats
    return tuple(uses.values())


@lru_cache(maxsize=2)
def _rows(
    seed: int,
    epoch: int,
    portions: tuple[Portion, ...],
    sizes: tuple[Size, ...],
    batch_size: int,
) -> tuple[tuple[_Place, ...], ...]:
    """The places of one epoch in rows, each the instances of one batch.

    A place that fills a row has its class picture too, so that cursors know nothing of filling.
    """
    groups: dict[Size | None, list[_Place]] = {}
    for place in _places(seed, epoch, portions):
        groups.setdefault(_size_of(place.number, sizes), []).append(place)
    if len(groups) == 1:
        (places,) = groups.values()
        return _cut(places, batch_size)
    rows: list[tuple[_Place, ...]] = []
    for places in groups.values():
        whole = len(places) + _missing(len(places), batch_size)
        rows += _cut(list(islice(cycle(places), whole)), batch_size)
    order = randomness.permutation(seed, "batches", epoch, len(rows))
    return tuple(rows[place] for place in order)


def _cut(places: Sequence[_Place], length: int) -> tuple[tuple[_Place, ...], ...]:
    """Neighbouring places in rows; the last may be short."""
    return tuple(tuple(places[start : start + length]) for start in range(0, len(places), length))


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
