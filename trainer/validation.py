"""The loss of pictures that are never trained on, and when it tells of over-fitting.

Noise and timesteps are the same each time, so that two values differ by the weights alone: the same
weights give the same value.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.dataset import Dataset
from trainer.events import VALIDATION_LOSS, Event, MeasuresEvent, NoteAtStep
from trainer.looks import NEVER, Moments, Stop
from trainer.out_of_memory import ran_out_of_memory
from trainer.passes import Passes
from trainer.spread import Spread

# Draws of noise and timestep for each picture.
_DRAWS = 8
# Positions of these draws: far beyond those of any training.
_FIRST_POSITION = 2**48

_NO_MEMORY = (
    "the device has too little memory to look at held-out pictures beside the training, which goes "
    "on without"
)

# Over-fitting is told once the mean of so many looks in a row is this much above an earlier one: a
# single look goes up and down with the weights.
_IN_A_ROW, _RISE = 3, 0.1


@dataclass(frozen=True)
class Measured:
    """A look at held-out pictures.

    Args:
        step: steps done.
        held_out: their loss.
        trained: the smoothed loss of trained pictures then.
    """

    step: int
    held_out: float
    trained: float


def over_fitting(history: Sequence[Measured]) -> str:
    """In words that training pictures are being learnt by heart, once it shows; else nothing.

    The loss of held-out pictures rises while that of trained ones falls.
    """
    means = [_mean(history[end - _IN_A_ROW : end]) for end in range(_IN_A_ROW, len(history) + 1)]
    # Looks of the last mean are in none of the earlier ones.
    earlier = means[:-_IN_A_ROW]
    if not earlier:
        return ""
    lowest, last = min(earlier, key=lambda mean: mean.held_out), means[-1]
    rise = last.held_out / lowest.held_out - 1
    if rise < _RISE or last.trained >= lowest.trained:
        return ""
    return (
        f"over-fitting: the loss of held-out pictures was lowest around step {lowest.step} "
        f"({lowest.held_out:.4f}) and is {rise:.0%} higher now, while that of trained pictures "
        f"fell from {lowest.trained:.4f} to {last.trained:.4f}; the next training may end around "
        f"step {lowest.step}, take a lower learning_rate, or more pictures"
    )


def _mean(looks: Sequence[Measured]) -> Measured:
    """The mean of some looks, at the step of the middle one."""
    return Measured(
        looks[len(looks) // 2].step,
        statistics.fmean(look.held_out for look in looks),
        statistics.fmean(look.trained for look in looks),
    )


def history_of(events: Sequence[Mapping[str, Any]], step: int) -> list[Measured]:
    """The looks that a training's events up to a step tell of."""
    trained = {e["step"]: e["smoothed_loss"] for e in events if e.get("event") == "step"}
    looks = [e for e in events if e.get("event") == "measures" and VALIDATION_LOSS in e["values"]]
    return [
        Measured(look["step"], look["values"][VALIDATION_LOSS], trained[look["step"]])
        for look in looks
        if look["step"] <= step
        and None not in (look["values"][VALIDATION_LOSS], trained.get(look["step"]))
    ]


class HeldOut:
    """Looks at pictures that are kept out of a training.

    Args:
        passes: forward passes of the training.
        dataset: has the pictures.
        numbers: which they are.
        moments: when to look.
        spread: its processes all compute the same.
        trained: tells the smoothed loss of trained pictures.
        history: earlier looks of a training that goes on.
    """

    is_cut = False

    def __init__(
        self,
        passes: Passes,
        dataset: Dataset,
        numbers: Sequence[int],
        *,
        moments: Moments,
        spread: Spread,
        trained: Callable[[], float],
        history: Sequence[Measured] = (),
    ) -> None:
        self.moments = moments
        self._passes, self._trained, self._history = passes, trained, list(history)
        self._dataset, self._numbers, self._spread = dataset, tuple(numbers), spread
        self._warned = bool(over_fitting(self._history))

    def at(self, step: int, _: Stop) -> Iterator[Event]:
        """Tells the mean loss over all pictures and draws.

        Where memory does not allow it, the training goes on without; in shards, where no process
        can go on alone, that ends it.
        """
        loss = self._loss_if_possible()
        if loss is None:
            yield NoteAtStep("warning", "validation_images", _NO_MEMORY, step)
            self.moments = NEVER
            return
        yield MeasuresEvent(step, {VALIDATION_LOSS: loss})
        if not math.isfinite(loss) or step == 0:
            return
        self._history.append(Measured(step, loss, self._trained()))
        words = "" if self._warned else over_fitting(self._history)
        if words:
            self._warned = True
            yield NoteAtStep("warning", "max_train_steps", words, step)

    def _loss_if_possible(self) -> float | None:
        """The loss, or nothing where a process has too little memory for it."""
        if self._spread.sharding is not None:
            return self._loss()
        loss: float | None = None
        try:
            loss = self._loss()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        return None if self._spread.processes.any(loss is None) else loss

    @torch.no_grad()
    def _loss(self) -> float:
        # One example at a time: beside a step that is recorded little memory is left.
        batches = (
            self._dataset.still(number, [_FIRST_POSITION + place * _DRAWS + draw])
            for place, number in enumerate(self._numbers)
            for draw in range(_DRAWS)
        )
        losses = [self._passes.loss(self._passes.ask(batch))[0] for batch in batches]
        return torch.stack(losses).mean().item()
