"""LoKr: a frozen layer with a Kronecker product beside its weight, which is never put together.

Inputs of a·b channels are a groups of b: the second factor acts within each group, the first one
mixes the groups. That takes about the square root of what a product with the whole weight takes.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapted.frozen_layer import FrozenLayer
from trainer.adapted.low_rank import Gradients, of_learning


class Lokr(torch.autograd.Function):
    """(W + s K1 ⊗ K2) x + b (Yeh et al. 2023, "LyCORIS", section 3.2)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layer: FrozenLayer, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        """The outputs.

        Args:
            inputs: of the layer, in any number format.
            layer: W and b.
            scale: s.
            factors: K1 (groups of outputs, groups of inputs) and K2 (outputs of a group, inputs
                of a group, …), or in the place of K2 the two matrices that it is the product of,
                which learn; and copies of all in the number format of the product.
        """
        first, *parts = factors[len(factors) // 2 :]
        geometry = layer.geometry
        entered = geometry.enter(inputs.to(first.dtype)).contiguous()
        outputs = layer.product(entered, with_bias=True).contiguous()
        groups = _apart(entered, first.shape[1])
        middle = geometry.product(groups, _second(layer, parts, groups))
        middle = middle.reshape(len(entered), first.shape[1], middle.shape[1:].numel())
        grouped = _beside(outputs, first.shape[0])
        grouped.baddbmm_(first.expand(len(entered), -1, -1), middle, alpha=scale)
        ctx.save_for_backward(entered, middle, first, *parts)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, inputs.shape, inputs.dtype
        return geometry.leave(outputs, inputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        """Gradients of inputs, K1 and K2 or what this is the product of."""
        inputs, middle, first, *parts = ctx.saved_tensors
        layer, scale, geometry = ctx.layer, ctx.scale, ctx.layer.geometry
        gradient = geometry.enter(gradient).contiguous()
        grouped = _beside(gradient, first.shape[0])
        groups = _apart(inputs, first.shape[1])
        second = _second(layer, parts, groups)
        of_middle = torch.bmm(first.t().expand(len(inputs), -1, -1), grouped)
        of_middle = of_middle.view(len(groups), second.shape[0], *gradient.shape[2:])
        of_inputs: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_inputs = layer.input_gradient(gradient, inputs).contiguous()
            apart = _apart(of_inputs, first.shape[1])
            geometry.add_input_gradient_(apart, of_middle, second, scale)
            of_inputs = geometry.leave(of_inputs, ctx.shape).to(ctx.dtype)
        learning: Gradients = (None,) * (1 + len(parts))
        if ctx.needs_input_grad[3]:
            of_first = torch.bmm(grouped, middle.transpose(1, 2)).sum(0, dtype=torch.float32)
            of_second = geometry.weight_gradient(of_middle, groups, second)
            learning = (of_learning(of_first, scale), *_of_parts(of_second, parts, scale))
        return of_inputs, None, None, *learning, *(None for _ in learning)


def _apart(values: torch.Tensor, groups: int) -> torch.Tensor:
    """Each group of channels as an input of its own, on the same memory."""
    return values.view(len(values) * groups, values.shape[1] // groups, *values.shape[2:])


def _beside(values: torch.Tensor, groups: int) -> torch.Tensor:
    """Matrices (…, groups, all of a group), on the same memory."""
    return values.view(len(values), groups, values.shape[1:].numel() // groups)


def _second(layer: FrozenLayer, parts: list[torch.Tensor], groups: torch.Tensor) -> torch.Tensor:
    """K2, from itself or from the two matrices that it is the product of."""
    if len(parts) == 1:
        return parts[0]
    left, right = parts
    return torch.mm(left, right).view(len(left), groups.shape[1], *layer.window)


def _of_parts(gradient: torch.Tensor, parts: list[torch.Tensor], scale: float) -> Gradients:
    """Gradients of what K2 is made of, small enough for 32 bits throughout."""
    if len(parts) == 1:
        return (of_learning(gradient, scale),)
    left, right = (part.float() for part in parts)
    matrix = gradient.float().reshape(len(left), -1)
    of_left, of_right = torch.mm(matrix, right.t()), torch.mm(left.t(), matrix)
    return of_learning(of_left, scale), of_learning(of_right, scale)
