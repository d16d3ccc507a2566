"""LoRA and DoRA: a frozen layer with a product of two small matrices beside its weight.

One `torch.autograd.Function` each, on linear layers and convolutions. The small product is added
into what the frozen layer gave; kept for the backward pass are the inputs and the small product's
middle, of DoRA also the sum.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.adapted.frozen_layer import FrozenLayer

Gradients = tuple[torch.Tensor | None, ...]


class Lora(torch.autograd.Function):
    """(W + s B A) x + b (Hu et al. 2021, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layer: FrozenLayer, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        """The outputs.

        Args:
            inputs: of the layer, in any number format.
            layer: W and b.
            scale: s.
            factors: A (r, in, …) and B (out, r, …), which learn, and copies of both in the number
                format of the product.
        """
        return added(ctx, inputs, layer, scale, *factors[2:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        """Gradients of inputs, A and B."""
        gradient = ctx.layer.geometry.enter(gradient)
        of_inputs, *learning = gradients(ctx, gradient, *ctx.saved_tensors)
        return of_inputs, None, None, *learning, None, None


class Dora(torch.autograd.Function):
    """m / |W + s B A| (W + s B A) x + b, the norms constant (Liu et al. 2024, section 4.3)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, layer: FrozenLayer, scale: float, *factors: torch.Tensor
    ) -> torch.Tensor:
        """The outputs.

        Args:
            inputs: of the layer, in any number format.
            layer: W and b.
            scale: s.
            factors: A (r, in, …), B (out, r, …) and m, of `out` numbers in any shape, which
                learn; in the number format of the product copies of A and B and, since near one
                16 bits cannot tell what has been learnt, m / |W + s B A| - 1 (out,); and in 32
                bits |W + s B A| (out,).
        """
        _, _, magnitude, down, up, excess, norm = factors
        entered = layer.geometry.enter(inputs.to(down.dtype))
        direction, hidden = _sum(layer, scale, entered, down, up, with_bias=False)
        outputs = _scaled(layer, direction, excess, layer.bias(direction.dtype))
        ctx.save_for_backward(entered, hidden, down, up, direction, excess, norm)
        ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, inputs.shape, inputs.dtype
        ctx.magnitude_shape = magnitude.shape
        return layer.geometry.leave(outputs, inputs.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        """Gradients of inputs, A, B and m."""
        *products, direction, excess, norm = ctx.saved_tensors
        geometry = ctx.layer.geometry
        gradient = geometry.enter(gradient)
        of_magnitude = None
        if ctx.needs_input_grad[5]:
            sums = geometry.channel_sums(gradient * direction)
            of_magnitude = (sums / norm).view(ctx.magnitude_shape)
        gradient = _scaled(ctx.layer, gradient, excess)
        of_inputs, *learning = gradients(ctx, gradient, *products)
        return of_inputs, None, None, *learning, of_magnitude, None, None, None, None


def of_learning(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of what learns: in 32 bits, as this is, and times the adapter's strength."""
    gradient = gradient.float()
    return gradient if scale == 1 else gradient * scale


def added(
    ctx: Any,
    inputs: torch.Tensor,
    layer: FrozenLayer,
    scale: float,
    down: torch.Tensor,
    up: torch.Tensor,
    *kept: torch.Tensor,
) -> torch.Tensor:
    """(W + s B A) x + b, with what `gradients` needs kept for the backward pass.

    Args:
        ctx: of the function that is computed.
        inputs: of the layer, in any number format.
        layer: W and b.
        scale: s.
        down: A, in the number format of the product.
        up: B, likewise.
        kept: what else the backward pass needs.
    """
    entered = layer.geometry.enter(inputs.to(down.dtype))
    outputs, hidden = _sum(layer, scale, entered, down, up, with_bias=True)
    ctx.save_for_backward(entered, hidden, down, up, *kept)
    ctx.layer, ctx.scale, ctx.shape, ctx.dtype = layer, scale, inputs.shape, inputs.dtype
    return layer.geometry.leave(outputs, inputs.shape)


def _sum(
    layer: FrozenLayer,
    scale: float,
    inputs: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W + s B A) x, perhaps with b, and A x."""
    outputs = layer.product(inputs, with_bias=with_bias)
    hidden = layer.geometry.product(inputs, down)
    layer.geometry.mixing.add_product_(outputs, hidden, up, scale)
    return outputs, hidden


def _scaled(
    layer: FrozenLayer,
    values: torch.Tensor,
    excess: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each channel times its gain, of which what is beyond one is given, and perhaps a bias."""
    by_channel = layer.geometry.by_channel
    if bias is None:
        return torch.addcmul(values, values, by_channel(excess))
    # What is added to the values is the least of it: rounded first, it is rounded least.
    return torch.addcmul(by_channel(bias), values, by_channel(excess)).add_(values)


def gradients(
    ctx: Any,
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    hidden: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> Gradients:
    """Gradients of inputs, A and B, from that of (W + s B A) x."""
    layer, scale, geometry = ctx.layer, ctx.scale, ctx.layer.geometry
    of_hidden = geometry.mixing.input_gradient(gradient, hidden, up)
    of_inputs = of_down = of_up = None
    if ctx.needs_input_grad[0]:
        of_inputs = layer.input_gradient(gradient, inputs)
        geometry.add_input_gradient_(of_inputs, of_hidden, down, scale)
        of_inputs = geometry.leave(of_inputs, ctx.shape).to(ctx.dtype)
    if ctx.needs_input_grad[3]:
        of_down = of_learning(geometry.weight_gradient(of_hidden, inputs, down), scale)
        of_up = of_learning(geometry.mixing.weight_gradient(gradient, hidden, up), scale)
    return of_inputs, of_down, of_up
