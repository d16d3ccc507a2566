"""FLUX.1's structure at about 6 million parameters. Used by make_world.py.

FLUX reads 512 places of T5 for each caption, or fewer where it is asked to, nearly all of them
padding: the model learns both. T5 is left as it is drawn, so that its states are known beforehand;
of the padding a few places are taken at each step, each counted for as many as it stands for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from make_tiny_models import flow_scheduler
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
# Places of T5 that the pipeline may read, one length at each step; those of them that may hold
# words, and those taken of the others.
LENGTHS = (64, 512)
WORDS, PADS = 16, 4
CLIP_WIDTH, T5_WIDTH = 64, 96
# Guidance that the model can be told.
GUIDANCES = (1.0, 5.0)
# Beside a plan's steps: those in which some captions are left out, and those in which guidance is
# learnt, at a part of the plan's learning rate.
LEFT_OUT, GUIDED, GUIDED_RATE = 1.0, 0.2, 1 / 3


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
        model_max_length=max(LENGTHS),
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


@dataclass(frozen=True)
class _Lesson:
    """What transformer and CLIP are asked in one step.

    Args:
        noisy: latents (B, 16, H, W) with their share of noise.
        times: of that noise, from 0 to 1.
        words: T5's states of captions at some places.
        bias: what to add to attention to each of these places.
        ids: CLIP's of these captions.
        velocity: to be predicted, as tokens.
        length: of a caption in T5, of which these are some places.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    words: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor
    velocity: torch.Tensor
    length: int

    def answer(self, parts: Mapping[str, Any], guidance: torch.Tensor) -> torch.Tensor:
        """The velocity (B, places, 64) that a model predicts."""
        pooled = parts["text_encoder"](self.ids).pooler_output
        return velocity(
            parts["transformer"], self.noisy, self.times, self.words, pooled, guidance, self.bias
        )


class _Lessons:
    """Draws what is asked in each step.

    Args:
        parts: with both tokenizers and T5.
        scenes: of each of the latents.
        latents: (N, 16, H, W), of variance 1.
        batch: of a step.
        generator: of everything that is drawn.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        scenes: Sequence[Scene],
        latents: torch.Tensor,
        batch: int,
        generator: torch.Generator,
    ) -> None:
        self._latents, self._batch, self._generator = latents, batch, generator
        captions = sorted({caption for scene in SCENES for caption in scene.captions})
        told = [*captions, ""]
        self._untold = len(captions)
        self._ids = parts["tokenizer"](told, padding="max_length", return_tensors="pt").input_ids
        self._states = {length: _t5_states(parts, told, length) for length in LENGTHS}
        number = {caption: place for place, caption in enumerate(told)}
        self._ways = torch.tensor([[number[text] for text in scene.captions] for scene in scenes])

    def guidance(self) -> torch.Tensor:
        """Of each example, any that prompts may be made with."""
        return torch.empty(self._batch).uniform_(*GUIDANCES, generator=self._generator)

    def next(self) -> _Lesson:
        """The next step's, with a caption for each picture."""
        chosen = torch.randint(len(self._latents), (self._batch,), generator=self._generator)
        way = torch.randint(self._ways.shape[1], (self._batch,), generator=self._generator)
        said, clean = self._ways[chosen, way], self._latents[chosen]
        noise = torch.randn(clean.shape, generator=self._generator)
        times = torch.randn(self._batch, generator=self._generator).sigmoid()
        share = times.view(-1, 1, 1, 1)
        length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=self._generator))]
        words, bias = some_places(self._states[length][said], self._generator)
        noisy = (1 - share) * clean + share * noise
        ids, velocity = self._ids[said], _packed(noise - clean)
        return _Lesson(noisy, times, words, bias, ids, velocity, length)

    def without(self, lesson: _Lesson, left_out: torch.Tensor) -> _Lesson:
        """A lesson in which some captions are empty: (B,), whether each is."""
        empty, _ = some_places(self._states[lesson.length][[self._untold]], self._generator)
        words = torch.where(left_out[:, None, None], empty, lesson.words)
        ids = torch.where(left_out[:, None], self._ids[self._untold], lesson.ids)
        return replace(lesson, words=words, ids=ids)

    def with_some_left_out(self, share: float) -> _Lesson:
        """The next step's, with a share of captions empty."""
        lesson = self.next()
        return self.without(lesson, torch.rand(self._batch, generator=self._generator) < share)


def train_denoiser(
    parts: Mapping[str, Any],
    scenes: Sequence[Scene],
    latents: torch.Tensor,
    plan: Plan,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Teaches the transformer and CLIP together what captions mean, and then guidance.

    Captions come first; then some are left out; at last the model learns to answer at once what
    it answers with and without a caption, as FLUX.1 [dev] has from its teacher.

    Returns:
        The same parts with their weights averaged over the last steps.
    """
    lessons = _Lessons(parts, scenes, latents, plan.batch, generator)
    learning = torch.nn.ModuleDict({name: parts[name] for name in LEARNING})
    learning = _taught(learning, plan.steps, plan.rate, lessons.guidance, lessons.next)
    some_left_out = partial(lessons.with_some_left_out, plan.dropped)
    steps = max(1, round(plan.steps * LEFT_OUT))
    learning = _taught(learning, steps, plan.rate, lessons.guidance, some_left_out)
    return dict(_guided(learning, lessons, plan).items())


def _taught(
    learning: torch.nn.ModuleDict,
    steps: int,
    rate: float,
    guidances: Callable[[], torch.Tensor],
    lesson: Callable[[], _Lesson],
) -> torch.nn.ModuleDict:
    """The mean of weights after steps on plain velocities, whatever guidance is told."""
    averaged = copy.deepcopy(learning)
    for take in steps_with(learning, averaged, steps, rate):
        asked = lesson()
        take(mse_loss(asked.answer(learning, guidances()), asked.velocity))
    return averaged


def _guided(teacher: torch.nn.ModuleDict, lessons: _Lessons, plan: Plan) -> torch.nn.ModuleDict:
    """A model that follows captions as closely as guidance says (Meng et al. 2023)."""
    learning, averaged = copy.deepcopy(teacher), copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    steps = max(1, round(plan.steps * GUIDED))
    for take in steps_with(learning, averaged, steps, plan.rate * GUIDED_RATE):
        asked, guidance = lessons.next(), lessons.guidance()
        empty = lessons.without(asked, torch.ones(plan.batch, dtype=torch.bool))
        with torch.no_grad():
            told, untold = (each.answer(teacher, guidance) for each in (asked, empty))
        target = untold + guidance.view(-1, 1, 1) * (told - untold)
        take(mse_loss(asked.answer(learning, guidance), target))
    return averaged


@torch.no_grad()
def _t5_states(parts: Mapping[str, Any], captions: Sequence[str], length: int) -> torch.Tensor:
    """What the pipeline reads of captions (captions, length, width)."""
    ids = parts["tokenizer_2"](
        list(captions), padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    return torch.cat([parts["text_encoder_2"](some)[0] for some in ids.split(100)])


def some_places(
    states: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of words and of some padding, and what to add to attention to each text place."""
    others = states.shape[1] - WORDS
    pads = WORDS + torch.randperm(others, generator=generator)[:PADS]
    bias = torch.zeros(WORDS + PADS)
    bias[WORDS:] = math.log(others / PADS)
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
    return FluxPipeline(**parts, scheduler=flow_scheduler(use_dynamic_shifting=True))


STRUCTURE = Structure(new_parts, train_denoiser, pipeline_of)
