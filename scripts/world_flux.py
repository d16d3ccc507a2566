"""FLUX.1's structure at about 6 million parameters. Used by make_world.py.

FLUX reads 512 places of T5 for each caption, nearly all of them padding. T5 is left as it is drawn,
so that its states are known beforehand; of the padding a few places are taken at each step, each
counted for as many as it stands for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast
from world_pictures import SCENES, Scene
from world_training import (
    OTHER_WORDS,
    Plan,
    Structure,
    clip_config,
    make_tokenizer,
    new_vae,
    steps_with,
)

LEARNING = ("transformer", "text_encoder")
# Places of T5 that the pipeline reads, those that may hold words, and those taken of the others.
PLACES, WORDS, PADS = 512, 16, 4
CLIP_WIDTH, T5_WIDTH = 64, 96
# The model is not distilled: it is told some guidance and shall not care.
GUIDANCES = (1.0, 5.0)


def new_parts(folder: Path) -> dict[str, Any]:
    """All parts with random weights."""
    clip, t5 = make_tokenizer(folder / "tokenizer", "<|endoftext|>"), make_t5_tokenizer()
    return {
        "tokenizer": clip,
        "tokenizer_2": t5,
        "text_encoder": CLIPTextModel(clip_config(clip, width=CLIP_WIDTH, act="quick_gelu")),
        "text_encoder_2": T5EncoderModel(_t5_config(t5)).eval().requires_grad_(False),
        "vae": new_vae(16, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        "transformer": new_transformer(),
    }


def make_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer for which each word of the world is one token; others are spelt."""
    captions = [text for scene in SCENES for text in scene.captions]
    words = sorted({word.strip(",") for text in [*captions, OTHER_WORDS] for word in text.split()})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    spelt = [(letter, -10.0) for letter in letters]
    return T5TokenizerFast(
        vocab=[*pieces, *((f"\u2581{word}", -1.0) for word in words), *spelt],
        extra_ids=0,
        model_max_length=PLACES,
    )


def _t5_config(tokenizer: T5TokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=T5_WIDTH // 4,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
    )


def new_transformer() -> FluxTransformer2DModel:
    """The transformer, with random weights."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def train_denoiser(
    parts: Mapping[str, Any],
    scenes: Sequence[Scene],
    latents: torch.Tensor,
    plan: Plan,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Teaches the transformer and CLIP together what captions mean.

    Returns:
        The same parts with their weights averaged over the last steps.
    """
    learning = torch.nn.ModuleDict({name: parts[name] for name in LEARNING})
    averaged = copy.deepcopy(learning)
    captions = [caption for scene in SCENES for caption in scene.captions]
    told = sorted(set(captions))
    ids = parts["tokenizer"](told, padding="max_length", return_tensors="pt").input_ids
    states = _t5_states(parts, told)
    of_caption = {caption: number for number, caption in enumerate(told)}
    ways = torch.tensor([[of_caption[text] for text in scene.captions] for scene in scenes])
    for take in steps_with(learning, averaged, plan.steps, plan.rate):
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        way = torch.randint(ways.shape[1], (plan.batch,), generator=generator)
        said = ways[chosen, way]
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = torch.randn(plan.batch, generator=generator).sigmoid()
        share = times.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents[chosen] + share * noise
        words, bias = some_places(states[said], generator)
        guidance = torch.empty(plan.batch).uniform_(*GUIDANCES, generator=generator)
        pooled = learning["text_encoder"](ids[said]).pooler_output
        predicted = velocity(learning["transformer"], noisy, times, words, pooled, guidance, bias)
        take(mse_loss(predicted, _packed(noise - latents[chosen])))
    return dict(averaged.items())


@torch.no_grad()
def _t5_states(parts: Mapping[str, Any], captions: Sequence[str]) -> torch.Tensor:
    """What the pipeline reads of captions (captions, 512, width)."""
    ids = parts["tokenizer_2"](
        list(captions), padding="max_length", max_length=PLACES, return_tensors="pt"
    ).input_ids
    return torch.cat([parts["text_encoder_2"](some)[0] for some in ids.split(100)])


def some_places(
    states: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of words and of some padding, and what to add to attention to each text place."""
    pads = WORDS + torch.randperm(PLACES - WORDS, generator=generator)[:PADS]
    bias = torch.zeros(WORDS + PADS)
    bias[WORDS:] = math.log((PLACES - WORDS) / PADS)
    return torch.cat([states[:, :WORDS], states[:, pads]], dim=1), bias


def velocity(
    transformer: FluxTransformer2DModel,
    noisy: torch.Tensor,
    times: torch.Tensor,
    words: torch.Tensor,
    pooled: torch.Tensor,
    guidance: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """The transformer's answer (B, places, 64)."""
    rows, columns = (side // 2 for side in noisy.shape[-2:])
    zero = torch.zeros(1)
    tokens = _packed(noisy)
    over_all = torch.cat([bias, torch.zeros(tokens.shape[1])])
    velocity: torch.Tensor = transformer(
        hidden_states=tokens,
        timestep=times,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        txt_ids=torch.zeros(words.shape[1], 3),
        img_ids=torch.cartesian_prod(
            zero, torch.arange(rows).float(), torch.arange(columns).float()
        ),
        joint_attention_kwargs={"attention_mask": over_all[None, None, None, :]},
        return_dict=False,
    )[0]
    return velocity


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 16, H, W) as tokens of 2 x 2 of them (B, H/2 * W/2, 64)."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def pipeline_of(parts: Mapping[str, Any]) -> FluxPipeline:
    """All parts together, as diffusers has them."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        shift=3.0,
        use_dynamic_shifting=True,
    )
    return FluxPipeline(**parts, scheduler=scheduler)


STRUCTURE = Structure(new_parts, train_denoiser, pipeline_of)
