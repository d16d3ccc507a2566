"""What is looked at between steps: when, and the numbers of what learns.

A look changes nothing of a training: it draws from keys of its own, and leaves no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.events import Event, MeasuresEvent
from trainer.pace import Pace, arithmetic
from trainer.tokens import NewTokens, TokenNames

# About so many times in a run the numbers of what learns are told.
_TIMES = 100


Stop = Callable[[], bool]


@dataclass(frozen=True)
class Moments:
    """When to look: every so many steps, and after the last.

    Args:
        every: steps between two looks.
        total_steps: of the run.
        from_base: whether also before the first step.
    """

    every: int
    total_steps: int
    from_base: bool = False

    def include(self, step: int) -> bool:
        """Whether to look after so many steps."""
        if step == 0:
            return self.from_base
        if step > self.total_steps:
            return False
        return step % self.every == 0 or step == self.total_steps

    def after(self, step: int) -> int:
        """How many looks come after the one at a step."""
        return sum(map(self.include, range(step + 1, self.total_steps + 1)))


NEVER = Moments(every=1, total_steps=0)


class Look(Protocol):
    """Something to be looked at between steps, by all processes alike.

    `is_cut`: whether a wish to stop cut it short, so that it has to be finished at the same step.
    """

    moments: Moments
    is_cut: bool

    def at(self, step: int, stop: Stop) -> Iterator[Event]:
        """What is seen after so many steps; the main process's events are told.

        Args:
            stop: a wish that a look which takes long heeds.
        """


def taken(
    looks: Sequence[Look], step: int, stop: Stop, pace: Pace, *, finishing: bool
) -> Generator[Event, None, bool]:
    """Takes the looks that are due after so many steps.

    Args:
        stop: a wish that those which take long heed.
        pace: of the training's steps.
        finishing: take those that were cut short instead.

    Returns:
        Whether a wish to stop cut one short.
    """
    due = [look for look in looks if (look.is_cut if finishing else look.moments.include(step))]
    for look in due:
        # Compiled for training, blocks would be compiled once more for each kind of look.
        plainly = torch.compiler.set_stance("force_eager")
        with arithmetic(pace), plainly if pace.compile_blocks else nullcontext():
            yield from look.at(step, stop)
    return any(look.is_cut for look in due)


class Gauges:
    """The numbers of what learns: norms of new tokens, and Prodigy's estimate d.

    Args:
        optimizer: of the training.
        new_tokens: text encoder to its new tokens.
        names: of these tokens.
        total_steps: of the run.
    """

    is_cut = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        new_tokens: Mapping[str, NewTokens],
        names: TokenNames | None,
        total_steps: int,
    ) -> None:
        self._optimizer, self._new_tokens, self._names = optimizer, new_tokens, names
        self.moments = Moments(max(1, math.ceil(total_steps / _TIMES)), total_steps)

    @property
    def has_any(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._values())

    def at(self, step: int, _: Stop) -> Iterator[Event]:
        """Tells the numbers."""
        yield MeasuresEvent(step, self._values())

    def _values(self) -> dict[str, float]:
        values = {}
        first = self._optimizer.param_groups[0]
        if "d" in first:
            values["train/prodigy_d"] = float(first["d"])
        for encoder, new in self._new_tokens.items():
            assert self._names is not None
            norms = new.rows.detach().norm(dim=1).tolist()
            for token, norm in zip(self._names.all_tokens(), norms, strict=True):
                values[f"tokens/{encoder}/{token}"] = norm
        return values
