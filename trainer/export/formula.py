"""Effective weights by arithmetic on a file's own tensors: the rules of the formats, written down.

A reader like the programs in `readers`, stricter than they are: what only some program would
forgive is an error here. Shares no code with the exporters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.export.layer_names import Layer, expected_names, live_layers
from trainer.export.readers import Reader, Reading, metadata_of
from trainer.names import KohyaNames

_KOHYA_HEADER = (
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
)


class FormatError(ValueError):
    """A file breaks a rule of its format."""


def _read_kohya(convention: str, pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    tensors, header = load_file(path), metadata_of(path)
    _require(all(key in header for key in _KOHYA_HEADER), "the header lacks required entries")
    has_dora = any(key.endswith(".dora_scale") for key in tensors)
    stated = header.get("dora_convention")
    _require(not has_dora or stated == convention, f"the header says DoRA is {stated!r}")
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    is_lora = any(".lora_down." in key for key in tensors)
    _require(
        not is_lora or len(alphas) == 1,
        f"expected one alpha in the whole file, found {sorted(alphas)}",
    )
    stated_alpha = float(header["ss_network_alpha"])
    _require(stated_alpha == max(alphas, default=None), "header and tensors differ in alpha")
    expected, layers = expected_names(pipeline, names), live_layers(pipeline)
    groups = _grouped(tensors, lambda key: tuple(key.split(".", 1)))
    for name, parts in groups.items():
        _require(name in expected, f"no layer is called `{name}`")
        layer = expected[name]
        is_kronecker = any(part.startswith("lokr_") for part in parts)
        _require(
            is_kronecker if layer.is_plain else not is_kronecker or len(layer.layers) == 1,
            f"`{name}` holds a change that belongs under another name",
        )
        _require(parts.get("alpha", torch.empty(1)).ndim == 0, f"`{name}` has no alpha of shape ()")
        _require(("dora_scale" in parts) == has_dora, f"`{name}` has no dora_scale")
        alpha = float(parts.pop("alpha"))
        weight = layer.weight(layers)
        changed = _kohya_weight(weight, parts, alpha, convention)
        keys = len(parts)
        for (live, before), (_, after) in zip(
            layer.parts(weight, layers), layer.parts(changed, layers), strict=True
        ):
            yield Reading(*live, before, after, keys)
            keys = 0


def _read_paper(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """The meaning of LyCORIS and the paper."""
    yield from _read_kohya("paper", pipeline, path, names)


def _read_comfyui(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """The meaning of ComfyUI, whose DoRA divides by the norm of the base weight."""
    yield from _read_kohya("comfyui", pipeline, path, names)


def _read_diffusers(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """PEFT keys with the configuration in the header."""
    tensors = load_file(path)
    config = json.loads(metadata_of(path).get("lora_adapter_metadata", "null"))
    _require(isinstance(config, dict), "the header has no adapter configuration")
    layers = live_layers(pipeline)
    groups = _grouped(tensors, _split_peft_key)
    with_magnitude = {"lora_magnitude_vector.weight" in parts for parts in groups.values()}
    _require(len(with_magnitude) == 1, "some layers have DoRA magnitudes and some have none")
    for name, parts in groups.items():
        component, _, file_path = name.partition(".")
        layer = _live_layer(layers, component, file_path)
        weight = _weight(layers[layer])
        scale = _stated_scale(config, component, file_path, _inner_dimension(parts))
        yield Reading(*layer, weight, adapted_weight(weight, parts, scale), len(parts))


def _kohya_weight(
    weight: Tensor, parts: Mapping[str, Tensor], alpha: float, convention: str
) -> Tensor:
    if "lora_down.weight" in parts:
        down, up = parts["lora_down.weight"].float(), parts["lora_up.weight"].float()
        _require_product_shapes(weight, down, up)
        changed = weight + _product(up, down, weight) * (alpha / down.shape[0])
    else:
        rank = _kronecker_or_hadamard_rank(parts)
        _require(rank in (None, alpha), f"alpha {alpha} of rank {rank} is applied twice on merging")
        changed = weight + _other_delta(parts, weight) * (alpha / rank if rank else 1.0)
    if "dora_scale" not in parts:
        return changed
    magnitude = parts["dora_scale"].float()
    column = (weight.shape[0], *[1] * (weight.ndim - 1))
    _require(magnitude.shape == column, f"dora_scale is {tuple(magnitude.shape)}, not {column}")
    divisor = {"paper": changed, "comfyui": weight}[convention]
    return magnitude * changed / _norm_of_rows(divisor)


def adapted_weight(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """A layer's weight with an adapter on it, in 32 bits.

    Args:
        weight: of the base model, fp32.
        parts: the adapter's tensors by their names in a diffusers file, such as `lora_A.weight`.
        scale: on their product.

    Raises:
        FormatError: they are not an adapter of such a weight.
    """
    if "lora_A.weight" not in parts:
        return weight + _other_delta(parts, weight) * scale
    down, up = parts["lora_A.weight"].float(), parts["lora_B.weight"].float()
    _require_product_shapes(weight, down, up)
    changed = weight + _product(up, down, weight) * scale
    if "lora_magnitude_vector.weight" not in parts:
        return changed
    magnitude = parts["lora_magnitude_vector.weight"].float()
    rows = weight.shape[0]
    expected = (rows,) if weight.ndim == 2 else (1, rows, 1, 1)
    _require(magnitude.shape == expected, f"magnitude is {tuple(magnitude.shape)}, not {expected}")
    column = magnitude.reshape(rows, *[1] * (weight.ndim - 1))
    return column * changed / _norm_of_rows(changed)


def _other_delta(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """kron(w1, w2) for LoKr; (w1_a w1_b) * (w2_a w2_b) for LoHa; reshaped to the weight."""
    factors = {part: tensor.float() for part, tensor in parts.items()}
    _require(not any("_t" in part for part in parts), "Tucker cores are not read everywhere")
    if "hada_w1_a" in factors:
        left = factors["hada_w1_a"] @ factors["hada_w1_b"]
        return (left * (factors["hada_w2_a"] @ factors["hada_w2_b"])).reshape(weight.shape)
    _require("lokr_w1" in factors, "the first Kronecker factor is not one matrix")
    small = factors["lokr_w1"]
    if "lokr_w2" in factors:
        large = factors["lokr_w2"]
    else:
        large = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    if large.ndim == 2 and weight.ndim == 4:
        large = large.reshape(large.shape[0], -1, *weight.shape[2:])
    small = small.reshape(*small.shape, *[1] * (large.ndim - 2))
    return torch.kron(small, large).reshape(weight.shape)


def _kronecker_or_hadamard_rank(parts: Mapping[str, Tensor]) -> int | None:
    return next((parts[n].shape[0] for n in ("hada_w1_b", "lokr_w2_b") if n in parts), None)


def _product(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def _norm_of_rows(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (weight.ndim - 1))


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach().float()


def _grouped(tensors: Mapping[str, Tensor], split: Any) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        _require("." in key, f"`{key}` belongs to no layer")
        layer, part = split(key)
        groups.setdefault(layer, {})[part] = tensor
    return groups


def _split_peft_key(key: str) -> tuple[str, str]:
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"):
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), part
    layer, _, part = key.rpartition(".")
    _require(part.startswith(("lokr_", "hada_")), f"`{key}` is not a key of this format")
    return layer, part


def _live_layer(layers: Mapping[Layer, nn.Module], component: str, path: str) -> Layer:
    if (component, path) in layers:
        _require(
            "text_encoder" not in component or path.startswith("text_"),
            f"`{component}.{path}` lacks `text_model`",
        )
        return component, path
    flat = (component, path.removeprefix("text_model."))
    _require(flat in layers, f"there is no layer `{component}.{path}`")
    return flat


def _inner_dimension(parts: Mapping[str, Tensor]) -> int | None:
    if "lora_A.weight" in parts:
        return parts["lora_A.weight"].shape[0]
    return _kronecker_or_hadamard_rank(parts)


def _stated_scale(config: Mapping[str, Any], component: str, path: str, found: int | None) -> float:
    rank = config[f"{component}.r"]
    alpha = config.get(f"{component}.lora_alpha", config.get(f"{component}.alpha"))
    plain = path.removeprefix("text_model.")
    rank = _by_ending(config.get(f"{component}.rank_pattern") or {}, plain, rank)
    alpha = _by_ending(config.get(f"{component}.alpha_pattern") or {}, plain, alpha)
    _require(alpha == rank, f"`{path}` needs alpha {alpha} of rank {rank}, which not all apply")
    _require(found in (None, rank), f"`{path}` is of rank {found}, where the header says {rank}")
    return float(alpha) / float(rank)


def _by_ending(pattern: Mapping[str, Any], path: str, usual: Any) -> Any:
    """The entry of the first key that is a whole path, or the steps in which one ends."""
    endings = [path[start:] for start in [0, *(m.end() for m in re.finditer(r"\.", path))]]
    for key, value in pattern.items():
        possible = endings[:1] if key.startswith("^") else endings
        if any(re.fullmatch(key, ending) for ending in possible):
            return value
    return usual


def _require_product_shapes(weight: Tensor, down: Tensor, up: Tensor) -> None:
    rank, kernel = down.shape[0], weight.shape[2:]
    _require(
        down.shape == (rank, *weight.shape[1:])
        and up.shape == (weight.shape[0], rank, *[1] * len(kernel)),
        f"factors {tuple(up.shape)} and {tuple(down.shape)} for a weight {tuple(weight.shape)}",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FormatError(otherwise)


FORMULA = Reader("formula", _read_diffusers)
PAPER_FORMULA = Reader("formula", _read_paper)
COMFYUI_FORMULA = Reader("comfyui formula", _read_comfyui)
