"""From gradients to weights: one parameter at a time where that saves memory.

An optimizer's own step goes over all parameters, which must be 32-bit floats with all gradients
at hand. Two savings take it parameter by parameter instead: weights kept in bf16, widened only
while they are updated and rounded back by chance; and updates in the middle of the backward pass,
after which a gradient is given up at once. Knows neither models nor processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer import randomness, shards
from trainer.config import OptimConfig
from trainer.optim import (
    ParameterGroup,
    build_optimizer,
    norm_of,
    page_state,
    step_where,
    total_norm,
)

# Bits of a 32-bit float's mantissa that bf16 does not have.
_LOST_BITS = 16


class Updates:
    """The optimizer, and how its steps come to the weights.

    The optimizer is an ordinary one of torch over ordinary parameters, so that learning-rate
    schedules, checkpoints and phases treat it as ever. For a bf16 weight it has a *shell*: a
    32-bit parameter that is empty but for the moment of its update. So is its state in 32 bits,
    new and loaded. For a sharded weight the shell is the part that this process holds: each
    process updates its own.

    Args:
        groups: what learns.
        optim: which optimizer, and its settings.
        seed: the run's seed.
        in_backward: updates each parameter as soon as its gradient is complete.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], optim: OptimConfig, *, seed: int, in_backward: bool
    ) -> None:
        self._seed = seed
        self._name = optim.optimizer
        self._weights = [weight for group in groups for weight in group.parameters]
        self._learners = [_shell_of(weight) for weight in self._weights]
        self._learner_of = dict(zip(map(id, self._weights), self._learners, strict=True))
        self._group_of = [n for n, group in enumerate(groups) for _ in group.parameters]
        self.optimizer = build_optimizer(
            [replace(group, parameters=self.learners(group.parameters)) for group in groups], optim
        )
        self.in_backward = in_backward
        self._step = 0
        self._allowed: torch.Tensor | None = None
        self._norms: dict[int, torch.Tensor] = {}
        if in_backward:
            for number, weight in enumerate(self._weights):
                self._update_in_backward(number, weight)

    @property
    def is_piecewise(self) -> bool:
        """Whether parameters are updated one by one, not by one step of the optimizer."""
        return self.in_backward or any(weight.dtype != torch.float32 for weight in self._weights)

    def learners(self, weights: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """What the optimizer has, and keys its state by, for these weights."""
        return [self._learner_of[id(weight)] for weight in weights]

    def begin(self, step: int, allowed: torch.Tensor | None = None) -> None:
        """Begins a step, before its backward pass.

        Args:
            step: optimizer steps already done; the random bits of rounding depend on it.
            allowed: () bool on the device: whether updates in the backward pass are, None: yes;
                a gradient that is not finite is left out in any case.
        """
        self._step = step
        self._allowed = allowed
        self._norms.clear()

    def norm(self) -> torch.Tensor:
        """The L2 norm of the gradients that were given up in the backward pass of this step."""
        return total_norm(self._norms[number] for number in sorted(self._norms))

    def apply(self, allowed: torch.Tensor | None = None) -> None:
        """Updates all weights that have a gradient, and gives the gradients up.

        Args:
            allowed: () bool on the device: where false, the gradients are given up only. None:
                true.
        """
        if not self.is_piecewise:
            self._lend_gradients()
            step_where(self.optimizer, self._name, allowed)
            for weight, learner in zip(self._weights, self._learners, strict=True):
                weight.grad = learner.grad = None
            return
        for number, weight in enumerate(self._weights):
            if weight.grad is not None:
                self._update(number, allowed)

    def state(self, *, keep: bool) -> dict[str, Any]:
        """The optimizer's `state_dict`, of whole tensors; to be called by all processes.

        Args:
            keep: whether this process wants it; others only send their parts.
        """
        state = self.optimizer.state_dict()
        return state | {
            "state": {
                number: _whole_state(values, self._weights[number], keep=keep)
                for number, values in state["state"].items()
            }
        }

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave to whoever kept it."""
        self.optimizer.load_state_dict(
            state
            | {
                "state": {
                    number: _state_of_part(values, self._weights[number])
                    for number, values in state["state"].items()
                }
            }
        )
        page_state(self.optimizer)

    def _lend_gradients(self) -> None:
        """Gives shells of sharded 32-bit weights the part of the gradient that is here."""
        for weight, learner in zip(self._weights, self._learners, strict=True):
            if learner is not weight:
                learner.data = shards.part(weight)
                learner.grad = None if weight.grad is None else shards.part(weight.grad)

    def _update_in_backward(self, number: int, weight: torch.nn.Parameter) -> None:
        def gradient_is_complete(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            self._norms[number] = norm_of(weight.grad)
            finite = self._norms[number].isfinite()
            self._update(number, finite if self._allowed is None else self._allowed & finite)

        # A parameter that is used twice has its gradients summed before this is called.
        weight.register_post_accumulate_grad_hook(gradient_is_complete)

    @torch.no_grad()
    def _update(self, number: int, allowed: torch.Tensor | None) -> None:
        weight, learner = self._weights[number], self._learners[number]
        if learner is weight:
            self._step_alone(number, allowed)
        else:
            assert weight.grad is not None
            own = shards.part(weight)
            learner.data, learner.grad = own.float(), shards.part(weight.grad).float()
            self._step_alone(number, allowed)
            # Every step and parameter has bits of its own, whatever was updated before.
            position = self._step * len(self._weights) + number
            # So has every part, or rows would be rounded alike.
            place = shards.rank(weight)
            purpose = f"rounding of part {place}" if place else "rounding"
            rounded = rounded_by_chance(learner, randomness.key(self._seed, purpose, position))
            own.copy_(rounded if allowed is None else torch.where(allowed, rounded, own))
            learner.data, learner.grad = _nothing(weight), None
        weight.grad = None

    def _step_alone(self, number: int, allowed: torch.Tensor | None) -> None:
        """One step of the optimizer that sees no other parameter.

        Going over all of them for each would take time that grows with the square of their number.
        """
        groups = self.optimizer.param_groups
        alone = {**groups[self._group_of[number]], "params": [self._learners[number]]}
        self.optimizer.param_groups = [alone]
        try:
            step_where(self.optimizer, self._name, allowed)
        finally:
            self.optimizer.param_groups = groups


def rounded_by_chance(values: torch.Tensor, key: int) -> torch.Tensor:
    """32-bit floats as bf16, up or down with a chance by nearness: the mean is the value itself.

    Bits are added below bf16's mantissa, evenly drawn, and the sum is cut. A finite value stays
    finite; what is not finite stays what it is.

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.

    Args:
        values: fp32, of any shape.
        key: of the random bits, which depend on the kind of device, too.
    """
    generator = torch.Generator(values.device).manual_seed(key)
    bits = values.contiguous().view(torch.int32)
    cut = torch.randint(
        1 << _LOST_BITS, bits.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    cut.add_(bits).bitwise_and_(-1 << _LOST_BITS)
    rounded = cut.view(torch.float32)
    toward_zero = (bits & (-1 << _LOST_BITS)).view(torch.float32)
    rounded = torch.where(rounded.isfinite(), rounded, toward_zero)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _shell_of(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    if weight.dtype == torch.float32:
        return torch.nn.Parameter(shards.part(weight)) if shards.is_sharded(weight) else weight
    return torch.nn.Parameter(_nothing(weight))


def _nothing(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=weight.device)


def _whole_state(
    values: Mapping[str, Any], weight: torch.nn.Parameter, *, keep: bool
) -> dict[str, Any]:
    """What an optimizer keeps of a weight, put together from all parts, on the processor."""
    answer = dict(values)
    for name in _elementwise(values) if shards.is_sharded(weight) else ():
        full = shards.whole(values[name], weight)
        answer[name] = full.cpu() if keep else None
    return answer


def _state_of_part(values: Mapping[str, Any], weight: torch.nn.Parameter) -> dict[str, Any]:
    """What an optimizer keeps of the part of a weight that is here."""
    answer = dict(values)
    for name in _elementwise(values) if shards.is_sharded(weight) else ():
        # A view would keep the whole tensor, and the file that it is mapped from.
        answer[name] = shards.part_of(values[name], weight).clone()
    return answer


def _elementwise(values: Mapping[str, Any]) -> list[str]:
    """What of a weight's state has a number for each of its own, not one for all."""
    return [n for n, value in values.items() if isinstance(value, torch.Tensor) and n != "step"]
