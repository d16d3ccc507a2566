#!/usr/bin/env python3
"""Makes tiny base models with random weights and the true structure of their families.

Layer names, block layout, conditioning and file layout are those of the real checkpoints; only
widths are small, so that a training runs in seconds on a processor. Nothing is downloaded.

Usage: make_tiny_models.py sd15|sdxl FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def make_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every character is a token of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    if pad_token not in vocabulary:
        raise ValueError(f"pad token {pad_token!r} is not in the vocabulary")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=pad_token,
    )


def make_sd15(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A tiny Stable Diffusion 1.5 in diffusers layout: 64 px, 8 px per latent."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", "<|endoftext|>")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=_make_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            **NOISE_SCHEDULE, skip_prk_steps=True, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A tiny SDXL in diffusers layout: two text encoders, time ids, 64 px, 8 px per latent."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", "<|endoftext|>")
    tokenizer_2 = make_tokenizer(folder / "tokenizer_2", "!")
    projection = 32
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + projection,
        norm_num_groups=8,
    )
    second = _text_config(tokenizer_2, hidden_size=48, projection_dim=projection, act="gelu")
    pipeline = StableDiffusionXLPipeline(
        vae=_make_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, prediction_type=prediction_type),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder)
    return folder


def _make_vae(*, scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )


def _text_config(
    tokenizer: CLIPTokenizer,
    *,
    hidden_size: int,
    projection_dim: int = 32,
    act: str = "quick_gelu",
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection_dim,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


MAKERS = {"sd15": make_sd15, "sdxl": make_sdxl}


def main() -> None:
    """Makes the model named on the command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        sys.exit(__doc__)
    folder = MAKERS[sys.argv[1]](Path(sys.argv[2]))
    print(folder)


if __name__ == "__main__":
    main()
