"""A trained adapter as plain tensors, and the one spelling in which every reader agrees on it.

Readers differ on what alpha means for each algorithm, so files carry the scale inside the
weights and one constant alpha that equals the rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["lora", "lokr", "loha"]
LayerName = tuple[str, str]
LayerTensors = dict[str, Tensor]

MAGNITUDE = "lora_magnitude_vector"

_NAME = re.compile(r"(?P<path>.+)\.(?P<part>(?:lora|lokr|hada)_[A-Za-z0-9_]+)(?:\.weight)?")


def split_name(name: str) -> tuple[str, str]:
    """Layer path and part of a PEFT tensor name: `a.b.lora_A.weight` → `a.b`, `lora_A`.

    Raises:
        ValueError: the name is not one of an adapter tensor.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return match["path"], match["part"]


def join_name(path: str, part: str) -> str:
    """The PEFT tensor name of a part; LoRA's parts end in `.weight`, magnitudes too."""
    return f"{path}.{part}.weight" if part.startswith("lora_") else f"{path}.{part}"


def with_text_model(path: str) -> str:
    """A CLIP layer path with the `text_model.` that every reader expects.

    transformers 5 dropped that step from the module names of CLIPTextModel.
    """
    return f"text_model.{path}" if path.startswith("encoder.layers.") else path


def without_text_model(path: str) -> str:
    """A CLIP layer path without `text_model.`: as a suffix it matches both spellings."""
    return path.removeprefix("text_model.")


@dataclass(frozen=True)
class Strength:
    """How large the adapter of one component is, and how strong.

    Args:
        rank: inner dimension; the largest one where layers differ.
        alpha: the change is scaled by alpha / rank.
    """

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the adapter's product."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdapterState:
    """A trained adapter in PEFT names.

    Args:
        algorithm: how the tensors of a layer become a change of its weight.
        use_dora: whether rows carry magnitudes of their own.
        components: pipeline component to tensor name to tensor.
        strengths: the same components to rank and alpha.
    """

    algorithm: Algorithm
    use_dora: bool
    components: Mapping[str, Mapping[str, Tensor]]
    strengths: Mapping[str, Strength]

    @property
    def rank(self) -> int:
        """The largest rank of all components."""
        return max(strength.rank for strength in self.strengths.values())

    def layers(self) -> dict[LayerName, LayerTensors]:
        """(component, layer path) to the layer's tensors by part, such as `lora_A`; sorted."""
        layers: dict[LayerName, LayerTensors] = {}
        for component, name, tensor in self._tensors():
            path, part = split_name(name)
            layers.setdefault((component, path), {})[part] = tensor
        return dict(sorted(layers.items()))

    def fold(self) -> AdapterState:
        """The same adapter with the scale inside its weights and alpha = rank, in fp32 on the CPU.

        LoKr's small factor becomes one matrix, and Tucker cores are multiplied into the factor
        beside them, because readers disagree on both. Factors that are powers of two change
        no mantissa bit.
        """
        fold = FOLDS[self.algorithm]
        folded = {
            (component, path): fold(
                {part: _plain(tensor) for part, tensor in tensors.items()},
                self.strengths[component].scale,
            )
            for (component, path), tensors in self.layers().items()
        }
        ranks = {component: strength.rank for component, strength in self.strengths.items()}
        return self.of_layers(self.algorithm, ranks, folded)

    @classmethod
    def of_layers(
        cls,
        algorithm: Algorithm,
        ranks: Mapping[str, int],
        layers: Mapping[LayerName, LayerTensors],
    ) -> AdapterState:
        """An adapter whose scale is one, from tensors grouped as `layers` groups them.

        Args:
            ranks: component to its usual rank; see `largest_ranks`.
        """
        components: dict[str, dict[str, Tensor]] = {}
        for (component, path), tensors in sorted(layers.items()):
            named = {join_name(path, part): tensor for part, tensor in tensors.items()}
            components.setdefault(component, {}).update(named)
        use_dora = any(MAGNITUDE in tensors for tensors in layers.values())
        strengths = {
            component: Strength(ranks[component], ranks[component]) for component in components
        }
        return cls(algorithm, use_dora, components, strengths)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for component, tensors in self.components.items():
            for name, tensor in tensors.items():
                yield component, name, tensor


def layer_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """The inner dimension of one layer's folded tensors; None where no factor is low-rank."""
    for part, axis in (("lora_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in tensors:
            return tensors[part].shape[axis]
    return None


def largest_ranks(layers: Mapping[LayerName, LayerTensors]) -> dict[str, int]:
    """Component to the largest rank among its folded layers.

    Where no factor of a component is low-rank, the rows of its largest full factor stand in.
    """
    ranks: dict[str, int] = {}
    widths: dict[str, int] = {}
    for (component, _), tensors in layers.items():
        rank = layer_rank(tensors)
        if rank is not None:
            ranks[component] = max(rank, ranks.get(component, 0))
        else:
            widths[component] = max(tensors["lokr_w2"].shape[0], widths.get(component, 0))
    return widths | ranks


def stored(part: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it goes into a file: magnitudes stay in fp32, they are few and all-important."""
    return tensor.to(torch.float32 if part == MAGNITUDE else dtype)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _fold_lora(tensors: LayerTensors, scale: float) -> LayerTensors:
    return {**tensors, "lora_B": tensors["lora_B"] * scale}


def _fold_lokr(tensors: LayerTensors, scale: float) -> LayerTensors:
    if "lokr_w1" in tensors:
        small = tensors["lokr_w1"]
    else:
        small = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    folded = {"lokr_w1": small * scale}
    if "lokr_w2" in tensors:
        return {**folded, "lokr_w2": tensors["lokr_w2"]}
    return {**folded, **_without_core(tensors, "lokr_w2", "lokr_t2")}


def _fold_loha(tensors: LayerTensors, scale: float) -> LayerTensors:
    folded = {
        **_without_core(tensors, "hada_w1", "hada_t1"),
        **_without_core(tensors, "hada_w2", "hada_t2"),
    }
    return {**folded, "hada_w1_a": folded["hada_w1_a"] * scale}


def _without_core(tensors: LayerTensors, factor: str, core: str) -> LayerTensors:
    """The two factors with a Tucker core (r, r, k, k) multiplied into the second: (r, in*k*k)."""
    a, b = tensors[f"{factor}_a"], tensors[f"{factor}_b"]
    if core in tensors:
        b = torch.einsum("ijkl,jc->ickl", tensors[core], b).flatten(1)
        a = a.T.contiguous()
    return {f"{factor}_a": a, f"{factor}_b": b}


FOLDS: Mapping[Algorithm, Callable[[LayerTensors, float], LayerTensors]] = {
    "lora": _fold_lora,
    "lokr": _fold_lokr,
    "loha": _fold_loha,
}
