"""Frozen linear layers whose weight is made where they compute: quantised, offloaded, or both.

What is kept of a weight is small or in the computer's memory; forward and backward each widen it
anew, so that nothing of its size outlives one product. Takes modules and values; knows no family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainer.errors import InputError

# What is kept of a weight; the first is its numbers.
Parts = tuple[torch.Tensor, ...]

# Largest numbers of the 8-bit formats; int8 leaves -128 out, which has no counterpart.
_INT8_MAX = 127
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max

# Numbers that share a scale in NF4, and scales that share a scale of their own (Dettmers et al.
# 2023, section 3).
_NF4_BLOCK, _NF4_SCALES_BLOCK = 64, 256


@dataclass(frozen=True)
class _Format:
    """A way to keep a weight (out, in).

    Args:
        pack: what is kept of a weight.
        widen: the weight again, from its parts, its shape and a number format.
    """

    pack: Callable[[torch.Tensor], Parts]
    widen: Callable[[Parts, torch.Size, torch.dtype], torch.Tensor]


def _widen_plain(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return parts[0].to(dtype)


def _row_scales(weight: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in 32 bits, and for each row what its numbers are divided by."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True) / largest
    # A row of zeros stays one.
    return weight, scales.clamp(min=torch.finfo(torch.float32).tiny)


def _pack_int8(weight: torch.Tensor) -> Parts:
    weight, scales = _row_scales(weight, _INT8_MAX)
    return (weight / scales).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales


def _pack_fp8(weight: torch.Tensor) -> Parts:
    weight, scales = _row_scales(weight, _FP8_MAX)
    # Numbers beyond the largest would become NaN.
    return (weight / scales).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scales


def _widen_rows(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # Both 8-bit formats are exact in 16 bits, and the product is rounded once.
    numbers, scales = parts
    return numbers.to(dtype).mul_(scales)


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes' operations, which know tensors without data too."""
    # Its import warns of inference kernels that training never uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # Imported here alone: slow to load, and absent on some platforms.
        import bitsandbytes  # noqa: F401, PLC0415
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError.of(
            "quantization",
            f"`nf4` needs bitsandbytes, which cannot be loaded here: {error}",
            "run `pip install bitsandbytes`, or give `int8` or `fp8`",
        ) from error
    return torch.ops.bitsandbytes


def _pack_nf4(weight: torch.Tensor) -> Parts:
    numbers, absmax = _bitsandbytes().quantize_4bit(
        weight.contiguous(), _NF4_BLOCK, "nf4", torch.uint8
    )
    # bitsandbytes' own double quantisation keeps a table for whoever comes next, on whatever
    # device. Scales differ little from each other: their distances from the mean fit in 8 bits.
    offset = absmax.mean()
    padding = (0, -len(absmax) % _NF4_SCALES_BLOCK)
    distances = torch.nn.functional.pad(absmax - offset, padding)
    return numbers, *_pack_int8(distances.view(-1, _NF4_SCALES_BLOCK)), offset


def _widen_nf4(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    numbers, *distances, offset = parts
    absmax = _widen_rows(tuple(distances), shape, torch.float32).flatten()
    absmax = absmax[: -(-shape.numel() // _NF4_BLOCK)].add_(offset)
    weight: torch.Tensor = _bitsandbytes().dequantize_4bit(
        numbers, absmax, _NF4_BLOCK, "nf4", shape, dtype
    )
    return weight


FORMATS: Mapping[str, _Format] = {
    "none": _Format(lambda weight: (weight,), _widen_plain),
    "int8": _Format(_pack_int8, _widen_rows),
    "fp8": _Format(_pack_fp8, _widen_rows),
    "nf4": _Format(_pack_nf4, _widen_nf4),
}


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight does not learn and is widened in each product.

    The kept parts are neither parameters nor buffers: they are in no state dict, no process sends
    them to another, and `.to` moves them without changing their number format.

    Args:
        layer: what it stands for; its bias is taken over.
        quantization: a name in `FORMATS`.
        offloaded: keep the parts in the computer's memory whatever device the layer is on.
        device: where the weight is packed; the parts go back to where the weight was.
    """

    def __init__(
        self, layer: torch.nn.Linear, quantization: str, *, offloaded: bool, device: torch.device
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        self.offloaded = offloaded
        self._format = FORMATS[quantization]
        self._dtype, self._device = weight.dtype, weight.device
        with torch.no_grad():
            # A weight that stays as it is need not go to the device and back.
            packed = self._format.pack(weight if quantization == "none" else weight.to(device))
        self.parts: Parts = tuple(self._home(part.to(weight.device)) for part in packed)

    def _home(self, part: torch.Tensor) -> torch.Tensor:
        """Pinned, where that makes the way to a GPU shorter."""
        pins = self.offloaded and part.device.type == "cpu" and torch.cuda.is_available()
        return part.pin_memory() if pins else part

    @property
    def device(self) -> torch.device:
        """Where the weight is made."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the widened weight."""
        return self._dtype

    @property
    def parts_on_device(self) -> Parts:
        """What of the weight takes memory where the layer is."""
        return () if self.offloaded else self.parts

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override] # no parameter: it is made here
        """The widened weight on the layer's device; a new tensor each time."""
        return self.widened(self._device, self._dtype)

    def widened(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) that this layer multiplies by.

        Args:
            device: where it is needed.
            dtype: the number format it is rounded to.
        """
        parts = self.parts
        if self.offloaded:
            # A copy also where the device is the processor: a forecast counts it there.
            parts = tuple(part.to(device, non_blocking=True, copy=True) for part in parts)
        shape = torch.Size((self.out_features, self.in_features))
        return self._format.widen(parts, shape, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product in the weight's number format, or in autocast's."""
        kind = input.device.type
        dtype = self._dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        product: torch.Tensor = _Product.apply(input, self, dtype)  # type: ignore[no-untyped-call]
        return product

    def rebuild(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts other tensors of the same shapes and formats in the place of the parts."""
        self.parts = tuple(make(part) for part in self.parts)
        self._device = self.parts[0].device

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch gives it no types
        # Nothing but a probe is converted, which tells where to and to which format.
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        self._dtype, self._device = probe.dtype, probe.device
        if not self.offloaded:
            self.parts = tuple(part.to(self._device) for part in self.parts)
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ + b with nothing kept for backward but the layer, which widens W again there."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, layer: FrozenLinear, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return torch.nn.functional.linear(input, layer.widened(input.device, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.widened(gradient.device, ctx.dtype), None, None


def refuse_unavailable(quantization: str) -> None:
    """Finds out before anything else is done whether weights can be quantised here.

    Raises:
        InputError: it needs a package that cannot be loaded.
    """
    if quantization == "nf4":
        _bitsandbytes()


def refuse_too_many(denoiser: torch.nn.Module, offload_blocks: int) -> None:
    """Finds out whether a model has the blocks that are to be offloaded; weights are not needed.

    Raises:
        InputError: it has fewer.
    """
    count = len(repeated_blocks(denoiser))
    if offload_blocks > count:
        raise InputError.of(
            "offload_blocks",
            f"is {offload_blocks}, but {type(denoiser).__name__} has {count} blocks",
            f"give at most {count}",
        )


def repeated_blocks(denoiser: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that make up most of a diffusers model, in its order.

    They are what diffusers' `compile_repeated_blocks` compiles: transformer blocks, in a UNet those
    of its attention.
    """
    kind: Any = type(denoiser)
    return [
        module for module in denoiser.modules() if type(module).__name__ in kind._repeated_blocks
    ]


def freeze(
    denoiser: torch.nn.Module, *, quantization: str, offload_blocks: int, device: torch.device
) -> None:
    """Keeps the linear layers of a model's repeated blocks quantised or offloaded, in place.

    What stands outside of them stays as it is: embeddings of text, time and picture, the last
    projection, convolutions and norms are a few per cent of a transformer's weights, and
    everything passes through them. The same weights give the same bytes each time.

    Args:
        denoiser: frozen, anywhere; stays where it is.
        quantization: a name in `FORMATS`.
        offload_blocks: of that many blocks, the first, the parts stay in the computer's memory.
        device: quantises, a layer at a time.

    Raises:
        InputError: there are fewer blocks, or quantisation needs a package that is not there.
    """
    refuse_unavailable(quantization)
    refuse_too_many(denoiser, offload_blocks)
    for number, block in enumerate(repeated_blocks(denoiser)):
        offloaded = number < offload_blocks
        if quantization == "none" and not offloaded:
            continue
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    kept = FrozenLinear(layer, quantization, offloaded=offloaded, device=device)
                    setattr(parent, name, kept.train(layer.training))


def frozen_layers(module: torch.nn.Module) -> Iterator[FrozenLinear]:
    """The layers that `freeze` made."""
    return (layer for layer in module.modules() if isinstance(layer, FrozenLinear))
