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


def write_denoiser(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> list[Path]:
    """Writes `config.json` and the weights of a denoiser, for `from_pretrained`.

    Args:
        folder: by convention named after the component, such as `unet`.
        state: parameter name to trained tensor.
        config: the component's configuration, such as `dict(unet.config)`; entries that start
            with an underscore tell where it came from and are left out, all but the class name.
        dtype: number format of floating-point weights.

    Returns:
        The written files, sorted.
    """
    kept = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") or key in ("_class_name", "_diffusers_version")
    }
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_NAME
    durable.write_text(config_path, json.dumps(kept, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    tensorfile.write(weights_path, tensors, {"format": "pt"})
    return [config_path, weights_path]
