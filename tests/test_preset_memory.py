"""Presets named after a GPU fit into it, counted on models of their true size without data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import base_model
from trainer.base_model import Precision
from trainer.memory import training_footprint
from trainer.presets import list_presets, load_preset
from trainer.resolve import Layer, resolve

# For the driver, kernels' own workspaces and what allocation wastes.
SPARE = 2**30

# What configurations of the published models say, https://huggingface.co/black-forest-labs/FLUX.1-dev
# and https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, where the tiny ones differ.
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "projection_dim": 768,
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
FLUX: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
    },
    "vae": {**VAE, "sample_size": 1024},
}
SDXL: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "norm_num_groups": 32,
        "sample_size": 128,
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "vocab_size": 49408,
        "projection_dim": 1280,
    },
    "vae": {**VAE, "sample_size": 1024},
}
SIZES = {
    "flux": (FLUX, "flux_folder", 11_901_408_320),
    "sdxl": (SDXL, "sdxl_folder", 2_567_463_684),
}
GIGABYTES = {
    preset.name: int(preset.name.rpartition("-")[2].removesuffix("gb"))
    for preset in list_presets()
    if preset.name.endswith("gb")
}


# Of each family one that changes how weights are kept; the others in a thorough run.
SAMPLE = ("sdxl-8gb", "flux-12gb")


def true_size(tiny: Path, folder: Path, sizes: Mapping[str, Mapping[str, Any]]) -> Path:
    """A copy of a tiny model's configurations and tokenizers, with the numbers of the real one."""
    for path in tiny.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(tiny)).write_bytes(path.read_bytes())
    for part, values in sizes.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize("family", SIZES)
def test_models_of_true_size_have_the_published_number_of_weights(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sizes, tiny, published = SIZES[family]
    folder = true_size(request.getfixturevalue(tiny), tmp_path, sizes)
    config = resolve([Layer("test", {"model_url": str(folder), "images_data_url": "p"}, True)])
    base = base_model.locate(config.model)
    denoiser = base_model.skeleton(base, base.family.denoiser_name)
    assert sum(p.numel() for p in denoiser.parameters()) == published


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.thorough)
        for name in GIGABYTES
    ],
)
def test_a_preset_fits_the_gpu_it_is_named_after(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sizes, tiny, _ = SIZES[name.partition("-")[0]]
    folder = true_size(request.getfixturevalue(tiny), tmp_path, sizes)
    values = {
        "images_data_url": "photos",
        "model_url": str(folder),
        "resolution_width": 1024,
        "resolution_height": 1024,
    }
    given = {**values, **load_preset(name).values, "model_url": str(folder)}
    config = resolve([Layer("test", given, explicit=True)])
    narrow = torch.bfloat16
    assert config.adapter.use_lora or config.adapter.weights_dtype == "bf16"
    vae = torch.float32 if config.model.upscale_vae_32bit else narrow
    precision = Precision(frozen=narrow, denoiser=narrow, vae=vae, text_encoders=narrow)
    config = config.with_leaf("mixed_precision", "bf16")
    base = base_model.locate(config.model)
    footprint = training_footprint(base, precision, torch.device("cpu"), config)
    told = f"{footprint.peak_bytes / 2**30:.2f} GiB"
    assert footprint.peak_bytes + SPARE <= GIGABYTES[name] * 10**9, told
