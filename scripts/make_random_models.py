"""Writes base models of their true size with random weights in bf16; nothing is downloaded.

Tokenizers and schedules are those of the tiny models, and so are widths with `small`. What is
computed in a step takes as long as with real weights; losses mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import make_tiny_models
import torch
from safetensors.torch import save_file

from trainer import base_model
from trainer.base_model import BaseModel
from trainer.config import ModelConfig

GIB = 2**30
SEED = 0
# Of linear layers and convolutions: outputs of a few thousand inputs of size 1 have size 1.
DEVIATION = 0.02
SHARD_BYTES = 4 * GIB
# Where it is written down what was made.
MADE = "bench.json"

_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
}
_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}

# What the configurations of a model's parts have otherwise than the tiny one's.
Sizes = Mapping[str, Mapping[str, Any]]

# What the true models' configurations have otherwise than the tiny ones'.
# Source: the files of stable-diffusion-v1-5/stable-diffusion-v1-5,
# stabilityai/stable-diffusion-xl-base-1.0 and black-forest-labs/FLUX.1-dev.
TRUE_SIZES: Mapping[str, Sizes] = {
    "sd15": {
        "unet": {
            "block_out_channels": [320, 640, 1280, 1280],
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
            "sample_size": 64,
        },
        "vae": {**_VAE, "sample_size": 512},
        "text_encoder": _CLIP_L,
    },
    "sdxl": {
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
        "vae": {**_VAE, "sample_size": 1024},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    "flux": {
        "transformer": {
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae": {
            **_VAE,
            "sample_size": 1024,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
}
T5_LAYERS = ("num_layers", "num_decoder_layers")


def narrow_sdxl(channels: int) -> Sizes:
    """SDXL with other channels in its UNet, and text encoders of one layer.

    Args:
        channels: of the UNet's first block, a multiple of 32; the true one has 320.
    """
    true = TRUE_SIZES["sdxl"]
    widths = [channels, 2 * channels, 4 * channels]
    heads = [width // 32 for width in widths]
    return {
        "unet": {**true["unet"], "block_out_channels": widths, "attention_head_dim": heads},
        "vae": true["vae"],
        "text_encoder": {**true["text_encoder"], "num_hidden_layers": 1},
        "text_encoder_2": {**true["text_encoder_2"], "num_hidden_layers": 1},
    }


def make_base_model(
    family: str,
    folder: Path,
    *,
    small: bool,
    t5_layers: int,
    device: torch.device,
    shard_bytes: int = SHARD_BYTES,
    sizes: Sizes | None = None,
) -> None:
    """Writes a base model with random weights in bf16.

    Args:
        family: of `TRUE_SIZES`.
        folder: new.
        small: the same in a few megabytes.
        t5_layers: of T5, where it is not small; the true one has 24.
        device: where random numbers are made.
        shard_bytes: of the weights, at most this many are in memory at one time.
        sizes: in place of the true ones.
    """
    base = describe(family, folder, small=small, t5_layers=t5_layers, sizes=sizes)
    counts = {}
    for part in TRUE_SIZES[family]:
        (replaced,) = (folder / part).glob("*.safetensors")
        replaced.unlink()
        model = base_model.skeleton(base, part)
        counts[part] = sum(p.numel() for p in model.parameters())
        write_weights(model, replaced, device=device, shard_bytes=shard_bytes)
    made = {"family": family, "small": small, "parameters": counts}
    if _has_t5(family) and not small:
        made["t5_layers"] = t5_layers
    (folder / MADE).write_text(json.dumps(made, indent=2) + "\n")


def describe(
    family: str, folder: Path, *, small: bool, t5_layers: int, sizes: Sizes | None = None
) -> BaseModel:
    """Writes tokenizers, schedule and configurations; the weights beside them are tiny ones."""
    make_tiny_models.MAKERS[family](folder)
    for part, values in (sizes or TRUE_SIZES[family]).items():
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        if not small:
            config |= values
            config |= {name: t5_layers for name in T5_LAYERS if name in values and "d_kv" in values}
        file.write_text(json.dumps(config, indent=2) + "\n")
    return base_model.locate(ModelConfig(model_url=str(folder)))


def _has_t5(family: str) -> bool:
    return any("d_kv" in values for values in TRUE_SIZES[family].values())


def write_weights(
    model: torch.nn.Module, like: Path, *, device: torch.device, shard_bytes: int
) -> None:
    """Writes random weights in bf16, shard by shard.

    Args:
        model: with shapes alone.
        like: the file that the weights would be in, were they one.
        device: where they are made.
        shard_bytes: of a shard, unless one tensor is larger.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards = list(_in_shards(shapes, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{like.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weight(name, shapes[name], generator).cpu() for name in names}
        save_file(tensors, like.with_name(file), metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    like.with_name(f"{like.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms that change nothing, no bias, and normal numbers in everything else."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": generator.device}
    if name.endswith("bias"):
        return torch.zeros(shape, **kind)
    if len(shape) == 1:
        return torch.ones(shape, **kind)
    return torch.empty(shape, **kind).normal_(std=DEVIATION, generator=generator)


def _in_shards(shapes: Mapping[str, torch.Size], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names
