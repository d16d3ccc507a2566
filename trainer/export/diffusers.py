"""The adapter as diffusers and PEFT read it: PEFT's own keys and a minimal configuration.

Keys that diffusers' training scripts write lose every attention layer on reload as soon as a
convolution is adapted, and a complete PEFT configuration is refused by older versions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import durable, tensorfile
from trainer.errors import InputError
from trainer.export.state import (
    AdapterState,
    LayerTensors,
    join_name,
    layer_rank,
    stored,
    with_text_model,
    without_text_model,
)
from trainer.sections.running import DIFFUSERS_NAME

FILE_NAME = f"{DIFFUSERS_NAME}.safetensors"
METADATA_KEY = "lora_adapter_metadata"

_PEFT_TYPES = {"lora": "LORA", "lokr": "LOKR", "loha": "LOHA"}


def write_diffusers(path: Path, state: AdapterState, dtype: torch.dtype) -> None:
    """Writes one file with the adapters of all components, for `load_lora_weights`.

    LoKr and LoHa files have the same keys and carry their PEFT configuration in the header,
    from which the loaders named in the model card rebuild them.

    Args:
        path: the file, by convention `pytorch_lora_weights.safetensors`.
        state: the trained adapter, folded or not.
        dtype: number format of the weights.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, layers in _by_component(state.fold()).items():
        for layer_path, parts in layers.items():
            for part, tensor in parts.items():
                name = join_name(with_text_model(layer_path), part)
                tensors[f"{component}.{name}"] = stored(part, tensor, dtype)
        config = peft_config(state, component, layers)
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
    tensorfile.write(path, tensors, header)


def write_peft_folders(folder: Path, state: AdapterState, dtype: torch.dtype) -> list[Path]:
    """Writes `<folder>/<component>/adapter_config.json` and `adapter_model.safetensors`.

    Layer names are those of the installed transformers: a PEFT folder of a CLIP text encoder
    fits the major version of transformers that wrote it.

    Returns:
        The written files, sorted.
    """
    written: list[Path] = []
    for component, layers in _by_component(state.fold()).items():
        tensors = {
            f"base_model.model.{join_name(path, part)}": stored(part, tensor, dtype)
            for path, parts in layers.items()
            for part, tensor in parts.items()
        }
        config = {
            "peft_type": _PEFT_TYPES[state.algorithm],
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            **peft_config(state, component, layers),
        }
        config_path = folder / component / "adapter_config.json"
        weights_path = folder / component / "adapter_model.safetensors"
        durable.write_text(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        tensorfile.write(weights_path, tensors, {"format": "pt"})
        written += [config_path, weights_path]
    return sorted(written)


def peft_config(
    state: AdapterState, component: str, layers: Mapping[str, LayerTensors]
) -> dict[str, Any]:
    """The fewest PEFT configuration fields that rebuild the folded layers of one component.

    Args:
        state: says the algorithm and the component's usual rank.
        component: whose layers these are.
        layers: layer path to folded tensors.
    """
    usual = state.strengths[component].rank
    ranks = {
        without_text_model(path): _peft_rank(tensors, usual) for path, tensors in layers.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {_pattern_key(path, ranks): other for path, other in ranks.items() if other != rank}
    common = {
        "r": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    if state.algorithm == "lora":
        flags = {"use_dora": state.use_dora, "use_rslora": False, "lora_bias": False}
        return {**common, **flags, "lora_alpha": rank, "bias": "none"}
    if state.algorithm == "loha":
        return {**common, "alpha": rank, "use_effective_conv2d": False}
    factor = {"decompose_both": False, "decompose_factor": _decompose_factor(layers)}
    return {**common, **factor, "alpha": rank, "use_effective_conv2d": False}


def kronecker_split(dimension: int, factor: int) -> tuple[int, int]:
    """The two sizes into which PEFT splits a dimension for LoKr.

    Args:
        dimension: rows or columns of the layer.
        factor: the wanted first size, or -1 for the split nearest to a square.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    first = max(size for size in range(1, limit + 1) if dimension % size == 0)
    return first, dimension // first


def _by_component(state: AdapterState) -> dict[str, dict[str, LayerTensors]]:
    components: dict[str, dict[str, LayerTensors]] = {}
    for (component, path), tensors in state.layers().items():
        components.setdefault(component, {})[path] = tensors
    return components


def _pattern_key(path: str, adapted: Iterable[str]) -> str:
    """The key under which PEFT finds a layer in a pattern, and no other adapted layer.

    PEFT lets a key stand for every path that ends in it (`peft.utils.get_pattern_key`), which is
    what text encoders of both spellings need; `^` makes it stand for the whole path alone.
    """
    is_ending = any(other.endswith(f".{path}") for other in adapted)
    return f"^{path}" if is_ending else path


def _peft_rank(tensors: LayerTensors, usual: int) -> int:
    """The rank with which PEFT builds a layer of these shapes: full factors need a large one."""
    rank = layer_rank(tensors)
    if rank is not None:
        return rank
    large = max(tensors["lokr_w2"].shape[:2])
    return usual if usual >= large / 2 else large


def _decompose_factor(layers: Mapping[str, LayerTensors]) -> int:
    """The factor under which PEFT splits every layer as its tensors are split."""
    first_sizes = {size for tensors in layers.values() for size in tensors["lokr_w1"].shape}
    for factor in [-1, *sorted(first_sizes)]:
        if all(_splits_like(tensors, factor) for tensors in layers.values()):
            return factor
    raise InputError.of(
        "lokr_w1",
        "these LoKr layers are split in a way that PEFT cannot rebuild",
        "keep the kohya file; LyCORIS and ComfyUI read it",
    )


def _splits_like(tensors: LayerTensors, factor: int) -> bool:
    first_rows, first_columns = tensors["lokr_w1"].shape
    if "lokr_w2" in tensors:
        rows, columns = tensors["lokr_w2"].shape[:2]
        possible_columns = [columns]
    else:
        rows, flat = tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1]
        # The columns of a low-rank factor may hold a kernel: 1x1 and 3x3 occur in the UNets.
        possible_columns = [flat // area for area in (1, 9) if flat % area == 0]
    return kronecker_split(first_rows * rows, factor) == (first_rows, rows) and any(
        kronecker_split(first_columns * columns, factor) == (first_columns, columns)
        for columns in possible_columns
    )
