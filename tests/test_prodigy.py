"""Prodigy without reading from the device, against prodigyopt's own steps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prodigyopt
import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import prodigy
from trainer.prodigy import Prodigy

SHAPES = [(4, 5), (7,), (3, 2, 2, 2), (6, 4)]
Gradients = list[torch.Tensor | None]
Rates = Callable[[int], tuple[float, float]]


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    # As the second matrices of adapters are.
    torch.nn.init.zeros_(made[1])
    return made


def pull(weights: Sequence[Parameter], step: int) -> Gradients:
    """Noisy gradients of a distance; one comes late, and one is missing now and then."""
    generator = torch.Generator().manual_seed(step + 1)
    pulls: Gradients = [
        p.detach() - 1 + 0.3 * torch.randn(p.shape, generator=generator) for p in weights
    ]
    if step % 7 == 3:
        pulls[0] = None
    if step < 10:
        pulls[3] = None
    return pulls


def built(kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    weights, decay = parameters(), options.pop("decay", 0.0)
    groups = [
        {"params": weights[:2], "weight_decay": decay},
        {"params": weights[2:], "weight_decay": decay / 2},
    ]
    return kind(groups, **options)


def weights_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take(optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
    for parameter, gradient in zip(weights_of(optimizer), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def compare(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for own, wanted in zip(weights_of(ours), weights_of(theirs), strict=True):
        # Some roundings of early steps, which are not much longer than those of 32 bits themselves.
        assert (own - wanted).norm() <= 5e-6 * wanted.norm()
    for name in ("d", "d_max", "d_numerator", "d_denom", "k"):
        own, wanted = (float(o.param_groups[1][name]) for o in (ours, theirs))
        assert own == pytest.approx(wanted, rel=3e-6), name


def take_side_by_side(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    steps: Sequence[int],
    rates: Rates = lambda step: (1.0, 1.0),
) -> None:
    """The same gradients for both: rounding must not come back in them."""
    for step in steps:
        for optimizer in (ours, theirs):
            for group, rate in zip(optimizer.param_groups, rates(step), strict=True):
                group["lr"] = rate
        gradients = pull(weights_of(theirs), step)
        take(theirs, gradients)
        take(ours, gradients)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"betas": (0.5, 0.9), "eps": 0.1},
    {"betas": (0.0, 0.99)},
    {"beta3": 0.5},
    {"use_bias_correction": True},
    {"safeguard_warmup": True},
    {"decay": 0.1},
    {"decay": 0.1, "decouple": False},
    {"growth_rate": 1.2},
    {"d_coef": 2.0, "d0": 1e-5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fifty_steps_are_prodigyopts(options: dict[str, Any]) -> None:
    ours, theirs = built(Prodigy, **options), built(prodigyopt.Prodigy, **options)
    take_side_by_side(ours, theirs, range(50))
    compare(ours, theirs)
    assert float(ours.param_groups[0]["d"]) > 100 * ours.param_groups[0]["d0"]


@pytest.mark.parametrize("safeguard", [True, False])
@pytest.mark.parametrize(
    "rates",
    [
        pytest.param(lambda step: (min(1.0, step / 5),) * 2, id="a warm-up from 0"),
        pytest.param(lambda step: (1.0, 0.0) if step % 2 else (0.0, 1.0), id="one group at a time"),
    ],
)
def test_other_learning_rates_give_prodigyopts_steps(rates: Rates, safeguard: bool) -> None:
    options = {"safeguard_warmup": safeguard, "use_bias_correction": True}
    ours, theirs = built(Prodigy, **options), built(prodigyopt.Prodigy, **options)
    take_side_by_side(ours, theirs, range(50), rates)
    compare(ours, theirs)


def test_nothing_happens_while_all_gradients_are_zero() -> None:
    ours = built(Prodigy, decay=0.1)
    before = [parameter.detach().clone() for parameter in weights_of(ours)]
    take(ours, [torch.zeros_like(parameter) for parameter in weights_of(ours)])
    assert all(map(torch.equal, weights_of(ours), before))
    assert float(ours.param_groups[0]["k"]) == 0


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_prodigyopts_checkpoint_goes_on_as_with_prodigyopt() -> None:
    theirs = built(prodigyopt.Prodigy, use_bias_correction=True)
    for step in range(12):
        take(theirs, pull(weights_of(theirs), step))
    ours = built(Prodigy, use_bias_correction=True)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    with torch.no_grad():
        for own, value in zip(weights_of(ours), weights_of(theirs), strict=True):
            own.copy_(value)
    take_side_by_side(ours, theirs, range(12, 30))
    compare(ours, theirs)


def test_what_was_saved_goes_on_bit_by_bit_with_one_estimate_for_all_groups() -> None:
    straight, resumed = (built(Prodigy, decay=0.1) for _ in range(2))
    for step in range(15):
        take(straight, pull(weights_of(straight), step))
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    with torch.no_grad():
        for own, value in zip(weights_of(resumed), weights_of(straight), strict=True):
            own.copy_(value)
    assert resumed.param_groups[0]["d"] is resumed.param_groups[1]["d"]
    for step in range(15, 25):
        gradients = pull(weights_of(straight), step)
        take(straight, gradients)
        take(resumed, gradients)
    assert all(map(torch.equal, weights_of(resumed), weights_of(straight)))


def everything(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All that an optimizer changes: weights, what it keeps of them, and the estimate."""
    yield from weights_of(optimizer)
    for state in optimizer.state.values():
        yield from state.values()
    yield from (v for v in optimizer.param_groups[0].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.9)}, {"decay": 0.1}], ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf, 1.0], ids=str)
def test_a_step_that_is_not_allowed_changes_nothing_and_is_not_counted(
    odd: float, options: dict[str, Any]
) -> None:
    ours = built(Prodigy, use_bias_correction=True, **options)
    for step in range(15):
        take(ours, pull(weights_of(ours), step))
    before = [tensor.detach().clone() for tensor in everything(ours)]
    assert len(before) == 4 + 4 * 4 + 6
    ours.found_inf = torch.ones(())
    take(ours, [torch.full_like(parameter, odd) for parameter in weights_of(ours)])
    assert all(map(torch.equal, everything(ours), before))
    ours.found_inf = torch.zeros(())
    take(ours, pull(weights_of(ours), 15))
    assert not any(map(torch.equal, weights_of(ours), before))


class Operations(TorchDispatchMode):
    """Counts operations on tensors, and numbers that are read from them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations_of_a_step(optimizer: torch.optim.Optimizer) -> Operations:
    for _ in range(2):
        for parameter in weights_of(optimizer):
            parameter.grad = torch.ones_like(parameter)
        with Operations() as operations:
            optimizer.step()
    return operations


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_a_step_takes_as_many_operations_for_300_parameters_as_for_3_and_reads_nothing(
    rate: float | torch.Tensor,
) -> None:
    few, many = (
        operations_of_a_step(Prodigy([Parameter(torch.ones(2, 3)) for _ in range(number)], lr=rate))
        for number in (3, 300)
    )
    assert few.count == many.count < 100
    assert many.reads == 0
    # The count counts: prodigyopt reads two sums for each parameter.
    theirs = operations_of_a_step(prodigyopt.Prodigy([Parameter(torch.ones(2)) for _ in range(3)]))
    assert theirs.reads == 2 * 3


def test_parameters_taken_portion_by_portion_are_updated_as_all_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, in_portions = built(Prodigy, decay=0.1), built(Prodigy, decay=0.1)
    for step in range(30):
        gradients = pull(weights_of(together), step)
        take(together, gradients)
        with monkeypatch.context() as patch:
            # The first two fit, each of the others is more by itself.
            patch.setattr(prodigy, "_TOGETHER_ON_PROCESSOR", 27 if step % 2 else 1)
            take(in_portions, gradients)
    compare(in_portions, together)


def test_a_learning_rate_in_a_tensor_is_that_of_a_number() -> None:
    numbers, tensors = built(Prodigy), built(Prodigy)
    for step in range(15):
        for group in numbers.param_groups:
            group["lr"] = step / 16
        for group in tensors.param_groups:
            group["lr"] = torch.tensor(step / 16)
        gradients = pull(weights_of(numbers), step)
        take(numbers, gradients)
        take(tensors, gradients)
    assert all(map(torch.equal, weights_of(numbers), weights_of(tensors)))
