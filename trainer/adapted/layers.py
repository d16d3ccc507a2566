"""PEFT's layers with an adapter, computed by this package: same weights, same names, same merging.

An adapter's weights are 32-bit floats, and products in 16 bits need copies of them. In training
these are made once in each step, see `Copies`; anywhere else, whenever they are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners import loha, lokr, lora

from trainer import shards
from trainer.adapted.frozen_layer import FrozenLayer
from trainer.adapted.hadamard import Loha
from trainer.adapted.kronecker import Lokr
from trainer.adapted.low_rank import Dora, Lora
from trainer.adapted.norms import row_norms, squared_rows
from trainer.frozen import FrozenLinear

# The one adapter's name in PEFT's layers.
ADAPTER = "default"

# Layers whose norms are computed together: few operations for all of them, and of each no tensor
# that would leave a processor's cache.
_NORMS_TOGETHER = 16

Factors = tuple[torch.Tensor, ...]


class AdaptedLayer:
    """What a layer of PEFT's with one adapter does in its forward pass, put before its class."""

    # What learns, by PEFT's names, in the order that `Product.forward` takes it in.
    names: ClassVar[tuple[str, ...]]
    product: ClassVar[type[torch.autograd.Function]]

    # Of PEFT's class.
    base_layer: torch.nn.Module
    scaling: Any
    disable_adapters: bool
    merged: bool

    frozen: FrozenLayer
    copies: Copies | None
    copied: Factors

    def factors(self) -> Factors:
        """What learns."""
        found = (getattr(self, name) for name in self.names)
        return tuple(each[ADAPTER] for each in found if ADAPTER in each)

    def copied_anew(self, dtype: torch.dtype) -> Factors:
        """What is computed with: copies of what learns, and whatever is made of these."""
        return tuple(factor.detach().to(dtype) for factor in self.factors())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs, in the number format in which the frozen layer has them."""
        if self.disable_adapters or self.merged:
            outputs: torch.Tensor = self.base_layer(inputs)
            return outputs
        dtype, copies = self.frozen.product_dtype(inputs), self.copies
        is_copied = copies is not None and copies.are_current and copies.dtype == dtype
        copied = self.copied if is_copied else self.copied_anew(dtype)
        apply: Any = self.product.apply
        product: torch.Tensor = apply(
            inputs, self.frozen, self.scaling[ADAPTER], *self.factors(), *copied
        )
        return product


class _Lora(AdaptedLayer):
    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    product: ClassVar[type[torch.autograd.Function]] = Lora

    def factors(self) -> Factors:
        modules: Any = super().factors()
        return tuple(module.weight for module in modules)


class _Dora(_Lora):
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    product = Dora

    def copied_anew(self, dtype: torch.dtype) -> Factors:
        down, up, magnitude = (factor.detach() for factor in self.factors())
        copies = down.to(dtype), up.to(dtype)
        weight = self.frozen.weight(copies[0]).flatten(1)
        product = torch.mm(weight, copies[0].flatten(1).t())[None]
        squares = squared_rows(weight)[None]
        (norm,) = row_norms(squares, product, [down], [up], self.scaling[ADAPTER])
        return *copies, magnitude.flatten() / norm, norm


class _Lokr(AdaptedLayer):
    names = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    product = Lokr


class _Loha(AdaptedLayer):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    product = Loha


class LoraLinear(_Lora, lora.layer.Linear):
    """LoRA on a linear layer."""


class LoraConv2d(_Lora, lora.layer.Conv2d):
    """LoRA on a convolution."""


class DoraLinear(_Dora, lora.layer.Linear):
    """DoRA on a linear layer."""


class DoraConv2d(_Dora, lora.layer.Conv2d):
    """DoRA on a convolution."""


class LokrLinear(_Lokr, lokr.layer.Linear):
    """LoKr on a linear layer."""


class LokrConv2d(_Lokr, lokr.layer.Conv2d):
    """LoKr on a convolution."""


class LohaLinear(_Loha, loha.layer.Linear):
    """LoHa on a linear layer."""


class LohaConv2d(_Loha, loha.layer.Conv2d):
    """LoHa on a convolution."""


# PEFT's class and whether there are magnitudes, to ours.
_OURS: Mapping[tuple[type, bool], type] = {
    (lora.layer.Linear, False): LoraLinear,
    (lora.layer.Conv2d, False): LoraConv2d,
    (lora.layer.Linear, True): DoraLinear,
    (lora.layer.Conv2d, True): DoraConv2d,
    (lokr.layer.Linear, False): LokrLinear,
    (lokr.layer.Conv2d, False): LokrConv2d,
    (loha.layer.Linear, False): LohaLinear,
    (loha.layer.Conv2d, False): LohaConv2d,
}


def take_over(module: torch.nn.Module) -> None:
    """Lets the layers that PEFT gave an adapter be computed here; their weights stay as they are.

    Convolutions in groups, which no family has, are left to PEFT.
    """
    layers: list[Any] = list(module.modules())
    for layer in layers:
        has_magnitudes = ADAPTER in getattr(layer, "lora_magnitude_vector", ())
        ours: Any = _OURS.get((type(layer), has_magnitudes))
        if ours is None or not _is_plain(layer.base_layer):
            continue
        layer.__class__ = ours
        layer.frozen, layer.copies = FrozenLayer.of(layer.base_layer), None


def _is_plain(layer: Any) -> bool:
    if isinstance(layer, torch.nn.Linear):
        return True
    return bool(layer.groups == 1 and layer.padding_mode == "zeros")


class Copies:
    """What the adapted layers of a training compute with, made of what learns once in each step.

    Layers whose weight is in parts over several processes make DoRA's norms themselves, while
    their block is whole.

    Args:
        modules: with adapters, on the device that trains.
        dtype: number format of products.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.are_current = False
        layers = [
            layer
            for module in modules
            for layer in module.modules()
            if isinstance(layer, AdaptedLayer)
        ]
        alike: dict[tuple[torch.Size, torch.Size, float], list[_Dora]] = defaultdict(list)
        self._sources: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        for layer in layers:
            factors = [factor.detach() for factor in layer.factors()]
            if isinstance(layer, _Dora):
                if _is_in_parts(layer):
                    continue
                down, up, _ = factors
                factors = [down, up]
                alike[down.shape, up.shape, layer.scaling[ADAPTER]].append(layer)
            layer.copies = self
            layer.copied = tuple(factor.to(dtype) for factor in factors)
            if dtype != torch.float32:
                self._sources += factors
                self._targets += layer.copied
        self._norms = [
            _Norms(group[start : start + _NORMS_TOGETHER], dtype)
            for group in alike.values()
            for start in range(0, len(group), _NORMS_TOGETHER)
        ]

    @contextmanager
    def of_this_step(self) -> Iterator[None]:
        """Inside, what learns does not change, and layers compute with copies made at the start."""
        with torch.no_grad():
            if self._sources:
                torch._foreach_copy_(self._targets, self._sources)
            for norms in self._norms:
                norms.refresh()
        self.are_current = True
        try:
            yield
        finally:
            self.are_current = False


def _is_in_parts(layer: AdaptedLayer) -> bool:
    module = layer.frozen.module
    return not isinstance(module, FrozenLinear) and shards.is_sharded(module.weight)


class _Norms:
    """The norms of layers of one shape and rank, and what their magnitudes are over these."""

    def __init__(self, layers: Sequence[_Dora], dtype: torch.dtype) -> None:
        self._layers = layers
        self._factors = [tuple(f.detach() for f in layer.factors()) for layer in layers]
        # One by one: a quantised weight is widened to be looked at.
        squares = [squared_rows(layer.frozen.weight(layer.copied[0])) for layer in layers]
        self._squares, up = torch.stack(squares), layers[0].copied[1]
        self._products = up.new_empty(len(layers), *up.shape[:2])
        self._norms = torch.empty_like(self._squares)
        self._gains = torch.empty_like(self._squares)
        for layer, *its in zip(layers, self._gains, self._norms, strict=True):
            layer.copied = (*layer.copied, *its)

    def refresh(self) -> None:
        """Computes norms and gains anew, in their places."""
        for layer, product in zip(self._layers, self._products, strict=True):
            down = layer.copied[0]
            weight = layer.frozen.weight(down)
            torch.mm(weight.flatten(1), down.flatten(1).t(), out=product)
        downs, ups, magnitudes = zip(*self._factors, strict=True)
        scale = self._layers[0].scaling[ADAPTER]
        self._norms.copy_(row_norms(self._squares, self._products, downs, ups, scale))
        magnitude = torch.stack([each.flatten() for each in magnitudes])
        torch.div(magnitude, self._norms, out=self._gains)
