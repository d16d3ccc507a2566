"""The adapter as ComfyUI, A1111, Forge, sd-scripts and LyCORIS read it.

The scale inside the weights, an alpha that no reader can mistake, and the names that the
family's table gives. DoRA magnitudes have two meanings in the field, so the file says which
one it follows. Layers that are one in the file become one adapter there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer import tensorfile
from trainer.export.facts import TrainingFacts
from trainer.export.fusing import can_split, halves_swapped, joined, with_swapped_halves
from trainer.export.state import (
    MAGNITUDE,
    AdapterState,
    LayerName,
    LayerTensors,
    layer_rank,
    stored,
    with_text_model,
)
from trainer.names import KohyaNames

DoraConvention = Literal["paper", "comfyui"]

# The weight of a layer before training: (component, layer path) → (out, in, …).
BaseWeight = Callable[[str, str], Tensor]

CONVENTION_KEY = "dora_convention"

_PARTS = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    MAGNITUDE: "dora_scale",
}
_LYCORIS_MODULE = "lycoris.kohya"

# sd-scripts' name of each hyperparameter that its metadata records (train_network.py).
_HEADER_NAMES = {
    "seed": "ss_seed",
    "max_train_steps": "ss_max_train_steps",
    "num_train_epochs": "ss_num_epochs",
    "batch_size": "ss_batch_size_per_device",
    "gradient_accumulation_steps": "ss_gradient_accumulation_steps",
    "gradient_checkpointing": "ss_gradient_checkpointing",
    "mixed_precision": "ss_mixed_precision",
    "learning_rate": "ss_learning_rate",
    "text_encoder_lr": "ss_text_encoder_lr",
    "optimizer": "ss_optimizer",
    "lr_scheduler": "ss_lr_scheduler",
    "lr_warmup_steps": "ss_lr_warmup_steps",
    "max_grad_norm": "ss_max_grad_norm",
    "cache_latents": "ss_cache_latents",
    "caption_dropout": "ss_caption_dropout_rate",
    "snr_gamma": "ss_min_snr_gamma",
    "noise_offset": "ss_noise_offset",
    "prior_loss_weight": "ss_prior_loss_weight",
    "random_flip": "ss_flip_aug",
}

_USAGE_HINTS: Mapping[DoraConvention, str] = {
    "paper": "DoRA magnitudes as in the paper and PEFT: right in LyCORIS; programs that divide by "
    "the norm of the base weight, such as ComfyUI, need the file marked for them",
    "comfyui": "DoRA magnitudes for programs that divide by the norm of the base weight, such as "
    "ComfyUI; wrong in LyCORIS, which needs the plain file",
}


class BaseWeightsNeeded(ValueError):
    """DoRA magnitudes that cannot be written without the weights before training."""


def write_kohya(
    path: Path,
    state: AdapterState,
    names: KohyaNames,
    facts: TrainingFacts,
    dtype: torch.dtype,
    *,
    convention: DoraConvention = "paper",
    base_weight: BaseWeight | None = None,
) -> None:
    """Writes one LoRA, LoKr or LoHa file with `ss_*` and ModelSpec metadata.

    Args:
        path: the file.
        state: the trained adapter, folded or not.
        names: the family's table of names.
        facts: what the header tells of the training.
        dtype: number format of the weights; alpha and magnitudes stay in fp32.
        convention: what DoRA magnitudes mean; without effect on other adapters.
        base_weight: weights before training, needed for DoRA under `comfyui` and for DoRA on
            some layers only of those that are one in the file.
    """
    tensors = kohya_tensors(state, names, dtype, convention=convention, base_weight=base_weight)
    alpha = max(float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha"))
    network = _network_header(state, names, convention, alpha)
    header = _training_header(names, facts) | network | _model_spec(names, facts, state, convention)
    tensorfile.write(path, tensors, header | _hashes(tensors, header))


def kohya_tensors(
    state: AdapterState,
    names: KohyaNames,
    dtype: torch.dtype,
    *,
    convention: DoraConvention = "paper",
    base_weight: BaseWeight | None = None,
) -> dict[str, Tensor]:
    """Names and tensors of the file; arguments as for `write_kohya`.

    Raises:
        BaseWeightsNeeded: base weights are needed and not given.
    """
    tensors: dict[str, Tensor] = {}
    for key, group in _by_file_layer(state.fold(), names).items():
        parts = _one_layer(key, group, names, base_weight)
        alpha = _alpha(state, next(iter(group))[0], parts)
        saved = _for_alpha(parts, alpha)
        saved = {part: stored(part, tensor, dtype) for part, tensor in saved.items()}
        if MAGNITUDE in saved:
            weight = None
            if convention == "comfyui":
                weight = _base_of_one_layer(key, group, names, base_weight)
            saved[MAGNITUDE] = _dora_scale(saved, alpha, weight)
        tensors |= {f"{key}.{_PARTS.get(part, part)}": tensor for part, tensor in saved.items()}
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each output row, shaped (out, 1, …) with the weight's number of axes."""
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (weight.ndim - 1))


def _by_file_layer(
    state: AdapterState, names: KohyaNames
) -> dict[str, dict[LayerName, LayerTensors]]:
    """The trained layers behind each layer of the file; a Kronecker product is alone in its own."""
    groups: dict[str, dict[LayerName, LayerTensors]] = {}
    for (component, path), parts in state.layers().items():
        key = names.of_layer(component, with_text_model(path), fused=can_split(parts))
        groups.setdefault(key, {})[component, path] = parts
    return groups


def _one_layer(
    key: str,
    group: Mapping[LayerName, LayerTensors],
    names: KohyaNames,
    base_weight: BaseWeight | None,
) -> LayerTensors:
    """The adapter of a layer of the file."""
    shares = names.layers_of(key)
    if len(shares) == 1:
        [(layer, parts)] = group.items()
        swaps = can_split(parts) and names.swaps_halves(*layer)
        return with_swapped_halves(parts) if swaps else parts
    layers = list(shares)

    def norms(number: int) -> Tensor:
        return row_norms(_given(base_weight)(*layers[number]).detach().to("cpu", torch.float32))

    return joined([group.get(layer) for layer in layers], list(shares.values()), norms)


def _base_of_one_layer(
    key: str,
    group: Mapping[LayerName, LayerTensors],
    names: KohyaNames,
    base_weight: BaseWeight | None,
) -> Tensor:
    """The weight before training of a layer of the file."""
    shares = names.layers_of(key)
    layers = list(group if len(shares) == 1 else shares)
    weight = torch.cat([_given(base_weight)(*layer).detach() for layer in layers])
    return halves_swapped(weight) if names.swaps_halves(*layers[0]) else weight


def _given(base_weight: BaseWeight | None) -> BaseWeight:
    if base_weight is None:
        raise BaseWeightsNeeded("these DoRA magnitudes need the weights before training")
    return base_weight


def _alpha(state: AdapterState, component: str, parts: LayerTensors) -> int:
    """The alpha under which every reader understands a layer.

    LoRA: the largest rank, the same in the whole file, because diffusers gives some layers the
    alpha of others. LoKr and LoHa, which diffusers does not read: the layer's own rank, because
    LyCORIS applies any other scale twice when it merges (lycoris 4.1.3, `get_merged_weight`).
    """
    if state.algorithm == "lora":
        return state.rank
    return layer_rank(parts) or state.strengths[component].rank


def _for_alpha(parts: LayerTensors, alpha: int) -> LayerTensors:
    """Folded tensors for an alpha that need not be the rank of this layer.

    Readers multiply by alpha / rank of the layer; the second factor takes the inverse.
    """
    rank = layer_rank(parts)
    if rank is None or rank == alpha:
        return parts
    return {**parts, "lora_B": parts["lora_B"] * (rank / alpha)}


def _dora_scale(saved: LayerTensors, alpha: int, weight: Tensor | None) -> Tensor:
    """Magnitudes as (out, 1, …), for the paper's formula or, given the base weight, ComfyUI's.

    ComfyUI computes m (W + dW) / ||W|| where the paper has m (W + dW) / ||W + dW||, so its
    file carries m ||W|| / ||W + dW||. Source: comfy/weight_adapter/base.py, version 0.12.1.
    """
    down, up = saved["lora_A"].float(), saved["lora_B"].float()
    magnitude = saved[MAGNITUDE].reshape(-1, *[1] * (down.ndim - 1))
    if weight is None:
        return magnitude
    before = weight.detach().to("cpu", torch.float32)
    scale = alpha / down.shape[0]
    after = before + scale * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
    return magnitude * row_norms(before) / row_norms(after)


def _network_header(
    state: AdapterState, names: KohyaNames, convention: DoraConvention, alpha: float
) -> dict[str, str]:
    args = _trained_strengths(state, names, alpha)
    is_lora = state.algorithm == "lora"
    if not is_lora:
        args["algo"] = state.algorithm
    if not is_lora or _has_convolutions(state):
        args |= {"conv_dim": f"{alpha:g}", "conv_alpha": f"{alpha:g}"}
    header: dict[str, str] = {}
    if state.use_dora:
        args |= {"dora_wd": "True", "wd_on_output": "True", CONVENTION_KEY: convention}
        header[CONVENTION_KEY] = convention
    return header | {
        "ss_network_module": names.network_module if is_lora else _LYCORIS_MODULE,
        "ss_network_dim": f"{alpha:g}",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(args, sort_keys=True),
    }


def _trained_strengths(state: AdapterState, names: KohyaNames, dim: float) -> dict[str, str]:
    """What was trained, for a reader of the header; the tensors carry it folded in.

    The first component's alpha, the denoiser's where it is adapted, its rank where the header's
    `dim` is another, and rank and alpha of every component that differs from it.
    """
    first, *others = sorted(
        state.strengths, key=lambda component: (component in names.text_encoder_prefixes, component)
    )
    usual = state.strengths[first]
    args = {"trained_alpha": f"{usual.alpha:g}"}
    if usual.rank != dim:
        args["trained_dim"] = str(usual.rank)
    for component in others:
        strength = state.strengths[component]
        if strength != usual:
            args[f"{component}_trained_dim"] = str(strength.rank)
            args[f"{component}_trained_alpha"] = f"{strength.alpha:g}"
    return args


def _has_convolutions(state: AdapterState) -> bool:
    """Whether LoRA layers have a kernel; sd-scripts counts 1x1 convolutions as linear."""
    downs = (tensors["lora_A"] for tensors in state.layers().values())
    return any(down[0, 0].numel() > 1 for down in downs)


def _training_header(names: KohyaNames, facts: TrainingFacts) -> dict[str, str]:
    header = {
        "ss_base_model_version": names.base_model_version,
        "ss_v2": "False",
        "ss_output_name": facts.output_name,
    }
    optional: dict[str, Any] = {
        "ss_sd_model_name": facts.base_model,
        "ss_num_train_images": facts.num_images or None,
    }
    if facts.width and facts.height:
        optional["ss_resolution"] = f"({facts.width}, {facts.height})"
    if facts.captions:
        frequencies = {facts.output_name: dict(facts.captions)}
        optional["ss_tag_frequency"] = json.dumps(frequencies, sort_keys=True)
    optional |= {theirs: facts.settings.get(ours) for ours, theirs in _HEADER_NAMES.items()}
    return header | {key: str(value) for key, value in optional.items() if value not in (None, "")}


def _model_spec(
    names: KohyaNames, facts: TrainingFacts, state: AdapterState, convention: DoraConvention
) -> dict[str, str]:
    """ModelSpec 1.0.1 without its date, so that equal runs give equal bytes."""
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{names.architecture}/lora",
        "modelspec.implementation": names.implementation,
        "modelspec.title": facts.output_name,
    }
    if facts.width and facts.height:
        spec["modelspec.resolution"] = f"{facts.width}x{facts.height}"
    if facts.instance_prompts:
        spec["modelspec.trigger_phrase"] = ", ".join(facts.instance_prompts)
    if state.use_dora:
        spec["modelspec.usage_hint"] = _USAGE_HINTS[convention]
    return spec


def _hashes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, str]:
    """The two identities by which user interfaces know a file (sd-scripts, train_util.py).

    Both are taken from the file as it would be with its `ss_*` metadata alone.
    """
    plain = {key: value for key, value in header.items() if key.startswith("ss_")}
    content = tensorfile.serialize(tensors, plain)
    data_start = 8 + int.from_bytes(content[:8], "little")
    window = content[0x100000:0x110000]
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(content)[data_start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }
