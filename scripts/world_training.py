"""What the small base models have in common, of whatever structure: their VAE, their words, steps.

Used by make_world.py; see there.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPTextConfig, CLIPTokenizer
from world_pictures import SCENES, SIDE, Scene, anything, draw

# Pixels of a side of the parts that a VAE learns from, and the share of its steps that they last.
PART, WHOLE_FROM = 32, 0.6

# Of the running mean of weights that is kept in the end.
DECAY = 0.998

# Words that are no word of the world, for new things to be called by.
OTHER_WORDS = "a picture of the figure thing style striped two half photo in with and TOK sks"


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        vae_steps: of `vae_batch` parts of pictures.
        vae_copies: pictures of each scene that the VAE learns from, beside as many of anything.
        vae_rate: its highest learning rate.
        steps: of `batch` latents, of UNet and text encoders together.
        copies: pictures of each scene that latents are made of.
        rate: the highest learning rate of UNet and text encoders.
        dropped: share of captions that are left out, for guidance.
    """

    vae_steps: int = 3600
    vae_batch: int = 32
    steps: int = 3000
    batch: int = 48
    copies: int = 40
    vae_copies: int = 10
    vae_rate: float = 3e-3
    rate: float = 1.5e-3
    dropped: float = 0.1


TRIED = Plan(vae_steps=4, vae_batch=4, steps=4, batch=8, copies=1, vae_copies=1)


@dataclass(frozen=True)
class Structure:
    """How a family's model is put together.

    Args:
        new_parts: all parts by name, with random weights; tokenizers are made in a folder.
        train_denoiser: teaches the denoiser, and encoders beside it, what captions mean: of parts,
            scenes, latents of variance 1, plan and generator. Returns what it has taught.
        pipeline_of: all parts together, as diffusers has them.
    """

    new_parts: Callable[[Path], dict[str, Any]]
    train_denoiser: Callable[
        [Mapping[str, Any], Sequence[Scene], torch.Tensor, Plan, torch.Generator], dict[str, Any]
    ]
    pipeline_of: Callable[[Mapping[str, Any]], DiffusionPipeline]


def make_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer for which each word of the world is one token; others are spelt."""
    words = sorted({word for scene in SCENES for text in scene.captions for word in text.split()})
    corpus = [*words, *OTHER_WORDS.lower().split()]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=letters,
        # Known from the start: else numbered as they are met, which differs from run to run.
        special_tokens=[*letters, *(letter + "</w>" for letter in letters)],
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator(corpus * 2, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learnt["merges"]]
    made = ["".join(merge.split()) for merge in merges]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += [word for word in made if word not in vocabulary]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {word: number for number, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=pad_token,
    )


def new_vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    """A VAE of 8 px per latent, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 24, 64, 128),
        layers_per_block=1,
        latent_channels=latent_channels,
        # Groups of one channel would take away how light a picture is.
        norm_num_groups=2,
        sample_size=SIDE,
        **config,
    )


def clip_config(tokenizer: CLIPTokenizer, *, width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=96,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def steps_with(
    learning: torch.nn.Module, averaged: torch.nn.Module, count: int, rate: float
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Gives, for each step, what takes it: a function of the loss.

    The learning rate warms up over a twentieth and ends at nothing along a cosine.

    Args:
        learning: trained.
        averaged: a copy of it, which gets the running mean of its weights.
        count: of steps.
        rate: the highest learning rate.
    """
    parameters, means = list(learning.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    warm = max(1, count // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / count)) / 2)
    )
    losses: list[float] = []
    started = time.perf_counter()

    def take(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(means, parameters, 1 - DECAY)
        losses.append(loss.item())

    for step in range(1, count + 1):
        yield take
        if step % max(1, count // 20) == 0:
            mean = statistics.mean(losses[-100:])
            left = (time.perf_counter() - started) / step * (count - step)
            name = type(learning).__name__
            print(f"{name} {step}/{count}: {mean:.4f}, {left:.0f} s left", flush=True)


@contextmanager
def in_half() -> Iterator[None]:
    """Products in bf16, where a processor has it; else nothing changes."""
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        yield


def train_vae(vae: AutoencoderKL, plan: Plan, generator: torch.Generator) -> None:
    """Teaches a VAE pictures of the world and as many of more than that.

    Parts of pictures come first: they cost less, and most of a picture is of one colour.
    """
    vae.train()
    # Little noise in the latents at first, or nothing is learnt of where things are.
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    last.bias.data[vae.config.latent_channels :] = -8.0
    known = draw([scene for scene in SCENES for _ in range(plan.vae_copies)], generator)
    pool = torch.cat([known, anything(len(known), generator)]) * 2 - 1
    averaged = copy.deepcopy(vae)
    for step, take in enumerate(steps_with(vae, averaged, plan.vae_steps, plan.vae_rate)):
        whole = step >= WHOLE_FROM * plan.vae_steps
        count = plan.vae_batch // (SIDE // PART) ** 2 if whole else plan.vae_batch
        pictures = pool[torch.randint(len(pool), (count,), generator=generator)]
        if not whole:
            pictures = parts_of(pictures, generator)
        with in_half():
            latents = vae.encode(pictures).latent_dist
            noise = torch.randn(latents.mean.shape, generator=generator)
            decoded = vae.decode(latents.mean + latents.std * noise).sample.float()
        weight = 1e-6 * latents.kl().mean()
        take(l1_loss(decoded, pictures) + mse_loss(decoded, pictures) + weight)
    vae.load_state_dict(averaged.state_dict())
    vae.eval().requires_grad_(False)


def parts_of(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of each picture a square of `PART` pixels, anywhere."""
    corners = torch.randint(SIDE - PART + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack(
        [
            picture[:, top : top + PART, left : left + PART]
            for picture, (top, left) in zip(pictures, corners, strict=True)
        ]
    )


@torch.no_grad()
def encoded(
    vae: AutoencoderKL, plan: Plan, generator: torch.Generator
) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, each as often as there are pictures of it, and their latents of variance 1.

    Where a family shifts latents, their mean is 0, too.
    """
    scenes = [scene for scene in SCENES for _ in range(plan.copies)]
    latents = []
    for start in range(0, len(scenes), 200):
        pictures = draw(scenes[start : start + 200], generator) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.mean)
    found = torch.cat(latents)
    shift = 0.0
    if vae.config.shift_factor is not None:
        shift = round(found.mean().item(), 5)
        vae.register_to_config(shift_factor=shift)
    vae.register_to_config(scaling_factor=round(1 / found.std().item(), 5))
    return scenes, (found - shift) * vae.config.scaling_factor


@torch.no_grad()
def fidelity(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """How alike pictures are that the VAE gives back, in dB of the ratio of peak to noise."""
    back = vae(pictures * 2 - 1).sample / 2 + 0.5
    return -10 * math.log10(mse_loss(back.clamp(0, 1), pictures).item())
