"""A plain training loop with faults that reference scripts carry, to measure what they cost.

Each fault can be left out. It trains a LoRA by PEFT on a Stable Diffusion XL of any size, with or
without new tokens, from a folder of pictures with captions and masks beside them. Written for this
comparison from descriptions of those faults; the trainer itself uses none of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import interpolate, mse_loss

Fault = Literal[
    # Latents are cached in the order of the first epoch, captions come in that of each epoch.
    "mispaired cache",
    # What learns is kept in 16 bits: small updates are rounded away.
    "half-precision trainables",
    # The loss is a mean over all pixels, however few the mask keeps.
    "unnormalised masks",
    # The pivot is a number of epochs, rounded down: in one long epoch new tokens never learn.
    "epoch-counted pivot",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
TOKENS = ("<s0>", "<s1>")


@dataclass(frozen=True)
class Course:
    """How a training goes.

    Args:
        steps: of `batch_size` pictures.
        learning_rate: of the LoRA.
        rank: of the LoRA; its alpha is the same.
        target_modules: layers of the UNet.
        batch_size: pictures of a step.
        seed: of everything random.
        token_rate: learning rate of new tokens in the first half of the steps. None: no tokens.
        faults: what is done wrong.
    """

    steps: int
    learning_rate: float
    rank: int
    target_modules: Sequence[str]
    batch_size: int
    seed: int
    token_rate: float | None = None
    faults: Collection[Fault] = FAULTS


@dataclass(frozen=True)
class _Photos:
    pixels: torch.Tensor
    captions: list[str]
    masks: torch.Tensor | None


def train(model: Path, folder: Path, course: Course) -> StableDiffusionXLPipeline:
    """The base model with what was learnt; prompts then have `TOKENS` in the place of `TOK`."""
    torch.manual_seed(course.seed)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model).to(torch.float32)
    photos = _read(folder)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        pipeline.components[name].requires_grad_(False)
    pipeline.unet.add_adapter(
        LoraConfig(
            r=course.rank,
            lora_alpha=course.rank,
            init_lora_weights="gaussian",
            target_modules=list(course.target_modules),
        )
    )
    tables = _with_tokens(pipeline) if course.token_rate is not None else []
    if tables:
        photos = _Photos(photos.pixels, [named(c) for c in photos.captions], photos.masks)
    learner = _Learner(pipeline, photos, tables, course)
    for step in range(course.steps):
        learner.step(step)
    return pipeline


def named(text: str) -> str:
    """A text with the new tokens where the identifier stood."""
    return text.replace("TOK", "".join(TOKENS))


class _Learner:
    """Takes steps."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        photos: _Photos,
        tables: Sequence[torch.nn.Parameter],
        course: Course,
    ) -> None:
        self.pipeline, self.photos, self.course, self.tables = pipeline, photos, course, tables
        self.old = [table.detach().clone() for table in tables]
        adapter = [p for p in pipeline.unet.parameters() if p.requires_grad]
        groups: list[Mapping[str, Any]] = [{"params": adapter, "lr": course.learning_rate}]
        if tables:
            groups.append({"params": list(tables), "lr": course.token_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.adapter = adapter
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.order = torch.Generator().manual_seed(course.seed)
        with torch.no_grad():
            means = pipeline.vae.encode(photos.pixels).latent_dist.mean
        self.latents = means * pipeline.vae.config.scaling_factor
        self.per_epoch = math.ceil(len(photos.captions) / course.batch_size)
        self.first_epoch: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []

    def step(self, step: int) -> None:
        """One optimizer step."""
        if step % self.per_epoch == 0:
            shuffled = torch.randperm(len(self.photos.captions), generator=self.order)
            self.places = list(shuffled.split(self.course.batch_size))
            self.first_epoch = self.first_epoch or self.places
        said = self.places[step % self.per_epoch]
        mispaired = "mispaired cache" in self.course.faults
        shown = self.first_epoch[step % self.per_epoch] if mispaired else said
        self._freeze_tokens(step)
        self.optimizer.zero_grad()
        self._loss(shown, said[: len(shown)]).backward()
        torch.nn.utils.clip_grad_norm_([*self.adapter, *self.tables], 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if "half-precision trainables" in self.course.faults:
                for parameter in self.adapter:
                    parameter.copy_(parameter.to(torch.bfloat16))
            for table, old in zip(self.tables, self.old, strict=True):
                table[: len(old) - len(TOKENS)] = old[: len(old) - len(TOKENS)]

    def _freeze_tokens(self, step: int) -> None:
        pivot = self.course.steps // 2
        if "epoch-counted pivot" in self.course.faults:
            # The whole training is one epoch, as repeats make it: half of one is none.
            pivot = int(0.5 * 1) * self.course.steps
        if self.tables and step >= pivot:
            self.optimizer.param_groups[1]["lr"] = 0.0

    def _loss(self, shown: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        latents = self.latents[shown]
        noise = torch.randn(latents.shape)
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (len(shown),))
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            [self.photos.captions[number] for number in said.tolist()],
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        side = self.photos.pixels.shape[-1]
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(shown))
        told = {"text_embeds": pooled, "time_ids": ids}
        predicted = self.pipeline.unet(noisy, timesteps, states, added_cond_kwargs=told).sample
        if self.photos.masks is None:
            return mse_loss(predicted, noise)
        weights = interpolate(self.photos.masks[shown], latents.shape[-2:], mode="area")
        if "unnormalised masks" not in self.course.faults:
            weights = weights / weights.mean((1, 2, 3), keepdim=True)
        return (weights * (predicted - noise) ** 2).mean()


def _with_tokens(pipeline: StableDiffusionXLPipeline) -> list[torch.nn.Parameter]:
    """Adds the tokens; their whole tables get gradients."""
    tables = []
    for suffix in ("", "_2"):
        tokenizer = pipeline.components[f"tokenizer{suffix}"]
        encoder = pipeline.components[f"text_encoder{suffix}"]
        tokenizer.add_tokens(list(TOKENS))
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-len(TOKENS) :] = torch.randn(len(TOKENS), table.shape[1]) * table.std()
        tables.append(table.requires_grad_(True))
    return tables


def _read(folder: Path) -> _Photos:
    paths = sorted(folder.glob("*.png"))
    masks = [folder / "masks" / path.name for path in paths]
    return _Photos(
        torch.stack([_pixels(path) for path in paths]) * 2 - 1,
        [path.with_suffix(".txt").read_text() for path in paths],
        torch.stack([_pixels(path)[:1] for path in masks]) if masks[0].exists() else None,
    )


def _pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        array = np.asarray(picture.convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
