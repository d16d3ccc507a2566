"""Optimizers against hand-rolled arithmetic and the packages they come from; schedules against
closed forms and diffusers."""

from __future__ import annotations

import io
import json
import math
import sys
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from prodigyopt import Prodigy
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import OptimConfig
from trainer.errors import InputError
from trainer.optim import (
    CAPTURABLE,
    OPTIMIZERS,
    ParameterGroup,
    build_optimizer,
    build_schedule,
    clip,
    enter_phase,
    make_capturable,
    page_state,
    refuse_unavailable,
    step_where,
)

SCHEDULERS = [
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
]


def gradients(steps: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(steps)]


def one_way(steps: int) -> list[torch.Tensor]:
    """Gradients of mostly one direction, under which Prodigy's estimate of d grows."""
    return [1 + 0.3 * grad for grad in gradients(steps, 4, 5)]


def group_of(
    *parameters: Parameter, lr: float = 1e-3, decay: float = 0.0, name: str = "denoiser"
) -> ParameterGroup:
    return ParameterGroup(name, parameters, learning_rate=lr, weight_decay=decay)


def train(
    optimizer: torch.optim.Optimizer, parameter: Parameter, grads: list[torch.Tensor]
) -> torch.Tensor:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach().clone()


def trajectory(grads: list[torch.Tensor], *, lr: float = 1e-3, **options: Any) -> torch.Tensor:
    parameter = Parameter(torch.ones_like(grads[0]))
    decay = options.pop("decay", 0.0)
    optimizer = build_optimizer([group_of(parameter, lr=lr, decay=decay)], OptimConfig(**options))
    return train(optimizer, parameter, grads)


def adamw_by_hand(
    grads: list[torch.Tensor], *, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> torch.Tensor:
    """Loshchilov & Hutter 2019, algorithm 2, in double precision."""
    weight = torch.ones_like(grads[0], dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for number, grad in enumerate(grads, start=1):
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad.double() ** 2
        update = (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + eps)
        weight = weight - lr * update - lr * decay * weight
    return weight.float()


@pytest.mark.parametrize(
    ("beta1", "beta2", "eps", "decay"),
    [
        (0.9, 0.999, 1e-8, 1e-4),
        (0.5, 0.999, 1e-8, 1e-4),
        (0.9, 0.7, 1e-8, 1e-4),
        (0.9, 0.999, 1.0, 1e-4),
        (0.9, 0.999, 1e-8, 0.5),
    ],
)
def test_adamw_takes_the_papers_steps(beta1: float, beta2: float, eps: float, decay: float) -> None:
    grads = gradients(3, 4, 5)
    weights = trajectory(
        grads, lr=1e-2, decay=decay, adam_beta1=beta1, adam_beta2=beta2, adam_epsilon=eps
    )
    expected = adamw_by_hand(grads, lr=1e-2, beta1=beta1, beta2=beta2, eps=eps, decay=decay)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lr", [8e-5, 2e-3])
def test_the_first_adamw_step_is_as_long_as_the_learning_rate(lr: float) -> None:
    moved = trajectory(gradients(1, 100), lr=lr) - 1
    assert moved.abs().max().item() == pytest.approx(lr, rel=1e-3)


def test_a_large_epsilon_shortens_the_first_step_to_g_over_g_plus_one() -> None:
    grad = torch.tensor([0.25])
    moved = trajectory([grad], lr=0.1, adam_epsilon=1.0) - 1
    assert moved.item() == pytest.approx(-0.1 * 0.25 / 1.25, rel=1e-5)


@pytest.mark.parametrize("decay", [0.5, 1e-3, 0.0])
def test_a_weight_without_gradient_shrinks_by_one_minus_rate_times_decay(decay: float) -> None:
    weights = trajectory([torch.zeros(3)], lr=1e-2, decay=decay)
    assert weights.tolist() == pytest.approx([1 - 1e-2 * decay] * 3, rel=1e-7)
    assert decay > 0 or weights.tolist() == [1.0] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_each_group_has_its_own_decay_and_an_explicit_zero_is_zero(optimizer: str) -> None:
    shrinking, staying, learning = (Parameter(torch.ones(2)) for _ in range(3))
    groups = [
        group_of(shrinking, lr=1.0, decay=0.5),
        group_of(staying, lr=1.0, decay=0.0, name="text_encoder"),
        group_of(learning, lr=1.0, name="other"),
    ]
    built = build_optimizer(groups, OptimConfig(optimizer=optimizer))
    shrinking.grad, staying.grad = torch.zeros(2), torch.zeros(2)
    learning.grad = torch.ones(2)
    built.step()
    assert staying.tolist() == [1.0, 1.0]
    assert shrinking.max() < 1.0


def test_groups_keep_their_learning_rates_and_names_apart() -> None:
    first, second = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    groups = [group_of(first, lr=1e-2), group_of(second, lr=1e-4, name="text_encoder")]
    optimizer = build_optimizer(groups, OptimConfig())
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert (1 - first).tolist() == pytest.approx([1e-2] * 2, rel=1e-4)
    assert (1 - second).tolist() == pytest.approx([1e-4] * 2, rel=1e-3)
    assert [group["name"] for group in optimizer.param_groups] == ["denoiser", "text_encoder"]


def test_a_group_without_a_learning_rate_is_our_own_mistake() -> None:
    group = ParameterGroup("denoiser", [Parameter(torch.ones(1))], None, 0.0)
    with pytest.raises(AssertionError):
        build_optimizer([group], OptimConfig())


def test_adamw8bit_takes_nearly_the_step_of_adamw() -> None:
    # 8192 numbers: bitsandbytes keeps smaller tensors in 32 bits.
    grads = gradients(1, 64, 128)
    eight_bits = trajectory(grads, optimizer="adamw8bit")
    full = trajectory(grads, optimizer="adamw")
    assert (eight_bits - full).abs().max() < 1e-5
    assert (full - 1).abs().max() > 9e-4


def test_adamw8bit_keeps_its_state_in_bytes() -> None:
    parameter = Parameter(torch.ones(64, 128))
    optimizer = build_optimizer([group_of(parameter)], OptimConfig(optimizer="adamw8bit"))
    train(optimizer, parameter, gradients(1, 64, 128))
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8


def test_what_a_paged_optimizer_was_loaded_with_goes_back_to_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shared(*shape: int, dtype: torch.dtype, device: torch.device) -> Any:
        memory: Any = torch.empty(shape, dtype=dtype)
        memory.is_paged = True
        return memory

    monkeypatch.setattr("bitsandbytes.functional.get_paged", shared)
    large, small = (Parameter(torch.ones(side, side)) for side in (320, 100))
    optimizer: Any = build_optimizer(
        [group_of(large), group_of(small)], OptimConfig(optimizer="paged_adamw8bit")
    )
    # bitsandbytes itself pages nothing on a processor, and warns of it.
    with pytest.warns(UserWarning, match="Paged"):
        for parameter in (large, small):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    before = {p: optimizer.state[p]["state1"].clone() for p in (large, small)}
    page_state(optimizer)
    for parameter, is_paged in ((large, True), (small, False)):
        held = optimizer.state[parameter]["state1"]
        assert torch.equal(held, before[parameter])
        assert getattr(held, "is_paged", False) is is_paged


def test_a_paged_optimizer_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a GPU"):
        refuse_unavailable(OptimConfig(optimizer="paged_adamw8bit"))


def test_adamw8bit_without_bitsandbytes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(InputError, match="`optimizer`: `adamw8bit` needs bitsandbytes") as caught:
        trajectory(gradients(1, 4), optimizer="adamw8bit")
    assert "`adamw`" in caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"prodigy_beta3": 0.5}, {"beta3": 0.5}),
        ({"prodigy_decouple": False, "decay": 0.1}, {"decouple": False, "weight_decay": 0.1}),
        ({"prodigy_use_bias_correction": False}, {"use_bias_correction": False}),
        ({"prodigy_safeguard_warmup": False}, {"safeguard_warmup": False}),
        (
            {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 0.1},
            {"betas": (0.5, 0.9), "eps": 0.1},
        ),
    ],
)
def test_prodigy_takes_prodigyopts_steps(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    grads = one_way(30)
    reference = Parameter(torch.ones(4, 5))
    defaults = {"use_bias_correction": True, "safeguard_warmup": True}
    expected = train(Prodigy([reference], **{**defaults, **theirs}), reference, grads)
    weights = trajectory(grads, lr=1.0, optimizer="prodigy", **ours)
    # Both are rounded, in another order.
    torch.testing.assert_close(weights - 1, expected - 1, rtol=1e-4, atol=0)
    assert (weights - 1).abs().min() > 1e-5


@pytest.mark.parametrize(
    "option",
    [
        {"prodigy_beta3": 0.5},
        {"prodigy_use_bias_correction": False},
        {"prodigy_decouple": False},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 0.1},
    ],
)
def test_each_prodigy_option_changes_the_steps(option: dict[str, Any]) -> None:
    grads = one_way(30)
    weights = [
        trajectory(grads, lr=1.0, optimizer="prodigy", decay=0.1, **options)
        for options in ({}, option)
    ]
    assert not torch.equal(*weights)


def test_prodigy_without_beta3_uses_the_root_of_beta2() -> None:
    grads = [torch.ones(4)] * 4
    default = trajectory(grads, lr=1.0, optimizer="prodigy")
    root = trajectory(grads, lr=1.0, optimizer="prodigy", prodigy_beta3=math.sqrt(0.999))
    assert torch.equal(default, root)


def test_prodigys_bias_correction_scales_the_first_step_by_its_term() -> None:
    # From zero a step is exactly the update; the paper's term is sqrt(1 - beta2) / (1 - beta1).
    moved = []
    for flag in (True, False):
        parameter = Parameter(torch.zeros(4))
        options = OptimConfig(optimizer="prodigy", prodigy_use_bias_correction=flag)
        optimizer = build_optimizer([group_of(parameter, lr=1.0)], options)
        moved.append(train(optimizer, parameter, [torch.ones(4)]))
    ratio = (moved[0] / moved[1]).tolist()
    assert ratio == pytest.approx([math.sqrt(1 - 0.999) / (1 - 0.9)] * 4, rel=1e-5)


@pytest.mark.parametrize("safeguard", [True, False])
def test_prodigys_safeguard_keeps_a_low_rate_out_of_its_estimate(safeguard: bool) -> None:
    # With the learning rate at 0.5 the two denominators differ by just that factor.
    parameter = Parameter(torch.ones(4))
    options = OptimConfig(
        optimizer="prodigy",
        prodigy_safeguard_warmup=safeguard,
        prodigy_use_bias_correction=False,
    )
    optimizer = build_optimizer([group_of(parameter, lr=0.5)], options)
    train(optimizer, parameter, [torch.ones(4)])
    factor = 1.0 if safeguard else 0.5
    # d and d0 are 1e-6: s = 1e-6 * factor for each of the four ones.
    assert float(optimizer.param_groups[0]["d_denom"]) == pytest.approx(4 * 1e-6 * factor)


def test_prodigys_decoupled_decay_leaves_the_moments_alone() -> None:
    moments = {}
    for decouple in (True, False):
        parameter, other = Parameter(torch.ones(4)), Parameter(torch.ones(4))
        options = OptimConfig(optimizer="prodigy", prodigy_decouple=decouple)
        optimizer = build_optimizer([group_of(parameter, other, lr=1.0, decay=0.5)], options)
        other.grad = torch.ones(4)
        train(optimizer, parameter, [torch.zeros(4)])
        moments[decouple] = optimizer.state[parameter]["exp_avg"].abs().max()
    assert moments[True] == 0
    assert moments[False] > 0


def test_prodigy_talks_to_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    trajectory(gradients(1, 4), lr=1.0, decay=0.1, optimizer="prodigy")
    assert capsys.readouterr().out == ""


def test_prodigy_learns_a_toy_problem_at_rate_one() -> None:
    weight = Parameter(torch.zeros(2))
    goal = torch.tensor([1.0, -2.0])
    optimizer = build_optimizer([group_of(weight, lr=1.0)], OptimConfig(optimizer="prodigy"))
    for _ in range(400):
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
    assert (weight - goal).square().sum() < 0.05


def rates(
    optim: OptimConfig, total_steps: int, *, peak: float = 8e-5, steps: int | None = None
) -> list[float]:
    parameter = Parameter(torch.ones(1))
    optimizer = build_optimizer([group_of(parameter, lr=peak)], optim)
    schedule = build_schedule(optimizer, optim, total_steps)
    used = []
    for _ in range(steps or total_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_follow_diffusers(name: str, warmup: int) -> None:
    optim = OptimConfig(lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=2.0)
    reference = torch.optim.SGD([Parameter(torch.ones(1))], lr=8e-5)
    schedule = get_scheduler(name, reference, None, warmup, 20, num_cycles=3, power=2.0)
    expected = []
    for _ in range(20):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()
    assert rates(optim, 20) == pytest.approx(expected, rel=1e-9)


CLOSED_FORMS = {
    "constant": lambda s: 1.0,
    "constant_with_warmup": lambda s: s / 4 if s < 4 else 1.0,
    "linear": lambda s: s / 4 if s < 4 else (20 - s) / 16,
    "cosine": lambda s: s / 4 if s < 4 else math.cos(math.pi / 2 * (s - 4) / 16) ** 2,
    "cosine_with_restarts": lambda s: (
        s / 4 if s < 4 else math.cos(math.pi / 2 * (2 * (s - 4) / 16 % 1)) ** 2
    ),
    "polynomial": lambda s: (
        s / 4 if s < 4 else ((8e-5 - 1e-7) * ((20 - s) / 16) ** 3 + 1e-7) / 8e-5
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_follow_their_closed_forms(name: str) -> None:
    optim = OptimConfig(lr_scheduler=name, lr_warmup_steps=4, lr_num_cycles=2, lr_power=3.0)
    expected = [8e-5 * CLOSED_FORMS[name](step) for step in range(20)]
    assert rates(optim, 20) == pytest.approx(expected, rel=1e-9)


def test_warmup_rises_from_zero_in_equal_steps() -> None:
    optim = OptimConfig(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    assert rates(optim, 6, peak=1.0) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_has_no_warmup() -> None:
    assert rates(OptimConfig(lr_warmup_steps=500), 3, peak=1.0) == [1.0, 1.0, 1.0]


def test_a_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    optim = OptimConfig(lr_scheduler="cosine", lr_warmup_steps=500)
    # 99 / 500 of 8e-5.
    assert max(rates(optim, 100)) == pytest.approx(1.584e-5)


@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_restarts_jump_to_the_peak_once_less_than_there_are_cycles(cycles: int) -> None:
    optim = OptimConfig(lr_scheduler="cosine_with_restarts", lr_num_cycles=cycles)
    used = rates(optim, 40, peak=1.0)
    jumps = [after for before, after in zip(used, used[1:], strict=False) if after > before]
    assert jumps == [1.0] * (cycles - 1)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "cosine_with_restarts"])
def test_cycles_matter_to_restarts_alone(name: str) -> None:
    curves = [rates(OptimConfig(lr_scheduler=name, lr_num_cycles=n), 20) for n in (1, 4)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "polynomial"])
def test_power_matters_to_polynomial_alone(name: str) -> None:
    curves = [rates(OptimConfig(lr_scheduler=name, lr_power=power), 20) for power in (1.0, 3.0)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_at_half_time_is_the_rate_times_half_to_the_power(power: float) -> None:
    optim = OptimConfig(lr_scheduler="polynomial", lr_power=power)
    middle = rates(optim, 20)[10]
    assert middle == pytest.approx((8e-5 - 1e-7) * 0.5**power + 1e-7)


def test_polynomial_ends_at_the_same_rate_in_every_group() -> None:
    # The end is 1e-7 whatever a group starts from, and never above where it started.
    optim = OptimConfig(lr_scheduler="polynomial")
    groups = [group_of(Parameter(torch.ones(1)), lr=lr, name=str(lr)) for lr in (1e-2, 8e-5, 5e-8)]
    optimizer = build_optimizer(groups, optim)
    schedule = build_schedule(optimizer, optim, 5)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1e-7, 1e-7, 5e-8])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_stay_finite_past_their_end_and_in_a_run_of_one_step(name: str) -> None:
    optim = OptimConfig(lr_scheduler=name)
    for used in (rates(optim, 1, steps=3), rates(optim, 10, steps=15)):
        assert all(0 <= rate <= 8e-5 for rate in used)


def parameters_with_gradients() -> list[Parameter]:
    parameters = [Parameter(torch.zeros(2)), Parameter(torch.zeros(1)), Parameter(torch.zeros(3))]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([4.0])
    return parameters


def test_clipping_scales_all_gradients_together() -> None:
    parameters = parameters_with_gradients()
    norm = clip(parameters, 1.0)
    # 3² + 4² = 5².
    assert norm.item() == pytest.approx(5.0)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
    assert parameters[1].grad is not None
    assert parameters[1].grad.tolist() == pytest.approx([0.8], rel=1e-5)
    assert parameters[2].grad is None


@pytest.mark.parametrize("max_norm", [0.0, 10.0])
def test_zero_and_a_large_norm_leave_gradients_untouched(max_norm: float) -> None:
    parameters = parameters_with_gradients()
    norm = clip(parameters, max_norm)
    assert norm.item() == pytest.approx(5.0)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [3.0, 0.0]


def test_the_norm_of_a_broken_gradient_is_seen() -> None:
    parameters = parameters_with_gradients()
    parameters[1].grad = torch.tensor([float("nan")])
    assert not torch.isfinite(clip(parameters, 0.0))


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0])
def test_gradients_of_several_formats_are_clipped_as_torch_clips_them(largest: float) -> None:
    def gradients_of_two_formats() -> list[Parameter]:
        parameters = [Parameter(grad.clone()) for grad in gradients(4, 3, 5)]
        parameters += [Parameter(grad.bfloat16()) for grad in gradients(2, 40, 50)]
        for parameter in parameters[1:]:
            parameter.grad = parameter.detach() * 2
        return parameters

    ours, theirs = gradients_of_two_formats(), gradients_of_two_formats()
    norm = clip(iter(ours), largest)
    own = [p.grad for p in theirs if p.grad is not None]
    # Sums of 2000 squares: bf16 has three digits.
    exact = torch.stack([grad.double().norm() for grad in own]).norm()
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
    torch.nn.utils.clip_grads_with_norm_(theirs, largest or math.inf, norm)
    assert ours[0].grad is None
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_there_is_nothing_to_clip_without_gradients() -> None:
    assert clip([Parameter(torch.ones(2))], 1.0).item() == 0.0


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_clipping_takes_as_many_operations_for_300_gradients_as_for_3() -> None:
    counts = []
    for number in (3, 300):
        parameters = [Parameter(torch.ones(2, 3)) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.ones(2, 3)
        with Operations() as operations:
            norm = clip(parameters, 1.0)
        assert norm.item() == pytest.approx(math.sqrt(6 * number))
        counts.append(operations.count)
    assert counts[0] == counts[1] < 10


def prepared(name: str, *, capturable: bool) -> tuple[list[Parameter], torch.optim.Optimizer, Any]:
    """An optimizer with a schedule; its parameters have gradients that stay in their places."""
    optim = OptimConfig(optimizer=name, lr_scheduler="cosine", lr_warmup_steps=3)
    parameters = [Parameter(torch.ones(4, 5)), Parameter(torch.ones(3))]
    groups = [group_of(p, lr=0.5, decay=0.1, name=str(p.numel())) for p in parameters]
    optimizer = build_optimizer(groups, optim)
    schedule = build_schedule(optimizer, optim, 20)
    if capturable:
        make_capturable(optimizer, name)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters, optimizer, schedule


def go_through(
    name: str, steps: range, training: tuple[list[Parameter], torch.optim.Optimizer, Any]
) -> None:
    """Does what a graph does, step by step: the same operations, on the same tensors."""
    parameters, optimizer, schedule = training
    grads = [gradients(20, *parameter.shape) for parameter in parameters]
    allowed = torch.ones((), dtype=torch.bool)
    for step in steps:
        for parameter, of_all_steps in zip(parameters, grads, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(of_all_steps[step] + 1)
        allowed.fill_(step != 7)
        step_where(optimizer, name, allowed)
        schedule.step()


@pytest.mark.parametrize("name", CAPTURABLE)
def test_an_optimizer_made_ready_for_a_graph_follows_its_schedule_in_the_same_places(
    name: str,
) -> None:
    plain, ready = (prepared(name, capturable=capturable) for capturable in (False, True))
    rates = [group["lr"] for group in ready[1].param_groups]
    go_through(name, range(1), ready)
    places = {
        value.data_ptr()
        for state in (*ready[1].state.values(), *ready[1].param_groups)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    go_through(name, range(1, 20), ready)
    go_through(name, range(20), plain)
    for own, wanted in zip(ready[0], plain[0], strict=True):
        # A rate has 32 bits, of a number's 64.
        torch.testing.assert_close(own - 1, wanted - 1, rtol=1e-5, atol=0)
    assert all(g["lr"] is rate for g, rate in zip(ready[1].param_groups, rates, strict=True))
    assert len(places) > 2 + 2 * 2
    assert places == {
        value.data_ptr()
        for state in (*ready[1].state.values(), *ready[1].param_groups)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("name", CAPTURABLE)
def test_rates_of_an_optimizer_ready_for_a_graph_are_told_and_kept_as_numbers(name: str) -> None:
    plain, ready = (prepared(name, capturable=capturable) for capturable in (False, True))
    for training in (plain, ready):
        go_through(name, range(5), training)
    assert ready[2].get_last_lr() == plain[2].get_last_lr()
    assert json.dumps(ready[2].state_dict()) == json.dumps(plain[2].state_dict())
    for own, wanted in zip(
        ready[1].state_dict()["param_groups"], plain[1].state_dict()["param_groups"], strict=True
    ):
        assert own.keys() == wanted.keys()
        assert own["lr"] == pytest.approx(wanted["lr"], rel=1e-7)
        assert own.get("capturable") == wanted.get("capturable")


@pytest.mark.parametrize("name", CAPTURABLE)
@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_a_checkpoint_goes_on_with_a_graph_or_without(name: str, first: bool, then: bool) -> None:
    straight, resumed = (prepared(name, capturable=capturable) for capturable in (first, then))
    go_through(name, range(10), straight)
    file = io.BytesIO()
    torch.save([straight[1].state_dict(), straight[2].state_dict()], file)
    file.seek(0)
    optimizer_state, schedule_state = torch.load(file, weights_only=True)
    rates = [group["lr"] for group in resumed[1].param_groups]
    resumed[1].load_state_dict(optimizer_state)
    resumed[2].load_state_dict(schedule_state)
    for own, weights in zip(resumed[0], straight[0], strict=True):
        own.data.copy_(weights)
    if then:
        # The tensors that a graph may know already.
        assert all(g["lr"] is rate for g, rate in zip(resumed[1].param_groups, rates, strict=True))
    for training in (straight, resumed):
        go_through(name, range(10, 20), training)
    for own, wanted in zip(resumed[0], straight[0], strict=True):
        torch.testing.assert_close(own, wanted, rtol=0 if first == then else 1e-6, atol=0)


def test_what_is_said_of_graphs_is_said_of_optimizers_that_there_are() -> None:
    assert CAPTURABLE.keys() < OPTIMIZERS.keys()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_five_steps_and_a_resume_equal_ten_steps(name: str) -> None:
    grads = gradients(10, 64, 128)
    optim = OptimConfig(optimizer=name, lr_scheduler="cosine", lr_warmup_steps=3)

    def start(weights: torch.Tensor) -> tuple[Parameter, torch.optim.Optimizer, Any]:
        parameter = Parameter(weights.clone())
        optimizer = build_optimizer([group_of(parameter, lr=1.0, decay=0.01)], optim)
        return parameter, optimizer, build_schedule(optimizer, optim, 10)

    def go_on(state: tuple[Parameter, torch.optim.Optimizer, Any], part: slice) -> None:
        parameter, optimizer, schedule = state
        for grad in grads[part]:
            train(optimizer, parameter, [grad])
            schedule.step()

    straight = start(torch.ones(64, 128))
    go_on(straight, slice(0, 10))
    before = start(torch.ones(64, 128))
    go_on(before, slice(0, 5))
    file = io.BytesIO()
    torch.save([before[1].state_dict(), before[2].state_dict()], file)
    file.seek(0)
    optimizer_state, schedule_state = torch.load(file, weights_only=True)
    after = start(before[0].detach())
    after[1].load_state_dict(optimizer_state)
    after[2].load_state_dict(schedule_state)
    go_on(after, slice(5, 10))
    assert torch.equal(after[0], straight[0])
    assert not torch.equal(after[0], before[0])


def two_parts(name: str) -> tuple[Parameter, Parameter, torch.optim.Optimizer, OptimConfig]:
    """A denoiser of small wavering gradients and tokens that all gradients push one way."""
    optim = OptimConfig(optimizer=name)
    denoiser, tokens = Parameter(torch.ones(8)), Parameter(torch.ones(4))
    groups = [
        ParameterGroup("denoiser", [denoiser], learning_rate=1.0, weight_decay=0.0),
        ParameterGroup("tokens", [tokens], learning_rate=1.0, weight_decay=0.0),
    ]
    return denoiser, tokens, build_optimizer(groups, optim), optim


def step_both(denoiser: Parameter, tokens: Parameter, optimizer: torch.optim.Optimizer) -> None:
    for number in range(50):
        denoiser.grad = torch.full((8,), 1e-3 * (-1) ** number)
        tokens.grad = torch.ones(4)
        optimizer.step()
    denoiser.grad = tokens.grad = None


def test_prodigys_step_size_does_not_leap_when_a_part_is_frozen() -> None:
    sizes = {}
    for told in (False, True):
        denoiser, tokens, optimizer, optim = two_parts("prodigy")
        step_both(denoiser, tokens, optimizer)
        before = float(optimizer.param_groups[0]["d"])
        if told:
            enter_phase(optimizer, optim, frozen=[tokens], staying=[denoiser])
        for number in range(5):
            denoiser.grad = torch.full((8,), 1e-3 * (-1) ** number)
            optimizer.step()
        sizes[told] = float(optimizer.param_groups[0]["d"]) / before
    assert sizes[True] == pytest.approx(1.0)
    # Left alone, the tokens would stay in the numerator of an estimate that they have left.
    assert sizes[False] > 10


def test_what_stays_keeps_prodigys_step_size_and_its_moments() -> None:
    denoiser, tokens, optimizer, optim = two_parts("prodigy")
    step_both(denoiser, tokens, optimizer)
    size = float(optimizer.param_groups[0]["d"])
    moment = optimizer.state[denoiser]["exp_avg"].clone()
    enter_phase(optimizer, optim, frozen=[tokens], staying=[denoiser])
    assert optimizer.param_groups[0]["d"] == size > optimizer.param_groups[0]["d0"]
    assert torch.equal(optimizer.state[denoiser]["exp_avg"], moment)
    assert torch.equal(optimizer.state[denoiser]["p0"], denoiser.detach())


def test_what_starts_alone_with_prodigy_starts_as_with_a_new_one() -> None:
    grads = gradients(5, 8)
    denoiser, tokens, optimizer, optim = two_parts("prodigy")
    for grad in gradients(20, 4):
        tokens.grad = grad
        optimizer.step()
    tokens.grad = None
    enter_phase(optimizer, optim, frozen=[tokens], staying=[])
    train(optimizer, denoiser, grads)
    alone = Parameter(torch.ones(8))
    train(build_optimizer([group_of(alone, lr=1.0, decay=0.0)], optim), alone, grads)
    assert torch.equal(denoiser, alone)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_a_part_that_is_frozen_for_good_leaves_no_state(name: str) -> None:
    denoiser, tokens, optimizer, optim = two_parts(name)
    step_both(denoiser, tokens, optimizer)
    frozen = tokens.detach().clone()
    enter_phase(optimizer, optim, frozen=[tokens], staying=[denoiser])
    assert tokens not in optimizer.state
    assert len(optimizer.state_dict()["state"]) == 1
    denoiser.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(tokens, frozen)


def test_a_parameter_that_never_had_a_gradient_may_stay() -> None:
    denoiser, tokens, optimizer, optim = two_parts("prodigy")
    tokens.grad = torch.ones(4)
    optimizer.step()
    enter_phase(optimizer, optim, frozen=[], staying=[denoiser, tokens])
    assert denoiser not in optimizer.state
