"""Counts a training step on tensors without data: FLOP, bytes, operations, memory.

Runs the forecast of `trainer estimate` with no block left out, and looks at every operation of the
forward and backward pass. The update of the weights is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer import dataless, memory
from trainer.base_model import BaseModel, Precision
from trainer.config import TrainingConfig
from trainer.live_bytes import LiveBytes

GIB = 2**30
# One H100 SXM, measured: dense bf16 products of 8192 x 8192, and copies. They turn counts into
# times where nothing has been measured.
H100_TFLOPS = 790.0
H100_GIGABYTES = 3000.0

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_back(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# Those of torch's flop counter, and what it leaves out: products added in place, and attention on
# a processor, whose backward computes the product of queries and keys once more, as on a GPU.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}
# Beside views these do nothing on a GPU.
IDLE = frozenset({_aten.empty, _aten.empty_strided, _aten._unsafe_view})


@dataclass(frozen=True)
class Counted:
    """What one step takes.

    Args:
        tflop: of all products and convolutions, those computed twice included.
        floor_ms: at the GPU's best rate of arithmetic.
        products_ms: each product at that rate, or at the rate at which its tensors are read and
            written, if that takes longer; all else for nothing.
        roofline_ms: the same of all operations, each by itself: eager, without a gap.
        gigabytes: read and written, each tensor once per operation.
        operations: dispatched, views of tensors left out.
        forecast_gib: most memory in tensors, in steps and before them.
    """

    tflop: float
    floor_ms: float
    products_ms: float
    roofline_ms: float
    gigabytes: float
    operations: int
    forecast_gib: float


class Work(LiveBytes):
    """Live bytes, and beside them what operations compute, read and write."""

    # One in each stage; the steps come last.
    last: Work

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.flop = self.bytes = self.operations = 0
        self.products = self.roofline = 0.0
        Work.last = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts it."""
        kwargs = kwargs or {}
        outcome = super().__torch_dispatch__(func, types, args, kwargs)
        if not (func.is_view or func.namespace == "prim" or func.overloadpacket in IDLE):
            self._add(func.overloadpacket, args, kwargs, outcome)
        return outcome

    def _add(self, operation: Any, args: Any, kwargs: Any, outcome: Any) -> None:
        formula = FORMULAS.get(operation)
        flop = formula(*args, **kwargs, out_val=outcome) if formula else 0
        size = sum(map(_bytes, tree_iter((args, kwargs, outcome))))
        seconds = max(flop / H100_TFLOPS / 1e12, size / H100_GIGABYTES / 1e9)
        self.operations += 1
        self.flop += flop
        self.bytes += size
        self.roofline += seconds
        self.products += seconds if formula else 0


def counted(
    config: TrainingConfig, base: BaseModel, precision: Precision, device: torch.device
) -> Counted:
    """Counts a step of a training.

    Args:
        config: resolved, with both resolutions.
        precision: number formats of the base model's parts.
        device: where it would run; nothing is done there.

    Raises:
        InputError: this model cannot be trained so.
    """
    with _counting():
        forecast = memory.Forecast(base, device)
        footprint = forecast.footprint(config, precision)
    work = Work.last
    return Counted(
        tflop=work.flop / 1e12,
        floor_ms=work.flop / H100_TFLOPS / 1e9,
        products_ms=work.products * 1e3,
        roofline_ms=work.roofline * 1e3,
        gigabytes=work.bytes / 1e9,
        operations=work.operations,
        forecast_gib=footprint.peak_bytes / GIB,
    )


def rounded(counted: Counted) -> dict[str, float]:
    """The counts, as many digits as mean something."""
    return {name: round(value, 3) for name, value in asdict(counted).items()}


@contextmanager
def _counting() -> Iterator[None]:
    with ExitStack() as patches:
        patches.enter_context(patch.object(dataless, "LiveBytes", Work))
        patches.enter_context(patch.object(dataless, "repeated_blocks", lambda denoiser: ()))
        yield


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0
