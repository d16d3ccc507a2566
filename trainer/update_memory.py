"""What updates of weights take beside weights and gradients, seen in real steps of a small one.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from trainer.config import OptimConfig
from trainer.live_bytes import LiveBytes
from trainer.optim import ParameterGroup
from trainer.updates import Updates

# Side of the square weight that is looked at.
_SIDE = 512


@dataclass(frozen=True)
class UpdateMemory:
    """What an optimizer takes for each number it trains.

    Args:
        state: bytes that stay.
        meanwhile: bytes that are there while a weight is updated by itself; 0 where an optimizer
            goes over all weights at once, which its fused form does in place.
    """

    state: float
    meanwhile: float

    @classmethod
    def measured(
        cls, optim: OptimConfig, dtype: torch.dtype, device: torch.device, *, one_by_one: bool
    ) -> UpdateMemory:
        """Takes two real steps; what the first leaves is the state, and there in the second.

        Args:
            optim: which optimizer.
            dtype: of the weights.
            device: of the weights.
            one_by_one: whether weights are updated in the middle of the backward pass.
        """
        weight = torch.nn.Parameter(torch.ones(_SIDE, _SIDE, dtype=dtype, device=device))
        group = ParameterGroup("sample", [weight], learning_rate=1.0, weight_decay=0.0)
        updates = Updates([group], optim, seed=0, in_backward=False)
        (learner,) = updates.learners([weight])
        gradient = torch.ones_like(weight)
        allowed = torch.ones((), dtype=torch.bool, device=device)
        with LiveBytes() as counter:
            for _ in range(2):
                counter.peak = counter.now
                weight.grad = gradient
                updates.begin(0, allowed)
                updates.apply(allowed)
        meanwhile = counter.peak - counter.now if one_by_one or updates.is_piecewise else 0
        values = updates.optimizer.state[learner].values()
        # What is paged need not be on the device.
        state = sum(
            value.nbytes
            for value in values
            if isinstance(value, torch.Tensor) and not getattr(value, "is_paged", False)
        )
        return cls(state / weight.numel(), meanwhile / weight.numel())

    def of(self, weight: torch.Tensor) -> None:
        """Takes what there is while a weight is updated, and lets go of it."""
        size = round(self.meanwhile * weight.numel())
        torch.empty(size, dtype=torch.uint8, device=weight.device)

    def in_backward(self, weights: Sequence[torch.nn.Parameter]) -> list[RemovableHandle]:
        """Updates weights in the middle of backward, after which gradients are given up."""

        def apply(weight: torch.Tensor) -> None:
            self.of(weight)
            weight.grad = None

        return [weight.register_post_accumulate_grad_hook(apply) for weight in weights]
