"""Prodigy, whose step asks the device nothing: its estimate of the step size stays there.

prodigyopt reads two sums of every parameter from the device in each step. Here they, and all that
is made of them, are tensors; and each operation goes over all parameters of a group at once. Knows
no models.

Source: Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner",
algorithm 4; the order of operations, the options and their defaults are prodigyopt's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import prodigyopt
import torch

# What prodigyopt keeps as Python's numbers in every group: one tensor each, of all groups.
_ESTIMATE = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")

# What there is of each parameter, in its own shape.
_STATE = ("p0", "s", "exp_avg", "exp_avg_sq")

# Numbers that are taken together, where no single parameter has more: on a GPU those for which
# there is scratch space, on a processor those that its caches hold from one operation to the next.
_TOGETHER, _TOGETHER_ON_PROCESSOR = 1 << 26, 1 << 19


@dataclass(frozen=True)
class _Portion:
    """Some parameters of a group, with all that belongs to them, in equal order."""

    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    p0: list[torch.Tensor]
    s: list[torch.Tensor]
    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]


@dataclass(frozen=True)
class _Length:
    """How far a step goes, () each.

    Args:
        allowed: bool; otherwise all stays as it is.
        d: the estimate before the step.
        stretch: d times learning rate and bias correction.
    """

    allowed: torch.Tensor
    d: torch.Tensor
    stretch: torch.Tensor


class Prodigy(prodigyopt.Prodigy):  # type: ignore[misc]  # prodigyopt has no types
    """prodigyopt's optimizer, over all entries of each parameter (`slice_p` 1).

    Gradients may have any value where `found_inf` is not 0: nothing at all changes then. Learning
    rates may be tensors, and must be equal in all groups or 0.
    """

    # () fp32 on the device while a step is taken; the name by which torch's own optimizers know it.
    found_inf: torch.Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, under the one estimate of all."""
        super().add_param_group(param_group)
        self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step, by the gradients that are there."""
        assert closure is None
        first = self.param_groups[0]
        d = first["d"].clone()
        rates = torch.stack([_on_device(group["lr"], d) for group in self.param_groups])
        stretch = d * rates.max() * _bias_correction(first)
        allowed = d > 0 if self.found_inf is None else self.found_inf == 0
        numerator, denominator = first["d_numerator"] * _beta3(first), torch.zeros_like(d)
        portions = [list(self._portions(group["params"])) for group in self.param_groups]
        for group, rate, own in zip(self.param_groups, rates, portions, strict=True):
            length = _Length(allowed & (rate > 0), d, stretch)
            for portion in own:
                share, size = _gather(portion, group, length)
                numerator, denominator = numerator + share, denominator + size
        length = _Length(allowed & (denominator > 0), d, stretch)
        _estimate(first, numerator, denominator, length.allowed)
        for group, own in zip(self.param_groups, portions, strict=True):
            for portion in own:
                _move(portion, group, length)

    @torch.no_grad()
    def estimate_anew(self, staying: Iterable[torch.nn.Parameter]) -> None:
        """Lets the step size be estimated for what learns from here on.

        The estimate is one quotient over all parameters, kept over many steps: parameters that
        leave would stay in the numerator alone, and the step size leap. What stays goes on with
        the size and moments that it has, from where it is; where nothing stays, all begins anew.

        Args:
            staying: what has learnt and goes on.
        """
        staying, first = list(staying), self.param_groups[0]
        first["d_numerator"].zero_()
        if not staying:
            first["d"].fill_(first["d0"])
            first["k"].zero_()
        first["d_max"].copy_(first["d"])
        # A parameter that has never had a gradient has no state.
        for parameter in filter(self.state.get, staying):
            self.state[parameter]["s"].zero_()
            self.state[parameter]["p0"].copy_(parameter)

    def _settle(self) -> None:
        """Puts the estimate, new or loaded, to the parameters, as one for all groups."""
        for parameter, state in self.state.items():
            self.state[parameter] = {name: _shaped(state[name], parameter) for name in _STATE}
        first = self.param_groups[0]
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        estimate = {
            name: torch.as_tensor(first.get(name, 0.0), dtype=torch.float64, device=device)
            for name in _ESTIMATE
        }
        for group in self.param_groups:
            assert group["slice_p"] == 1
            group.update(estimate)

    def _portions(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[_Portion]:
        """Those with a gradient, as many as are taken together."""
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        for own in _portioned(learning):
            states = [self._state_of(parameter) for parameter in own]
            kept = {name: [state[name] for state in states] for name in _STATE}
            yield _Portion(own, [p.grad for p in own if p.grad is not None], **kept)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter) for name in _STATE})
            state["p0"].copy_(parameter)
        return state


def _portioned(parameters: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    own: list[torch.Tensor] = []
    numbers = 0
    for parameter in parameters:
        numbers += parameter.numel()
        if own and numbers > (_TOGETHER if parameter.is_cuda else _TOGETHER_ON_PROCESSOR):
            yield own
            own, numbers = [], parameter.numel()
        own.append(parameter)
    if own:
        yield own


def _gather(
    portion: _Portion, group: dict[str, Any], length: _Length
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes gradients into moments and sums.

    Returns:
        What the portion adds to the numerator, and to the denominator, of the new estimate.
    """
    d, (beta1, beta2) = length.d, group["betas"]
    if group["weight_decay"] != 0 and not group["decouple"]:
        torch._foreach_add_(portion.gradients, portion.parameters, alpha=group["weight_decay"])
    scratch = list(torch._foreach_sub(portion.p0, portion.parameters))
    torch._foreach_mul_(scratch, portion.gradients)
    way = _sum(scratch) * d / group["d0"] * length.stretch

    _multiply(portion.gradients, d, length.allowed, scratch)
    _decay(portion.exp_avg, beta1, length.allowed)
    torch._foreach_add_(portion.exp_avg, scratch, alpha=1 - beta1)
    _decay(portion.exp_avg_sq, beta2, length.allowed)
    torch._foreach_addcmul_(portion.exp_avg_sq, scratch, scratch, value=1 - beta2)
    torch._foreach_mul_(scratch, (d if group["safeguard_warmup"] else length.stretch).float())
    _decay(portion.s, _beta3(group), length.allowed)
    torch._foreach_add_(portion.s, scratch, alpha=1 / group["d0"])
    shares = way, _size(portion.s)
    numerator, denominator = (share.masked_fill(~length.allowed, 0.0) for share in shares)
    return numerator, denominator


def _estimate(
    first: Mapping[str, Any],
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    moves: torch.Tensor,
) -> None:
    """Makes a new estimate of the step size, in place, where there is something to make it of."""
    d = first["d"]
    d_hat = first["d_coef"] * numerator / denominator
    grown = torch.where(d == first["d0"], torch.maximum(d, d_hat), d) * first["growth_rate"]
    d_max = torch.maximum(first["d_max"], d_hat)
    new = (torch.minimum(d_max, grown), d_max, d_hat, numerator, denominator, first["k"] + 1)
    for name, value in zip(_ESTIMATE, new, strict=True):
        first[name].copy_(torch.where(moves, value, first[name]))


def _move(portion: _Portion, group: Mapping[str, Any], length: _Length) -> None:
    """Takes the step itself, by new moments and the new estimate."""
    stretch = length.stretch.masked_fill(~length.allowed, 0.0)
    if group["weight_decay"] != 0 and group["decouple"]:
        decay = torch._foreach_mul(portion.parameters, (group["weight_decay"] * stretch).float())
        torch._foreach_sub_(portion.parameters, decay)
    if group["betas"][0] == 0:
        # Without a first moment, prodigyopt takes gradients times the new estimate.
        stretch = stretch * group["d"] / length.d
    denominators = torch._foreach_sqrt(portion.exp_avg_sq)
    # Without `alpha`, torch would take the one number off the device.
    torch._foreach_add_(denominators, (group["d"] * group["eps"]).float(), alpha=1.0)
    # Infinite where nothing is to move.
    torch._foreach_div_(denominators, stretch.float())
    torch._foreach_addcdiv_(portion.parameters, portion.exp_avg, denominators, value=-1)


def _multiply(
    sources: list[torch.Tensor],
    factor: torch.Tensor,
    where: torch.Tensor,
    targets: list[torch.Tensor],
) -> None:
    """Sets to products if () `where` says so, and to zero otherwise, whatever the sources are.

    A factor of 0 would not do: what is not finite stays so. torch's kernel for SGD, whose step
    from zero is a product with its rate, leaves everything alone where it is told of infinities.
    """
    torch._foreach_zero_(targets)
    torch._fused_sgd_(
        targets,
        sources,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=factor.float(),
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~where).float(),
    )


def _decay(tensors: list[torch.Tensor], factor: float, where: torch.Tensor) -> None:
    """Scales tensors if () `where` says so."""
    ones = torch.ones_like(where, dtype=torch.float32)
    torch._foreach_mul_(tensors, ones.masked_fill_(where, factor))


def _size(tensors: list[torch.Tensor]) -> torch.Tensor:
    """() the sum of all magnitudes."""
    return torch.stack(torch._foreach_norm(tensors, 1)).sum(dtype=torch.float64)


def _sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """() the sum of all numbers; the negative ones are lost.

    There is no such sum of many tensors at once, but of magnitudes: those of the positive numbers,
    twice, less all of them.
    """
    size = _size(tensors)
    torch._foreach_clamp_min_(tensors, 0.0)
    return 2 * _size(tensors) - size


def _beta3(group: Mapping[str, Any]) -> float:
    beta3: float | None = group["beta3"]
    return math.sqrt(group["betas"][1]) if beta3 is None else beta3


def _bias_correction(group: Mapping[str, Any]) -> torch.Tensor | float:
    if not group["use_bias_correction"]:
        return 1.0
    (beta1, beta2), number = group["betas"], group["k"] + 1
    correction: torch.Tensor = (1 - beta2**number).sqrt() / (1 - beta1**number)
    return correction


def _on_device(rate: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    return rate.to(like) if isinstance(rate, torch.Tensor) else torch.full_like(like, rate)


def _shaped(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What prodigyopt keeps flat, and where all is zero as a single zero."""
    if values.shape == parameter.shape:
        return values
    return values.expand(parameter.numel()).reshape(parameter.shape).clone()
