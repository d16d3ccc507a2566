"""A LoRA made afterwards from fully trained weights: the best product of each rank.

For a layer's change dW = W' - W, the product of rank r nearest to it keeps the r largest
singular values (Eckart and Young 1936). Layers of large models are too wide to decompose as a
whole; there a product close to the nearest is found by subspace iteration, and what it leaves out
is measured as exactly. Nothing is clamped: cutting off the largest values, as other extraction
scripts do, costs far more than the truncation.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import durable, randomness
from trainer.events import Event, StageEvent
from trainer.export.state import AdapterState, LayerName, LayerTensors, largest_ranks

# Component to parameter name to tensor; may compute or load its values on demand.
Weights = Mapping[str, Mapping[str, Tensor]]

# Singular values below this share of the largest are rounding of the 32-bit weights.
_NEGLIGIBLE = 1e-6
# Shorter sides up to here are decomposed as a whole; 3072 takes 12 to 17 seconds on a core.
_EXACT_UP_TO = 1280
# Directions beyond the rank, and rounds, of the iteration for larger ones.
_OVERSAMPLING = 32
_ROUNDS = 8


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
) -> Generator[Event, None, Extraction]:
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
    total = sum(map(len, trained.values()))
    done = itertools.count(1)
    for component, parameters in sorted(trained.items()):
        weights = {f"{path}.weight": path for path in layers[component]}
        for name in sorted(parameters):
            yield StageEvent("extract", next(done), total)
            after = parameters[name].detach().float()
            change = after - base[component][name].detach().to(after.device, torch.float32)
            if not bool(change.any()):
                continue
            if name not in weights:
                left_out[f"{component}.{name}"] = float(change.double().norm())
                continue
            layer = component, weights[name]
            products[layer], whole, lost = _product(change, rank)
            kept = products[layer]["lora_A"].shape[0]
            reports.append(ExtractedLayer(*layer, kept, math.sqrt(whole), math.sqrt(lost)))
    state = AdapterState.of_layers("lora", largest_ranks(products), products)
    return Extraction(rank, state, tuple(reports), left_out)


def _product(change: Tensor, rank: int) -> tuple[LayerTensors, float, float]:
    """The factors B and A, and the squared norms of the change and of what they leave out.

    B = U sqrt(S) and A = sqrt(S) VT share the size evenly, so that neither factor of a small
    change falls out of the range of 16-bit numbers.

    Args:
        change: (out, in) or (out, in, height, width).
    """
    matrix = change.flatten(1)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.T
    if wide.shape[0] <= max(_EXACT_UP_TO, rank + _OVERSAMPLING):
        squares, vectors = _decomposed(wide.double())
        whole = float(squares.sum())
    else:
        squares, vectors = _leading(wide, rank + _OVERSAMPLING)
        # B A is a projection of the change: by Pythagoras, what is left is exactly the rest.
        whole = float(torch.linalg.vector_norm(wide, dtype=torch.float64) ** 2)
    kept = min(rank, int((squares > squares[0] * _NEGLIGIBLE**2).sum()))
    lost = float(squares[kept:].sum()) + max(0.0, whole - float(squares.sum()))
    roots = squares[:kept].sqrt().sqrt()
    left = vectors[:, :kept] * roots
    right = _times(vectors[:, :kept].T, wide) / roots[:, None]
    out, into = (left, right) if is_wide else (right.T, left.T)
    kernel = change.shape[2:]
    tensors = {
        "lora_A": into.reshape(kept, *change.shape[1:]),
        "lora_B": out.reshape(change.shape[0], kept, *[1] * len(kernel)),
    }
    factors = {part: tensor.float().cpu().contiguous() for part, tensor in tensors.items()}
    return factors, whole, lost


def _decomposed(wide: Tensor) -> tuple[Tensor, Tensor]:
    """All squared singular values, falling, and the left singular vectors as columns.

    They come from the eigenvectors of M MT in 64 bits, at a quarter of the time of a
    decomposition in 32 bits.

    Args:
        wide: (rows, columns) with no more rows than columns, in 64 bits.
    """
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    return squares.flip(0).clamp(min=0), vectors.flip(1)


def _leading(wide: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same for the largest so many, nearly: those of the change within a subspace.

    Subspace iteration from fixed random directions, then everything in 64 bits within what was
    found. Squared values are at most the true ones.

    Source: Halko, Martinsson and Tropp 2011, algorithm 4.4; with 8 rounds and 32 directions
    beyond the rank, corollary 10.10 bounds the error's spectral norm by 1.3 of the best for
    shorter sides of 3072.

    Args:
        wide: (rows, columns) in 32 bits.
        width: of the subspace, at most the number of rows.
    """
    generator = torch.Generator().manual_seed(randomness.key(0, "extraction"))
    directions = torch.randn(wide.shape[1], width, generator=generator).to(wide.device)
    basis = torch.linalg.qr(wide @ directions).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    basis = torch.linalg.qr(basis.double()).Q
    squares, vectors = _decomposed(_times(basis.T, wide))
    return squares, basis @ vectors


def _times(few: Tensor, wide: Tensor) -> Tensor:
    """A product in 64 bits with a matrix in 32, of which no more than a part is widened at once."""
    return torch.cat([few @ part.double() for part in wide.split(4096, dim=1)], dim=1)


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
