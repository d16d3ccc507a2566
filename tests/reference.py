"""The training on one page: what the engine computes, without what makes it an engine.

Plain torch, diffusers and PEFT on a folder, one example at a time, nothing kept: SDXL here, flow
matching by `reference_flow`. Pictures have the trained size. New tokens are rows of a resized
table whose other rows are put back after each step. Only the draws are the engine's, so that both
draw the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from reference_flow import ERRORS
from skimage.transform import rotate
from torch import Tensor
from torch.nn.functional import avg_pool2d

from trainer.randomness import key, permutation, source

Array = NDArray[np.float64]
SEED, WORDS = 42, ["<s0>", "<s1>"]
TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2")


@dataclass(frozen=True)
class Recipe:
    """What is trained; the pivot is the step from which new tokens stay as they are."""

    pictures: list[Path]
    denoiser: str = "unet"
    targets: tuple[str, ...] = TARGETS
    class_pictures: tuple[Path, ...] = ()
    rank: int | None = 4
    use_dora: bool = False
    pivot: int = 0
    masked: bool = False
    rotation: float = 0
    snr_gamma: float = math.inf
    learning_rate: float = 2e-4
    batch: int = 2
    steps: int = 20


def normal(purpose: str, position: int, *shape: int) -> Tensor:
    """The numbers that belong to a purpose and a position."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(SEED, purpose, position)))


def add_words(pipe: Any) -> list[tuple[Tensor, Tensor]]:
    """Resizes both tables; each with what it was before."""
    tables = []
    for name in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
        before = encoder.get_input_embeddings().weight.detach().clone()
        tokenizer.add_tokens(WORDS)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight.requires_grad_(True)
        for row in range(len(WORDS)):
            draw = normal(f"token text_encoder{name}", row, table.shape[1])
            table.data[len(before) + row] = before.std() * draw
        tables.append((table, before))
    return tables


def add_lora(denoiser: torch.nn.Module, recipe: Recipe) -> None:
    torch.manual_seed(key(SEED, f"adapter {recipe.denoiser}"))
    leaves = [name for name, module in denoiser.named_modules() if not [*module.children()]]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank,
        target_modules=[n for n in leaves if any(n.endswith(f".{t}") for t in recipe.targets)],
        init_lora_weights="gaussian",
        use_dora=recipe.use_dora,
    )
    inject_adapter_in_model(config, denoiser)


def turned(values: Array, angle: float) -> Array:
    """Turned about the middle, degrees counter-clockwise; edges are repeated outside."""
    return rotate(values, angle, order=1, mode="edge", preserve_range=True)


def is_picture(angle: float, size: tuple[int, int]) -> Array:
    """Which pixels of a turned picture have their middle inside it before it was turned."""
    down, right = (np.indices(size) + 0.5) - np.array(size).reshape(2, 1, 1) / 2
    point = (right + 1j * down) * np.exp(1j * math.radians(angle))
    return (abs(point.real) <= size[1] / 2) & (abs(point.imag) <= size[0] / 2)


def as_batch(values: Array) -> Tensor:
    """(H, W, C) as (1, C, H, W) in 32 bits."""
    return torch.from_numpy(values.transpose(2, 0, 1)[None]).float()


def example_loss(pipe: Any, recipe: Recipe, path: Path, caption: str, position: int) -> Tensor:
    """The loss of one picture; class pictures have negative positions."""
    picture = np.array(Image.open(path)).astype(np.float64)
    luminance = picture @ [0.299, 0.587, 0.114] / 255
    angle = source(SEED, "rotation", position).uniform(-recipe.rotation, recipe.rotation)
    pixels = as_batch(turned(picture, angle).round()) / 255
    posterior = pipe.vae.encode(pixels * 2 - 1).latent_dist
    size = posterior.mean.shape[1:]
    latents = posterior.mean + posterior.std * normal("posterior", position, *size)
    noise = normal("noise", position, 1, *size)
    if type(pipe) in ERRORS:
        uniform = source(SEED, "timestep", position).random()
        error, weight = ERRORS[type(pipe)](pipe, latents, noise, caption, uniform), 1.0
    else:
        error, snr, is_v = sdxl_errors(pipe, latents, noise, caption, position)
        weight = min(snr, recipe.snr_gamma) / (snr + 1 if is_v else snr)
    if recipe.masked:
        kept = turned((luminance + 0.001).clip(0, 1), angle) * is_picture(angle, picture.shape[:2])
        mask = avg_pool2d(as_batch(kept[..., None]), 8)
        error = error * mask / mask.mean()
    return error.mean() * (weight if position >= 0 and recipe.snr_gamma < math.inf else 1)


def sdxl_errors(
    pipe: Any, latents: Tensor, noise: Tensor, caption: str, position: int
) -> tuple[Tensor, float, bool]:
    """Squared errors (1, 4, h, w), the signal-to-noise ratio, and whether velocity is predicted."""
    latents = latents * pipe.vae.config.scaling_factor
    timestep = torch.tensor([source(SEED, "timestep", position).randrange(0, 1000)])
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
        output = encoder(ids.input_ids, output_hidden_states=True)
        states, pooled = [*states, output.hidden_states[-2]], output[0]
    height, width = (8 * side for side in latents.shape[2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]])
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    share = float(schedule.alphas_cumprod[timestep].double())
    signal, sigma = math.sqrt(share), math.sqrt(1 - share)
    prediction = pipe.unet(
        signal * latents + sigma * noise,
        timestep,
        torch.cat(states, dim=-1),
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    ).sample
    is_v = schedule.config.prediction_type == "v_prediction"
    target = signal * noise - sigma * latents if is_v else noise
    return (prediction - target).square(), share / (1 - share), is_v


def loaded(folder: Path, recipe: Recipe) -> Any:
    """The pipeline, in which nothing learns but the denoiser or its adapter."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    denoiser = pipe.components[recipe.denoiser]
    denoiser.train().requires_grad_(recipe.rank is None)
    if recipe.rank is not None:
        add_lora(denoiser, recipe)
    return pipe


def train(folder: Path, recipe: Recipe) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and what was learnt."""
    pipe = loaded(folder, recipe)
    denoiser = pipe.components[recipe.denoiser]
    tables = add_words(pipe) if recipe.pivot else []
    caption = f"A photograph of a {''.join(WORDS) if recipe.pivot else 'TOK'}"
    weights = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights.values()), "weight_decay": 1e-4},
            {"params": [table for table, _ in tables], "weight_decay": 1e-3},
        ],
        lr=recipe.learning_rate,
    )
    losses, learnt = [], {f"rows {number}": table for number, (table, _) in enumerate(tables)}
    count, others = len(recipe.pictures), recipe.class_pictures
    for step in range(recipe.steps):
        if step == recipe.pivot:
            for table, _ in tables:
                table.requires_grad_(False)
            tables = []
        epoch, place = divmod(step, math.ceil(count / recipe.batch))
        order = permutation(SEED, "order", epoch, count)
        start = place * recipe.batch
        chosen = order[start : start + recipe.batch]
        loss = torch.zeros(())
        for j, number in enumerate(chosen):
            position = step * recipe.batch + j
            picture = recipe.pictures[number]
            loss = loss + example_loss(pipe, recipe, picture, caption, position) / len(chosen)
            if others:
                turn, used = divmod(epoch * count + start + j, len(others))
                other = others[permutation(SEED, "class order 0", turn, len(others))[used]]
                prior = example_loss(pipe, recipe, other, "a photo of a man", ~position)
                loss = loss + prior / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        for table, before in tables:
            table.grad[: len(before)] = 0
        torch.nn.utils.clip_grad_norm_([*weights.values(), *(table for table, _ in tables)], 1.0)
        optimizer.step()
        losses.append(loss.item())
        for table, before in tables:
            rows = table.data[len(before) :]
            rows *= (before.std() / rows.std()) ** 0.1
            table.data[: len(before)] = before
    rows = {name: table.detach()[-len(WORDS) :] for name, table in learnt.items()}
    return losses, {name: p.detach() for name, p in weights.items()} | rows
