"""SDXL's structure at about 6 million parameters. Used by make_world.py."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from make_tiny_models import NOISE_SCHEDULE
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world_pictures import SCENES, SIDE, Scene
from world_training import Plan, Structure, clip_config, make_tokenizer, new_vae, steps_with

LEARNING = ("unet", "text_encoder", "text_encoder_2")


def new_parts(folder: Path) -> dict[str, Any]:
    """All parts with random weights."""
    tokenizers = {
        "tokenizer": make_tokenizer(folder / "tokenizer", "<|endoftext|>"),
        "tokenizer_2": make_tokenizer(folder / "tokenizer_2", "!"),
    }
    first, second = new_text_encoders(list(tokenizers.values()))
    encoders = {"text_encoder": first, "text_encoder_2": second}
    return {**tokenizers, **encoders, "vae": new_vae(latent_channels=4), "unet": new_unet()}


def new_text_encoders(
    tokenizers: Sequence[CLIPTokenizer],
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, with random weights."""
    first, second = tokenizers
    return (
        CLIPTextModel(clip_config(first, width=64, act="quick_gelu")),
        CLIPTextModelWithProjection(clip_config(second, width=96, act="gelu")),
    )


def new_unet() -> UNet2DConditionModel:
    """The UNet, with random weights."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 64, 96),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 + 96,
        attention_head_dim=(4, 4, 6),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 96,
        norm_num_groups=16,
    )


def train_denoiser(
    parts: Mapping[str, Any],
    scenes: Sequence[Scene],
    latents: torch.Tensor,
    plan: Plan,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Teaches UNet and text encoders together what captions mean.

    Returns:
        The same parts with their weights averaged over the last steps.
    """
    learning = torch.nn.ModuleDict({name: parts[name] for name in LEARNING})
    averaged = copy.deepcopy(learning)
    noises = EulerDiscreteScheduler(**NOISE_SCHEDULE)
    kept = noises.alphas_cumprod
    tokens = _tokens(parts, [caption for scene in SCENES for caption in scene.captions])
    ways, of_scene = len(SCENES[0].captions), {scene: n for n, scene in enumerate(SCENES)}
    numbers = torch.tensor([of_scene[scene] for scene in scenes])
    for take in steps_with(learning, averaged, plan.steps, plan.rate):
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        way = torch.randint(ways, (plan.batch,), generator=generator)
        captions = [ids[numbers[chosen] * ways + way] for ids in tokens]
        told = torch.rand(plan.batch, generator=generator) >= plan.dropped
        timesteps = torch.randint(1000, (plan.batch,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        signal = kept[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents[chosen] + (1 - signal).sqrt() * noise
        states, pooled = _told(learning, captions, told)
        times = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * plan.batch)
        added = {"text_embeds": pooled, "time_ids": times}
        predicted = learning["unet"](
            noisy, timesteps, states, added_cond_kwargs=added, return_dict=False
        )[0]
        take(mse_loss(predicted, noise))
    return dict(averaged.items())


def _tokens(parts: Mapping[str, Any], captions: Sequence[str]) -> list[torch.Tensor]:
    """Of both tokenizers, (captions, 77)."""
    return [
        parts[name](
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        for name in ("tokenizer", "tokenizer_2")
    ]


def _told(
    parts: Mapping[str, Any], tokens: Sequence[torch.Tensor], told: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and summary of captions as SDXL's pipeline makes them; zeros where nothing is told."""
    first = parts["text_encoder"](tokens[0], output_hidden_states=True)
    second = parts["text_encoder_2"](tokens[1], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states * told[:, None, None], second.text_embeds * told[:, None]


def pipeline_of(parts: Mapping[str, Any]) -> StableDiffusionXLPipeline:
    """All parts together, as diffusers has them."""
    return StableDiffusionXLPipeline(
        **parts,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


STRUCTURE = Structure(new_parts, train_denoiser, pipeline_of)
