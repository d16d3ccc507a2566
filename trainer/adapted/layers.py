"""PEFT's layers with an adapter, computed by this package: same weights, same names, same merging.

An adapter's weights are 32-bit floats, and products in 16 bits, or of several of them at once, need
copies. In training these are made once in each step, see `Copies`; anywhere else, whenever they
are needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners import loha, lokr, lora

from trainer import shards
from trainer.adapted.frozen_layer import FrozenLayer, side_by_side
from trainer.adapted.hadamard import Loha, ThinLoha, is_thin, join
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
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


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
        return tuple(factor.to(dtype) for factor in self._values())

    def pairs(self) -> Pairs:
        """What is copied in each step: of what learns, each with a place in `copied`."""
        pairs = zip(self._values(), self.copied, strict=True)
        # In 32 bits what learns is computed with itself.
        return [(factor, copy) for factor, copy in pairs if copy.dtype != factor.dtype]

    def _values(self) -> Factors:
        return tuple(factor.detach() for factor in self.factors())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs, in the number format in which the frozen layer has them."""
        if self.disable_adapters or self.merged:
            outputs: torch.Tensor = self.base_layer(inputs)
            return outputs
        if len(inputs) > 1 and inputs.stride(0) == 0:
            # One example that is lent to a whole batch, such as its one caption.
            once = self.forward(inputs[:1])
            return once.expand(len(inputs), *once.shape[1:]).contiguous()
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
        down, up, magnitude = self._values()
        copies = down.to(dtype), up.to(dtype)
        rows, columns = (copy.flatten(1) for copy in copies)
        weight = self.frozen.weight(rows).flatten(1)
        squares, product = squared_rows(weight)[None], torch.mm(weight, rows.t())[None]
        (norm,) = row_norms(squares, product, rows[None], columns[None], self.scaling[ADAPTER])
        return *copies, (magnitude.flatten() / norm - 1).to(dtype), norm

    def pairs(self) -> Pairs:
        return list(zip(self._values()[:2], self.copied[:2], strict=True))


class _Lokr(AdaptedLayer):
    names = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    product = Lokr


class _Loha(AdaptedLayer):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    product: ClassVar[type[torch.autograd.Function]] = Loha

    def copied_anew(self, dtype: torch.dtype) -> Factors:
        first_up, first_down, second_up, second_down = super().copied_anew(dtype)
        return torch.stack([first_up, second_up]), torch.stack([first_down, second_down])

    def pairs(self) -> Pairs:
        first_up, first_down, second_up, second_down = self._values()
        (up, other_up), (down, other_down) = self.copied
        return [
            *((first_up, up), (first_down, down)),
            *((second_up, other_up), (second_down, other_down)),
        ]


class _ThinLoha(_Loha):
    product = ThinLoha

    def copied_anew(self, dtype: torch.dtype) -> Factors:
        up, down, *_ = self._values()
        window, rank = self.frozen.window, len(down) ** 2
        copied = (
            down.new_empty(rank, down.shape[1] // math.prod(window), *window, dtype=dtype),
            up.new_empty(len(up), rank, *(1 for _ in window), dtype=dtype),
        )
        join(self._values(), *copied)
        return copied

    def pairs(self) -> Pairs:
        return []


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


class ThinLohaLinear(_ThinLoha, loha.layer.Linear):
    """LoHa of little rank on a linear layer."""


class ThinLohaConv2d(_ThinLoha, loha.layer.Conv2d):
    """LoHa of little rank on a convolution."""


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


_THIN: Mapping[type, type] = {LohaLinear: ThinLohaLinear, LohaConv2d: ThinLohaConv2d}


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
        if isinstance(layer, _Loha) and is_thin(*layer.factors()[:2]):
            layer.__class__ = _THIN[ours]


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
        self._pairs: dict[AdaptedLayer, Pairs] = {}
        self._thin: dict[_ThinLoha, Factors] = {}
        self._norms: list[_Norms] = []
        for module in modules:
            self._join(module)
        self._gather()

    def _join(self, module: torch.nn.Module) -> None:
        """Gives the adapted layers of a module their copies."""
        alike: dict[tuple[torch.Size, torch.Size, float], list[_Dora]] = defaultdict(list)
        for layer in _adapted_layers(module):
            factors = tuple(factor.detach() for factor in layer.factors())
            if isinstance(layer, _Dora):
                if not _is_in_parts(layer):
                    alike[factors[0].shape, factors[1].shape, layer.scaling[ADAPTER]].append(layer)
                continue
            layer.copies = self
            layer.copied = layer.copied_anew(self.dtype)
            if isinstance(layer, _ThinLoha):
                self._thin[layer] = factors
            self._pairs[layer] = layer.pairs()
        for group in alike.values():
            for start in range(0, len(group), _NORMS_TOGETHER):
                norms = _Norms(group[start : start + _NORMS_TOGETHER], self.dtype)
                self._norms.append(norms)
                for layer in norms.layers:
                    layer.copies = self
                    self._pairs[layer] = layer.pairs()

    def leave(self, module: torch.nn.Module) -> None:
        """Gives up all that was made for the layers of a module that learns no more."""
        left = set(_adapted_layers(module))
        for layer in left:
            layer.copies, layer.copied = None, ()
        self._pairs = {layer: its for layer, its in self._pairs.items() if layer not in left}
        self._thin = {layer: its for layer, its in self._thin.items() if layer not in left}
        self._norms = [norms for norms in self._norms if not left.intersection(norms.layers)]
        self._gather()

    def _gather(self) -> None:
        """What is copied in each step, in two rows."""
        pairs = [pair for its in self._pairs.values() for pair in its]
        self._sources, self._targets = [one for one, _ in pairs], [other for _, other in pairs]

    @contextmanager
    def of_this_step(self) -> Iterator[None]:
        """Inside, what learns does not change, and layers compute with copies made at the start."""
        with torch.no_grad():
            if self._sources:
                torch._foreach_copy_(self._targets, self._sources)
            for norms in self._norms:
                norms.refresh()
            for layer, factors in self._thin.items():
                join(factors, *layer.copied)
        self.are_current = True
        try:
            yield
        finally:
            self.are_current = False


def _adapted_layers(module: torch.nn.Module) -> list[AdaptedLayer]:
    found: list[Any] = [each for each in module.modules() if isinstance(each, AdaptedLayer)]
    return found


def _is_in_parts(layer: AdaptedLayer) -> bool:
    module = layer.frozen.module
    return not isinstance(module, FrozenLinear) and shards.is_sharded(module.weight)


class _Norms:
    """The norms of layers of one shape and rank, and what their magnitudes are over these.

    Args:
        layers: whose copies are made here, side by side; their frozen weights are moved so too.
        dtype: number format of products.
    """

    def __init__(self, layers: Sequence[_Dora], dtype: torch.dtype) -> None:
        self.layers = layers
        self._magnitudes = [layer.factors()[2].detach().flatten() for layer in layers]
        down, up, _ = (factor.detach() for factor in layers[0].factors())
        count, out = len(layers), self._magnitudes[0].numel()
        downs = down.new_empty((count, *down.shape), dtype=dtype)
        ups = up.new_empty((count, *up.shape), dtype=dtype)
        self._down, self._up = downs.flatten(2), ups.flatten(2)
        self._weights = side_by_side([layer.frozen for layer in layers], dtype)
        # One by one: a quantised weight is widened to be looked at.
        squares = [squared_rows(layer.frozen.weight(downs)) for layer in layers]
        self._squares = torch.stack(squares)
        self._products = torch.empty_like(self._up)
        self._norms = torch.empty_like(self._squares)
        self._excess = downs.new_empty(count, out)
        for layer, *copied in zip(layers, downs, ups, self._excess, self._norms, strict=True):
            layer.copied = tuple(copied)

    def refresh(self) -> None:
        """Computes norms and gains anew from copies that were, each in its place."""
        if self._weights is not None:
            torch.bmm(self._weights, self._down.transpose(1, 2), out=self._products)
        else:
            for layer, down, product in zip(self.layers, self._down, self._products, strict=True):
                weight = layer.frozen.weight(down)
                torch.mm(weight.flatten(1), down.t(), out=product)
        scale = self.layers[0].scaling[ADAPTER]
        norms = row_norms(self._squares, self._products, self._down, self._up, scale)
        self._norms.copy_(norms)
        self._excess.copy_(torch.stack(self._magnitudes).div_(norms).sub_(1))
