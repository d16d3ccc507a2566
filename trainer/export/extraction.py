"""A LoRA made afterwards from fully trained weights: the best product of each rank.

For a layer's change dW = W' - W, the product of rank r nearest to it keeps the r largest
singular values (Eckart and Young 1936). Nothing is clamped: the clamp that extraction scripts in
use apply costs far more than the truncation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import durable
from trainer.export.state import AdapterState, LayerName, LayerTensors, largest_ranks

# Component to parameter name to tensor; may compute or load its values on demand.
Weights = Mapping[str, Mapping[str, Tensor]]

# Singular values below this share of the largest are rounding of the 32-bit weights.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class ExtractedLayer:
    """How well a layer's change fits into its product.

    Args:
        component: pipeline component.
        path: the layer's path.
        rank: singular values kept.
        change: norm of the change.
        lost: norm of the part of the change that the product leaves out.
    """

    component: str
    path: str
    rank: int
    change: float
    lost: float

    @property
    def captured(self) -> float:
        """Share of the squared change that the product holds, 0 to 1."""
        return 1 - (self.lost / self.change) ** 2


@dataclass(frozen=True)
class Extraction:
    """A LoRA extracted from fully trained weights, and what it does not hold.

    Args:
        rank: the largest rank asked for.
        state: the adapter; without layers where none had changed.
        layers: every changed layer.
        left_out: `component.name` of each changed parameter that no LoRA can hold, such as norms,
            biases and embeddings, to the norm of its change.
    """

    rank: int
    state: AdapterState
    layers: tuple[ExtractedLayer, ...]
    left_out: Mapping[str, float]

    @property
    def residual(self) -> float:
        """Norm of what the layers' products leave out, as a share of the layers' change."""
        lost = _square_sum(layer.lost for layer in self.layers)
        return math.sqrt(lost / (_square_sum(layer.change for layer in self.layers) or 1.0))

    @property
    def left_out_share(self) -> float:
        """Share of the whole squared change that lies in parameters that no LoRA can hold."""
        left_out = _square_sum(self.left_out.values())
        return left_out / (left_out + _square_sum(layer.change for layer in self.layers) or 1.0)

    def effective(self, base: Weights) -> dict[str, Mapping[str, Tensor]]:
        """Component to layer path to W + BA, computed when asked for: what readers must find.

        Args:
            base: the weights before training, by parameter name.
        """
        products: dict[str, dict[str, LayerTensors]] = {}
        for (component, path), tensors in self.state.layers().items():
            products.setdefault(component, {})[path] = tensors
        return {
            component: _EffectiveWeights(base[component], layers)
            for component, layers in products.items()
        }


class _EffectiveWeights(Mapping[str, Tensor]):
    """Layer path to base weight plus product, fp32 on the CPU."""

    def __init__(self, base: Mapping[str, Tensor], layers: Mapping[str, LayerTensors]) -> None:
        self._base, self._layers = base, layers

    def __getitem__(self, path: str) -> Tensor:
        factors = self._layers[path]
        weight = self._base[f"{path}.weight"].detach().to("cpu", torch.float32)
        product = factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)
        return weight + product.reshape(weight.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def extract(
    base: Weights, trained: Weights, layers: Mapping[str, Collection[str]], *, rank: int
) -> Extraction:
    """The best LoRA of a rank for the change between two sets of weights.

    Layers that did not change are left out; a layer whose change has a lower rank, or that is
    smaller, gets a lower one.

    Args:
        base: the weights before training.
        trained: the trained ones, of the same names; each pair is met on the device of these.
        layers: component to paths of the layers whose change a LoRA can hold. Tables of
            embeddings are matrices too, so shapes alone do not tell.
        rank: singular values to keep.
    """
    products: dict[LayerName, LayerTensors] = {}
    reports: list[ExtractedLayer] = []
    left_out: dict[str, float] = {}
    for component, parameters in sorted(trained.items()):
        weights = {f"{path}.weight": path for path in layers[component]}
        for name in sorted(parameters):
            after = parameters[name].detach().float()
            change = after - base[component][name].detach().to(after.device, torch.float32)
            if not bool(change.any()):
                continue
            if name not in weights:
                left_out[f"{component}.{name}"] = float(change.double().norm())
                continue
            layer = component, weights[name]
            products[layer], values = _product(change, rank)
            kept = products[layer]["lora_A"].shape[0]
            total, lost = float(values.sum()), float(values[kept:].sum())
            reports.append(ExtractedLayer(*layer, kept, math.sqrt(total), math.sqrt(lost)))
    state = AdapterState.of_layers("lora", largest_ranks(products), products)
    return Extraction(rank, state, tuple(reports), left_out)


def _product(change: Tensor, rank: int) -> tuple[LayerTensors, Tensor]:
    """The factors B and A of the nearest product, and all squared singular values, falling.

    They come from the eigenvectors of the smaller of dW dWT and dWT dW, in 64 bits, at a quarter
    of the time of a decomposition in 32 bits. B = U sqrt(S) and A = sqrt(S) VT share the size
    evenly, so that neither factor of a small change falls out of the range of 16-bit numbers.

    Args:
        change: (out, in) or (out, in, height, width).
    """
    matrix = change.flatten(1).double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    kept = min(rank, int((squares > squares[0] * _NEGLIGIBLE**2).sum()))
    roots = squares[:kept].sqrt().sqrt()
    left = vectors[:, :kept] * roots
    right = (vectors[:, :kept].T @ wide) / roots[:, None]
    out, into = (left, right) if is_wide else (right.T, left.T)
    kernel = change.shape[2:]
    tensors = {
        "lora_A": into.reshape(kept, *change.shape[1:]),
        "lora_B": out.reshape(change.shape[0], kept, *[1] * len(kernel)),
    }
    return {part: tensor.float().cpu().contiguous() for part, tensor in tensors.items()}, squares


def write_extraction_report(path: Path, extraction: Extraction) -> None:
    """Writes what the LoRA holds of the change and what it does not, as JSON."""
    whole = _square_sum(extraction.left_out.values()) + _square_sum(
        layer.change for layer in extraction.layers
    )
    report = {
        "rank": extraction.rank,
        "residual": _rounded(extraction.residual),
        "captured": _rounded(1 - extraction.residual**2),
        "left_out_share": _rounded(extraction.left_out_share),
        "layers": {
            f"{layer.component}.{layer.path}": {
                "rank": layer.rank,
                "change": _rounded(layer.change),
                "captured": _rounded(layer.captured),
                "residual": _rounded(layer.lost / layer.change),
            }
            for layer in extraction.layers
        },
        "left_out": {
            name: {"change": _rounded(change), "share": _rounded(change**2 / whole)}
            for name, change in sorted(extraction.left_out.items())
        },
    }
    durable.write_text(path, json.dumps(report, indent=2, sort_keys=True) + "\n")


def _square_sum(values: Collection[float] | Iterator[float]) -> float:
    return sum(value**2 for value in values)


def _rounded(value: float) -> float:
    """Six digits: what lies below them depends on the machine."""
    return float(f"{value:.6g}")
