"""From gradients to weights: one parameter at a time where that saves memory.

An optimizer's own step goes over all parameters, which must be 32-bit floats with all gradients
at hand. Two savings take it parameter by parameter instead: weights kept in bf16, widened only
while they are updated and rounded back by chance; and updates in the middle of the backward pass,
after which a gradient is given up at once. Knows neither models nor processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from trainer import randomness
from trainer.config import OptimConfig
from trainer.optim import ParameterGroup, build_optimizer, norm_of, total_norm

# Bits of a 32-bit float's mantissa that bf16 does not have.
_LOST_BITS = 16


class Updates:
    """The optimizer, and how its steps come to the weights.

    The optimizer is an ordinary one of torch over ordinary parameters, so that learning-rate
    schedules, checkpoints and phases treat it as ever. For a bf16 weight it has a *shell*: a
    32-bit parameter that is empty but for the moment of its update. So is its state in 32 bits,
    new and loaded.

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
        self._weights = [weight for group in groups for weight in group.parameters]
        self._learners = [_shell_of(weight) for weight in self._weights]
        self._learner_of = dict(zip(map(id, self._weights), self._learners, strict=True))
        self._group_of = [n for n, group in enumerate(groups) for _ in group.parameters]
        self.optimizer = build_optimizer(
            [replace(group, parameters=self.learners(group.parameters)) for group in groups], optim
        )
        self.in_backward = in_backward
        self._step = 0
        self._norms: dict[int, torch.Tensor] = {}
        if in_backward:
            for number, weight in enumerate(self._weights):
                self._update_in_backward(number, weight)

    @property
    def is_piecewise(self) -> bool:
        """Whether parameters are updated one by one, not by one step of the optimizer."""
        return self.in_backward or any(
            learner is not weight
            for learner, weight in zip(self._learners, self._weights, strict=True)
        )

    def learners(self, weights: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
        """What the optimizer has, and keys its state by, for these weights."""
        return [self._learner_of[id(weight)] for weight in weights]

    def begin(self, step: int) -> None:
        """Begins a step, before its backward pass.

        Args:
            step: optimizer steps already done; the random bits of rounding depend on it.
        """
        self._step = step
        self._norms.clear()

    def norm(self) -> torch.Tensor:
        """The L2 norm of the gradients that were given up in the backward pass of this step."""
        return total_norm(self._norms[number] for number in sorted(self._norms))

    def apply(self) -> None:
        """Updates all weights that have a gradient, and gives the gradients up."""
        for number, weight in enumerate(self._weights):
            if weight.grad is not None:
                self._update(number)

    def _update_in_backward(self, number: int, weight: torch.nn.Parameter) -> None:
        def gradient_is_complete(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            self._norms[number] = norm_of(weight.grad)
            self._update(number)

        # A parameter that is used twice has its gradients summed before this is called.
        weight.register_post_accumulate_grad_hook(gradient_is_complete)

    @torch.no_grad()
    def _update(self, number: int) -> None:
        weight, learner = self._weights[number], self._learners[number]
        if learner is weight:
            self._step_alone(number)
        else:
            assert weight.grad is not None
            learner.data, learner.grad = weight.float(), weight.grad.float()
            self._step_alone(number)
            # Every step and parameter has bits of its own, whatever was updated before.
            position = self._step * len(self._weights) + number
            weight.copy_(
                rounded_by_chance(learner, randomness.key(self._seed, "rounding", position))
            )
            learner.data, learner.grad = _nothing(weight), None
        weight.grad = None

    def _step_alone(self, number: int) -> None:
        """One step of the optimizer that sees no other parameter.

        Going over all of them for each would take time that grows with the square of their number.
        """
        groups = self.optimizer.param_groups
        alone = {**groups[self._group_of[number]], "params": [self._learners[number]]}
        self.optimizer.param_groups = [alone]
        try:
            self.optimizer.step()
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
        return weight
    return torch.nn.Parameter(_nothing(weight))


def _nothing(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=weight.device)
