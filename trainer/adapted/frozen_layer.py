"""The frozen layer under an adapter: its weight is asked for whenever it is needed, never kept.

A quantised or offloaded weight is widened anew each time; one in parts over several processes is
whole only while its block computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.adapted.geometry import Geometry, Rows, Windows
from trainer.frozen import FrozenLinear


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """A linear layer or convolution that does not learn.

    Args:
        module: the layer.
        geometry: how its weight meets inputs.
        window: height and width of a convolution's, nothing of a linear layer's.
    """

    module: Any
    geometry: Geometry
    window: tuple[int, ...]

    @classmethod
    def of(cls, module: Any) -> FrozenLayer:
        """Around a layer that an adapter is put on."""
        if isinstance(module, torch.nn.Linear):
            return cls(module, Rows(), ())
        geometry = Windows(module.stride, module.padding, module.dilation)
        return cls(module, geometry, module.kernel_size)

    def product_dtype(self, inputs: torch.Tensor) -> torch.dtype:
        """The number format that the layer computes in: autocast's, or else its weight's."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        dtype: torch.dtype = (
            self.module.dtype if isinstance(self.module, FrozenLinear) else self.module.weight.dtype
        )
        return dtype

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        """The weight (out, in, …) on the device and in the number format of another tensor."""
        if isinstance(self.module, FrozenLinear):
            return self.module.widened(like.device, like.dtype)
        weight: torch.Tensor = self.module.weight
        return weight.to(like.dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias (out,), if there is one."""
        bias = self.module.bias
        return None if bias is None else bias.to(dtype)

    def product(self, inputs: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        """Outputs for inputs that have entered."""
        bias = self.bias(inputs.dtype) if with_bias else None
        return self.geometry.product(inputs, self.weight(inputs), bias)

    def input_gradient(self, gradient: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """The gradient of the inputs of `product`."""
        return self.geometry.input_gradient(gradient, inputs, self.weight(gradient))


def side_by_side(layers: Sequence[FrozenLayer], dtype: torch.dtype) -> torch.Tensor | None:
    """Moves the weights of layers of one shape into one tensor, to be multiplied by at once.

    Args:
        layers: which compute with their part of it from then on.
        dtype: number format of products.

    Returns:
        The weights (n, out, in and window), or nothing where one of them is widened first or lies
        otherwise: those stay where they are.
    """
    weights: list[torch.Tensor] = []
    for layer in layers:
        if isinstance(layer.module, FrozenLinear):
            return None
        weight = layer.module.weight
        if weight.dtype != dtype or not weight.is_contiguous():
            return None
        weights.append(weight)
    moved = weights[0].new_empty(len(weights), len(weights[0]), weights[0][0].numel())
    for weight, rows in zip(weights, moved, strict=True):
        # One after the other: what was copied is given up before the next.
        rows.copy_(weight.detach().flatten(1))
        weight.data = rows.view(weight.shape)
    return moved
