"""Optimizers, parameter groups, learning-rate schedules and gradient clipping.

Takes parameters and the optimizer's own settings; steps are optimizer steps throughout. Knows
neither models nor processes.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from trainer import shards
from trainer.config import OptimConfig
from trainer.errors import InputError
from trainer.prodigy import Prodigy

# Learning rate at the end of `polynomial` (diffusers' and transformers' value).
POLYNOMIAL_END = 1e-7


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    Args:
        name: such as `denoiser`; kept in the optimizer's state.
        parameters: what learns.
        learning_rate: at the top of its course; set by the time a group is made.
        weight_decay: 0.0 is no decay, not a default.
    """

    name: str
    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float | None
    weight_decay: float


OptimizerGroups = list[dict[str, Any]]

# The optimizer whose state is in memory that GPU and computer share, and the fewest numbers of a
# tensor that bitsandbytes keeps there (0.50, `Optimizer8bit.get_state_buffer`).
_PAGED = "paged_adamw8bit"
_LEAST_PAGED = 100_000


def _adamw(groups: OptimizerGroups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon, fused=True
    )


def _adamw8bit_class(*, is_paged: bool = False) -> Callable[..., torch.optim.Optimizer]:
    # Its import warns of inference kernels that training never uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # Imported here alone: slow to load, and absent on some platforms.
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit  # noqa: PLC0415
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError.of(
            "optimizer",
            f"`adamw8bit` needs bitsandbytes, which cannot be loaded here: {error}",
            "run `pip install bitsandbytes`, or give `adamw`",
        ) from error
    build: Callable[..., torch.optim.Optimizer] = PagedAdamW8bit if is_paged else AdamW8bit
    return build


def _adamw8bit(groups: OptimizerGroups, optim: OptimConfig) -> torch.optim.Optimizer:
    betas = optim.adam_beta1, optim.adam_beta2
    build = _adamw8bit_class(is_paged=optim.optimizer == _PAGED)
    return build(groups, betas=betas, eps=optim.adam_epsilon)


def page_state(optimizer: torch.optim.Optimizer) -> None:
    """Moves what a paged optimizer was loaded with to where it keeps such state itself.

    bitsandbytes loads it as it would for one that is not paged: onto the GPU.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    # Imported by the optimizer already.
    functional: Any = importlib.import_module("bitsandbytes.functional")
    for parameter, values in optimizer.state.items():
        for name in ("state1", "state2"):
            held = values.get(name)
            if held is not None and held.numel() >= _LEAST_PAGED:
                paged = functional.get_paged(*held.shape, dtype=held.dtype, device=parameter.device)
                values[name] = paged.copy_(held)


def _adafactor(groups: OptimizerGroups, optim: OptimConfig) -> torch.optim.Optimizer:
    # The paper scales steps by the weights' size and by the step's number; without both, a step
    # is about as long as the learning rate, as AdamW's is. It keeps no first moment.
    optimizer: torch.optim.Optimizer = Adafactor(
        groups, beta1=None, scale_parameter=False, relative_step=False, warmup_init=False
    )
    return optimizer


def _prodigy(groups: OptimizerGroups, optim: OptimConfig) -> torch.optim.Optimizer:
    assert len({group["lr"] for group in groups}) == 1
    optimizer: torch.optim.Optimizer = Prodigy(
        groups,
        betas=(optim.adam_beta1, optim.adam_beta2),
        beta3=optim.prodigy_beta3,
        eps=optim.adam_epsilon,
        decouple=optim.prodigy_decouple,
        use_bias_correction=optim.prodigy_use_bias_correction,
        safeguard_warmup=optim.prodigy_safeguard_warmup,
        slice_p=1,
    )
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[OptimizerGroups, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    _PAGED: _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}


def _leave_out_in_kernel(optimizer: torch.optim.Optimizer, allowed: torch.Tensor) -> None:
    # The names by which torch's gradient scaler tells a fused kernel to change nothing; Prodigy
    # knows them, too.
    gated: Any = optimizer
    gated.grad_scale, gated.found_inf = None, (~allowed).float()
    optimizer.step()
    del gated.grad_scale, gated.found_inf


def _leave_out_gradients(optimizer: torch.optim.Optimizer, allowed: torch.Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~allowed, 0.0)
    optimizer.step()


# How each optimizer's step is kept from a gradient that is not finite. The first way changes
# nothing at all then; the second goes on with its momentum, in a run that ends at the next reading.
_GATES: Mapping[str, Callable[[torch.optim.Optimizer, torch.Tensor], None]] = {
    "adamw": _leave_out_in_kernel,
    "adamw8bit": _leave_out_gradients,
    _PAGED: _leave_out_gradients,
    "adafactor": _leave_out_gradients,
    "prodigy": _leave_out_in_kernel,
}


def step_where(optimizer: torch.optim.Optimizer, name: str, allowed: torch.Tensor | None) -> None:
    """One step of an optimizer, kept from the weights where it is not allowed.

    Args:
        optimizer: with its gradients in place.
        name: a key of `OPTIMIZERS`.
        allowed: () bool on the device, which nothing waits for. None: it is.
    """
    if allowed is None:
        optimizer.step()
    else:
        _GATES[name](optimizer, allowed)


# Optimizers whose steps a CUDA graph can hold, and what their groups are told then. The others
# cannot be: adamw8bit and adafactor count their steps on the processor.
CAPTURABLE: Mapping[str, Mapping[str, bool]] = {"adamw": {"capturable": True}, "prodigy": {}}


def make_capturable(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Lets a CUDA graph hold the optimizer's steps, and its schedule still set their rates.

    Learning rates become tensors on the device, always the same ones, which a schedule fills in
    place. What the optimizer saves has numbers in their place and can be loaded by any other.

    Args:
        optimizer: with its schedule; changed in place.
        name: a key of `CAPTURABLE`.
    """
    flags = CAPTURABLE[name]
    groups = optimizer.param_groups
    assert all("initial_lr" in group for group in groups)
    device = next(parameter.device for group in groups for parameter in group["params"])
    rates = [torch.tensor(group["lr"], device=device) for group in groups]

    def hold(optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update(flags, lr=rate.fill_(group["lr"]))

    def save(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.update(dict.fromkeys(flags, False), lr=float(group["lr"]))

    hold(optimizer)
    optimizer.register_load_state_dict_post_hook(hold)
    optimizer.register_state_dict_post_hook(save)
    # Steps outside a graph, which the first ones must be, are no mistake to be warned of.
    warned: Any = optimizer
    warned._warned_capturable_if_run_uncaptured = True


def refuse_unavailable(optim: OptimConfig) -> None:
    """Finds out before anything else is done whether the optimizer can run here.

    Raises:
        InputError: it needs a package that cannot be loaded, or a GPU.
    """
    if optim.optimizer == _PAGED and not torch.cuda.is_available():
        raise InputError.of("optimizer", f"`{_PAGED}` needs a GPU", "give `adamw8bit`")
    if optim.optimizer in ("adamw8bit", _PAGED):
        _adamw8bit_class()


def build_optimizer(groups: Sequence[ParameterGroup], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of the configuration over these groups.

    Raises:
        InputError: it cannot run on this machine.
    """
    assert all(group.learning_rate is not None for group in groups)
    return OPTIMIZERS[optim.optimizer](
        [
            {
                "name": group.name,
                "params": list(group.parameters),
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        optim,
    )


def enter_phase(
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    *,
    frozen: Sequence[torch.nn.Parameter],
    staying: Sequence[torch.nn.Parameter],
) -> None:
    """Makes the optimizer forget what learns no more; to be called once at each change.

    Args:
        optimizer: changed in place.
        optim: its settings.
        frozen: what has learnt for the last time; its state is given up.
        staying: what has learnt and goes on.
    """
    for parameter in frozen:
        optimizer.state.pop(parameter, None)
    if isinstance(optimizer, Prodigy):
        optimizer.estimate_anew(staying)


@dataclass(frozen=True)
class Course:
    """What a learning rate's course depends on besides the step.

    Args:
        peak: the group's learning rate.
        num_cycles: restarts of `cosine_with_restarts`.
        power: exponent of `polynomial`.
    """

    peak: float
    num_cycles: int
    power: float


def _polynomial(progress: float, course: Course) -> float:
    end = min(1.0, POLYNOMIAL_END / course.peak)
    return end + float((1 - end) * (1 - progress) ** course.power)


def _cosine_with_restarts(progress: float, course: Course) -> float:
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (course.num_cycles * progress % 1)))


# Schedule to the factor on the group's learning rate, from the progress after warm-up in [0, 1].
SCHEDULES: Mapping[str, Callable[[float, Course], float]] = {
    "constant": lambda progress, course: 1.0,
    "constant_with_warmup": lambda progress, course: 1.0,
    "linear": lambda progress, course: 1 - progress,
    "cosine": lambda progress, course: 0.5 * (1 + math.cos(math.pi * progress)),
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}


def learning_rate_factor(step: int, total_steps: int, optim: OptimConfig, *, peak: float) -> float:
    """The factor on a group's learning rate in one optimizer step.

    The warm-up rises linearly from 0 and is left out by `constant`; the rest of the steps is
    the course of `lr_scheduler` (the formulas of diffusers' `get_scheduler`).

    Args:
        step: optimizer steps already done.
        total_steps: optimizer steps of the whole run.
        optim: schedule, warm-up, cycles and power.
        peak: the group's learning rate.
    """
    warmup = 0 if optim.lr_scheduler == "constant" else optim.lr_warmup_steps
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    course = Course(peak, optim.lr_num_cycles, optim.lr_power)
    return SCHEDULES[optim.lr_scheduler](progress, course)


class LearningRates(LambdaLR):
    """The course of every group's learning rate, told without asking the device."""

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The rates of the coming step, as numbers, be they tensors in the optimizer."""
        courses = zip(self.base_lrs, self.lr_lambdas, strict=True)
        return [peak * factor(self.last_epoch) for peak, factor in courses]

    def state_dict(self) -> dict[str, Any]:
        """What goes on from here, as JSON can hold it."""
        return super().state_dict() | {"_last_lr": self.get_last_lr()}


def build_schedule(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, total_steps: int
) -> LearningRates:
    """The course of every group's learning rate; to be stepped once an optimizer step."""

    def factor_of(peak: float) -> Callable[[int], float]:
        return lambda step: learning_rate_factor(step, total_steps, optim, peak=peak)

    return LearningRates(optimizer, [factor_of(group["lr"]) for group in optimizer.param_groups])


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales all gradients together down to a norm, and returns the norm they had.

    Args:
        parameters: those without a gradient are passed over; of sharded ones, all parts count.
        max_norm: largest L2 norm; 0: leave the gradients alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if shards.is_sharded(gradient)]
    whole = [gradient for gradient in gradients if not shards.is_sharded(gradient)]
    norm = total_norm([*_norms_of(whole), *([shards.norm(sharded)] if sharded else [])])
    if max_norm > 0 and gradients:
        # The factor of `torch.nn.utils.clip_grad_norm_`, which cannot mix sharded ones with others.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for alike in _by_format([*whole, *map(shards.part, sharded)]):
            torch._foreach_mul_(alike, factor)
    return norm


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm of one gradient, in 32 bits whatever the gradient is kept in."""
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def total_norm(norms: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of everything together, from the norm of each part; 0 of nothing."""
    parts = list(norms)
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())
    return norm


def _norms_of(gradients: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As `norm_of` each, in one operation for a number format."""
    for alike in _by_format(gradients):
        yield from torch._foreach_norm(alike, dtype=torch.float32)


def _by_format(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    # Over several formats, torch goes one by one.
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        yield [gradient for gradient in gradients if gradient.dtype == dtype]
