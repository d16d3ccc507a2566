"""The same adapted layers twice: as PEFT computes them, and as the trainer does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Conv2d, Linear

from trainer import adapters
from trainer.config import AdapterConfig

# Every form of an adapter; LoKr's second factor is whole or, at a low rank, a product of two.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "rank": 8},
    "factored lokr": {"lora_type": "lokr", "rank": 1},
    "loha": {"lora_type": "loha"},
    "thin loha": {"lora_type": "loha", "rank": 2},
}

# Layers of a kind each, with the shape of their inputs.
LAYERS: Mapping[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: Linear(24, 40), (6, 24)),
    "rows of pictures": (lambda: Linear(24, 40), (2, 5, 24)),
    "no bias": (lambda: Linear(24, 16, bias=False), (2, 5, 24)),
    "3 x 3": (lambda: Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
    "3 x 3, every second": (lambda: Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 5)),
    "1 x 1, no bias": (lambda: Conv2d(8, 12, 1, bias=False), (2, 8, 6, 5)),
    "1 x 1, every second": (lambda: Conv2d(8, 12, 1, stride=2), (2, 8, 6, 5)),
}


def adapted(layer: torch.nn.Module, form: str, whose: str, **leaves: Any) -> torch.nn.Module:
    """A model of one layer with an adapter that has learnt something.

    Args:
        layer: taken over; its weights are drawn anew, always the same.
        form: in `FORMS`.
        whose: `ours` or `peft`.
        leaves: of the adapter.
    """
    module = torch.nn.Sequential(layer).requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / 5)
    return with_adapter(module, form, whose, ["0"], **leaves)


def with_adapter(
    module: torch.nn.Module, form: str, whose: str, layers: list[str], **leaves: Any
) -> torch.nn.Module:
    """Puts an adapter that has learnt something on layers of a model."""
    asked = {"rank": 4, "alpha": 6.0, "adapter_layers": whose, **FORMS[form], **leaves}
    adapter = AdapterConfig.model_validate(asked)
    adapters.add_adapter(module, adapter, layers, component="it", seed=0)
    learn_something(module)
    return module


def learn_something(module: torch.nn.Module, seed: int = 2) -> None:
    """Moves every weight that learns, always the same way."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning(module).values():
            moved = torch.randn(parameter.shape, generator=draw)
            parameter.add_(moved.to(parameter.dtype) / 10)


def learning(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What learns, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def computed(
    module: Callable[[torch.Tensor], torch.Tensor],
    learns: Mapping[str, torch.nn.Parameter],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The outputs of a layer, and the gradients of its inputs and of what learns.

    Args:
        module: computes outputs.
        learns: what is looked at; gradients are taken away again.
        shape: of inputs, which are always the same.
        dtype: of inputs.
    """
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(shape, generator=draw).to(dtype).requires_grad_()
    outputs = module(inputs)
    wanted = torch.randn(outputs.shape, generator=draw).to(outputs.dtype)
    outputs.backward(wanted)
    found = {"outputs": outputs.detach(), "inputs": inputs.grad}
    for name, parameter in learns.items():
        found[name] = parameter.grad
        parameter.grad = None
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    return found


def under_autocast(
    module: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward pass in bf16 by autocast; the backward pass is outside of it, as in training."""

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(inputs)

    return forward


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a tensor is from another, relative to that one."""
    one, other = one.detach().double(), other.detach().double()
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def same(
    ones: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], bound: float = 1e-5
) -> None:
    """Asserts that tensors are those of the same names, but for rounding in 32 bits."""
    assert ones.keys() == others.keys()
    assert len(ones) > 2
    for name in ones:
        assert ones[name].shape == others[name].shape, name
        assert distance(ones[name], others[name]) <= bound, name
