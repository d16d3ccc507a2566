"""LoHa: a frozen layer with the elementwise product of two low-rank products beside its weight.

Of rank r each, their product has rank r², and columns and rows that are products of theirs. Where
that is few, it is computed as a LoRA of this rank. Otherwise such a weight has no cheaper form than
itself, and is added to the frozen one before the product with the inputs, not multiplied by them
apart, wherever nothing is lost by rounding their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.adapted.frozen_layer import FrozenLayer
from trainer.adapted.low_rank import Gradients, added, gradients, of_learning


class Loha(torch.autograd.Function):
    """(W + s (B1 A1) ∘ (B2 A2)) x + b (Hyeon-Woo et al. 2022, "FedPara", equation 2)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layer: FrozenLayer, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        """The outputs.

        Args:
            inputs: of the layer, in any number format.
            layer: W and b.
            scale: s.
            factors: B1 (out, r), A1 (r, in and window), B2 and A2 likewise, which learn; and
                copies in the number format of the product, of B1 and B2 (2, out, r) and of A1
                and A2 (2, r, in and window).
        """
        ups, downs = factors[4:]
        geometry = layer.geometry
        entered = geometry.enter(inputs.to(ups.dtype))
        weight, bias = layer.weight(entered), layer.bias(entered.dtype)
        products = torch.bmm(ups, downs)
        first, second = products.view(2, *weight.shape).unbind()
        if entered.dtype == torch.float32:
            whole = torch.addcmul(weight, first, second, value=scale)
            outputs = geometry.product(entered, whole, bias)
        else:
            # Rounded to 16 bits, the sum would lose what has just been learnt.
            outputs = geometry.product(entered, weight, bias)
            geometry.add_product_(outputs, entered, first.mul_(second), scale)
        ctx.save_for_backward(entered, ups, downs)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, inputs.shape, inputs.dtype
        return geometry.leave(outputs, inputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        """Gradients of inputs, B1, A1, B2 and A2."""
        entered, ups, downs = ctx.saved_tensors
        layer, scale, geometry = ctx.layer, ctx.scale, ctx.layer.geometry
        gradient = geometry.enter(gradient)
        weight = layer.weight(gradient)
        products = torch.bmm(ups, downs)
        first, second = products.view(2, *weight.shape).unbind()
        of_inputs: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            # Here a rounded sum only makes a gradient a little less exact.
            whole = torch.addcmul(weight, first, second, value=scale)
            of_inputs = geometry.input_gradient(gradient, entered, whole)
            of_inputs = geometry.leave(of_inputs, ctx.shape).to(ctx.dtype)
        learning: Gradients = (None,) * 4
        if ctx.needs_input_grad[3]:
            of_change = geometry.weight_gradient(gradient, entered, weight)
            # By the first product the gradient comes to the second, and the other way round.
            of_products = products.mul_(of_change.reshape(products.shape[1:]))
            of_ups = of_learning(torch.bmm(of_products, downs.flip(0).mT), scale)
            of_downs = of_learning(torch.bmm(ups.flip(0).mT, of_products), scale)
            (second_up, first_up), (second_down, first_down) = of_ups.unbind(), of_downs.unbind()
            learning = (first_up, first_down, second_up, second_down)
        return of_inputs, None, None, *learning, None, None


class ThinLoha(torch.autograd.Function):
    """The same, as (W + s B A) x + b with B = B1 ⊙ B2 row by row and A = A1 ⊙ A2 column by column.

    Row i of B1 ⊙ B2 has all products of a number of B1's and one of B2's row i (Khatri and Rao
    1968).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layer: FrozenLayer, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        """The outputs.

        Args:
            inputs: of the layer, in any number format.
            layer: W and b.
            scale: s.
            factors: B1, A1, B2 and A2, which learn, in 32 bits; A (r², in, …) and B (out, r², …)
                in the number format of the product.
        """
        *learning, down, up = factors
        return added(ctx, inputs, layer, scale, down, up, *learning)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        """Gradients of inputs, B1, A1, B2 and A2."""
        *products, first_up, first_down, second_up, second_down = ctx.saved_tensors
        gradient = ctx.layer.geometry.enter(gradient)
        of_inputs, of_down, of_up = gradients(ctx, gradient, *products)
        learning: Gradients = (None,) * 4
        if of_down is not None and of_up is not None:
            rank = len(first_down)
            of_up, of_down = of_up.reshape(-1, rank, rank), of_down.reshape(rank, rank, -1)
            learning = (
                (of_up * second_up[:, None]).sum(2),
                (of_down * second_down).sum(1),
                (of_up * first_up[:, :, None]).sum(1),
                (of_down * first_down[:, None]).sum(0),
            )
        return of_inputs, None, None, *learning, None, None


def is_thin(up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether three thin products take less than two by a whole weight, in a step.

    Args:
        up: B1 (out, r).
        down: A1 (r, in and window).
    """
    (out, rank), columns = up.shape, down.shape[1]
    return 3 * rank**2 * (out + columns) < 2 * out * columns


def join(factors: Sequence[torch.Tensor], down: torch.Tensor, up: torch.Tensor) -> None:
    """Makes A1 ⊙ A2 and B1 ⊙ B2, each in its place.

    Args:
        factors: B1, A1, B2 and A2.
        down: for A (r², in, …), in any number format.
        up: for B (out, r², …), likewise.
    """
    first_up, first_down, second_up, second_down = factors
    rank = len(first_down)
    torch.mul(first_down[:, None], second_down, out=down.view(rank, rank, -1))
    torch.mul(first_up[:, :, None], second_up[:, None], out=up.view(-1, rank, rank))
