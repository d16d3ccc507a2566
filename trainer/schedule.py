"""Which parts learn at which step: the pivot of the new tokens, the text encoders' share.

Knows numbers of steps only: no tensors, no models. Freezing itself is the training's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config import AdapterConfig, TokenConfig
from trainer.errors import InputError
from trainer.sections.learning import steps_of_share

Part = Literal["denoiser", "text_encoders", "tokens"]


@dataclass(frozen=True)
class Schedule:
    """The steps, counted from 0, in which each part learns: from the first to before the end.

    Args:
        total_steps: optimizer steps of the run.
        denoiser_start: first step in which the denoiser learns; it learns to the last.
        text_encoders_end: first step in which the text encoders' own weights learn no more;
            0: they never learn.
        pivot: first step in which the new tokens learn no more. None: there are none.
    """

    total_steps: int
    denoiser_start: int = 0
    text_encoders_end: int = 0
    pivot: int | None = None

    @classmethod
    def of(cls, token: TokenConfig, adapter: AdapterConfig, total_steps: int) -> Schedule:
        """The schedule of a run.

        Shares are counted in steps, see `steps_of_share`.

        Raises:
            InputError: nothing is left for the denoiser after the pivot it waits for.
        """
        pivot = None
        if token.train_text_encoder_ti:
            pivot = steps_of_share(token.train_text_encoder_ti_frac, total_steps)
        start = 0
        if pivot is not None and token.disable_unet_during_ti_training:
            start = pivot
        if start >= total_steps:
            raise InputError.of(
                "disable_unet_during_ti_training",
                f"the new tokens learn in all {total_steps} steps, and the denoiser in none",
                "lower train_text_encoder_ti_frac, or raise max_train_steps",
            )
        end = 0
        if adapter.train_text_encoder:
            end = steps_of_share(adapter.train_text_encoder_frac, total_steps)
        return cls(total_steps, denoiser_start=start, text_encoders_end=end, pivot=pivot)

    @property
    def text_frozen_from(self) -> int:
        """First step from which every caption's conditioning stays as it is; 0: all of them."""
        return max(self.text_encoders_end, self.pivot or 0)

    def parts_at(self, step: int) -> frozenset[Part]:
        """The parts that learn in a step, counted from 0."""
        learning: dict[Part, bool] = {
            "denoiser": step >= self.denoiser_start,
            "text_encoders": step < self.text_encoders_end,
            "tokens": step < (self.pivot or 0),
        }
        return frozenset(part for part, learns in learning.items() if learns)

    def text_learns_at(self, step: int) -> bool:
        """Whether a step changes what captions are encoded to."""
        return step < self.text_frozen_from
