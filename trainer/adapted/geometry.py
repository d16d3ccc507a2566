"""What a linear layer and a convolution compute, and its gradients, as functions of tensors.

Both multiply by a weight (out, in, …), so an adapter need not know which of them it is on. Nothing
here is differentiated by torch: it is called inside of `torch.autograd.Function`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

_backward_of_convolution: Any = torch.ops.aten.convolution_backward


class Geometry(Protocol):
    """How a weight (out, in, …) meets inputs: as a matrix or as a moving window.

    Inputs and outputs have the form that `enter` gives: rows (T, in) for a linear layer, pictures
    (B, in, H, W) for a convolution.
    """

    @property
    def mixing(self) -> Geometry:
        """The geometry of a weight that only mixes the channels of outputs."""

    def enter(self, values: torch.Tensor) -> torch.Tensor:
        """A layer's inputs or the gradients of its outputs, in the form used here."""

    def leave(self, values: torch.Tensor, like: torch.Size) -> torch.Tensor:
        """A layer's outputs or the gradients of its inputs, from the form used here.

        Args:
            values: of any number of channels.
            like: the shape of the layer's inputs.
        """

    def product(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weight's outputs."""

    def add_product_(
        self, outputs: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scale: float
    ) -> None:
        """Adds scale times the weight's outputs to others, in place."""

    def input_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of inputs from that of outputs; of inputs only the shape is looked at."""

    def add_input_gradient_(
        self,
        onto: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scale: float,
    ) -> None:
        """Adds scale times the gradient of inputs to another one, in place."""

    def weight_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the weight; of the weight itself only the shape is looked at."""

    def by_channel(self, values: torch.Tensor) -> torch.Tensor:
        """A vector (out,) in a shape that outputs can be multiplied by."""

    def channel_sums(self, outputs: torch.Tensor) -> torch.Tensor:
        """Sums (out,) over everything but channels, in 32 bits."""


@dataclass(frozen=True)
class Rows:
    """A linear layer: every row is multiplied by the weight (out, in)."""

    @property
    def mixing(self) -> Rows:
        """Itself."""
        return self

    def enter(self, values: torch.Tensor) -> torch.Tensor:
        """Rows (T, in), whatever was before them."""
        return values if values.ndim == 2 else values.reshape(-1, values.shape[-1])

    def leave(self, values: torch.Tensor, like: torch.Size) -> torch.Tensor:
        """See `Geometry`."""
        return values if len(like) == 2 else values.view(*like[:-1], values.shape[-1])

    def product(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Geometry`."""
        columns = weight.t()
        return torch.mm(inputs, columns) if bias is None else torch.addmm(bias, inputs, columns)

    def add_product_(
        self, outputs: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scale: float
    ) -> None:
        """See `Geometry`."""
        outputs.addmm_(inputs, weight.t(), alpha=scale)

    def input_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See `Geometry`."""
        return torch.mm(gradient, weight)

    def add_input_gradient_(
        self,
        onto: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scale: float,
    ) -> None:
        """See `Geometry`."""
        onto.addmm_(gradient, weight, alpha=scale)

    def weight_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See `Geometry`."""
        return torch.mm(gradient.t(), inputs)

    def by_channel(self, values: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return values

    def channel_sums(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return outputs.sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class Windows:
    """A convolution: every window is multiplied by the weight (out, in, height, width)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def mixing(self) -> Windows:
        """A convolution whose window is one pixel."""
        return Windows((1, 1), (0, 0), (1, 1))

    def enter(self, values: torch.Tensor) -> torch.Tensor:
        """The pictures as they are."""
        return values

    def leave(self, values: torch.Tensor, like: torch.Size) -> torch.Tensor:
        """The pictures as they are."""
        return values

    def product(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Geometry`."""
        return torch.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation)

    def add_product_(
        self, outputs: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scale: float
    ) -> None:
        """See `Geometry`."""
        outputs.add_(self.product(inputs, weight), alpha=scale)

    def input_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See `Geometry`."""
        return self._backward(gradient, inputs, weight, (True, False))[0]

    def add_input_gradient_(
        self,
        onto: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scale: float,
    ) -> None:
        """See `Geometry`."""
        onto.add_(self.input_gradient(gradient, onto, weight), alpha=scale)

    def weight_gradient(
        self, gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """See `Geometry`."""
        return self._backward(gradient, inputs, weight, (False, True))[1]

    def by_channel(self, values: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return values.view(-1, 1, 1)

    def channel_sums(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Geometry`."""
        return outputs.sum((0, 2, 3), dtype=torch.float32)

    def _backward(
        self,
        gradient: torch.Tensor,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        wanted: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of inputs and weight, of what is wanted."""
        of_inputs, of_weight, _ = _backward_of_convolution(
            *(gradient, inputs, weight, None),
            *(self.stride, self.padding, self.dilation),
            *(False, (0, 0), 1, (*wanted, False)),
        )
        return of_inputs, of_weight
