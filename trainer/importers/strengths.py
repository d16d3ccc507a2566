"""Rank and strength of convolutions, which may have their own in other programs.

Source: `LoRAModule` of sd-scripts and of ai-toolkit, `LoConModule` and its like of LyCORIS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.importers.desk import Desk

NO_CONVOLUTIONS = "the base model has no convolutions"
ALPHA_IS_RANK = "{name} 0 stands for the rank there: a strength of 1."


@dataclass(frozen=True)
class Strength:
    """The rank of an adapter, and its alpha; an alpha of 0 is the rank, in all these programs."""

    rank: float
    given_alpha: float

    @property
    def alpha(self) -> float:
        """The alpha that counts."""
        return self.given_alpha or self.rank

    @property
    def factor(self) -> float:
        """On the product of an adapter's halves."""
        return self.alpha / self.rank if self.rank else 0.0


def tell_convolutions(
    desk: Desk,
    own: Strength,
    others: Strength,
    *,
    rank: tuple[str, Any],
    alpha: tuple[str, Any],
) -> None:
    """Says what becomes of the rank and the alpha of convolutions, which get those of all layers.

    Args:
        own: what convolutions have there.
        others: what all other layers have, and convolutions have here.
        rank: the option that says their rank, and its value; None where it is not given.
        alpha: the same of their alpha.
    """
    name, value = rank
    if own.rank != others.rank:
        reason = f"convolutions get the rank of all other layers, {others.rank:g}"
        desk.leave(name, reason, value=own.rank if value is None else value)
    elif value is not None:
        reason = "convolutions get an adapter, too: see target_unet_modules"
        desk.leave(name, reason, matters=False, value=value)
    name, value = alpha
    if own.factor != others.factor:
        reason = (
            f"convolutions get the strength of all other layers, alpha {others.alpha:g} over rank "
            f"{others.rank:g}; there {own.alpha:g} over {own.rank:g}"
        )
        desk.leave(name, reason, value=own.given_alpha if value is None else value)
    elif value is not None:
        reason = "convolutions are as strong as all other layers"
        desk.leave(name, reason, matters=False, value=value)
