"""Fully trained components as diffusers and transformers read them: a folder each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import durable, tensorfile

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER_WEIGHTS_NAME = "model.safetensors"

# The parts of a CLIP text model, which transformers 5 names without the step `text_model.`.
_FLAT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_TEXT_STEP = "text_model."
_PROJECTION = "text_projection."

# Entries of a transformers configuration that tell of a place or a program, or that the weights
# say themselves: loading takes the number format from the file.
_LEFT_OUT_OF_TEXT_CONFIG = {"transformers_version", "torch_dtype", "dtype"}


def write_denoiser(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[Path, Path]:
    """Writes `config.json` and the weights of a denoiser, for `from_pretrained`.

    Args:
        folder: by convention named after the component, such as `unet`.
        state: parameter name to trained tensor.
        config: the component's configuration, such as `dict(unet.config)`; entries that start
            with an underscore tell where it came from and are left out, all but the class name.
        dtype: number format of floating-point weights.

    Returns:
        The configuration and the weights.
    """
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") or key in ("_class_name", "_diffusers_version")
    }
    return _write_folder(folder, WEIGHTS_NAME, state, kept, dtype)


def write_text_encoder(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[Path, Path]:
    """Writes `config.json` and `model.safetensors` of a CLIP text encoder.

    Names go out with `text_model.`, as checkpoints have them: older versions of transformers
    read a file of shorter names as random weights, without a word.

    Args:
        folder: by convention named after the component, such as `text_encoder_2`.
        state: parameter name to trained tensor, in the names of any version of transformers.
        config: the encoder's configuration, such as `text_encoder.config.to_dict()`.
        dtype: number format of floating-point weights.

    Returns:
        The configuration and the weights.

    Raises:
        ValueError: a tensor that a CLIP text encoder does not have.
    """
    named = {_with_text_model(name): tensor for name, tensor in state.items()}
    projects = any(name.startswith(_PROJECTION) for name in named)
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in _LEFT_OUT_OF_TEXT_CONFIG
    }
    kept["architectures"] = ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"]
    return _write_folder(folder, TEXT_ENCODER_WEIGHTS_NAME, named, kept, dtype)


def _with_text_model(name: str) -> str:
    if name.startswith(_FLAT_PARTS):
        return _TEXT_STEP + name
    if not name.startswith((_TEXT_STEP, _PROJECTION)):
        raise ValueError(f"`{name}` belongs to no CLIP text encoder")
    return name


def _write_folder(
    folder: Path,
    weights_name: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[Path, Path]:
    config_path, weights_path = folder / "config.json", folder / weights_name
    durable.write_text(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensorfile.write(weights_path, state, {"format": "pt"}, dtype)
    return config_path, weights_path
