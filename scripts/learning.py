"""Trains in the small world, and measures what was learnt by looking at pictures.

Everything goes the way that a user's training goes: photographs and captions in a folder, a
configuration, the engine, result files; pictures are made from these files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from make_world import sampled
from PIL import Image
from world_pictures import BACKGROUNDS, COLOURS, POSITIONS, SCENES, SIDE, Scene, look
from world_subjects import SHOWN, SUBJECT, draw_in_style, is_plain, styled

from trainer import base_model, engine
from trainer.base_model import BaseModel
from trainer.config import ModelConfig
from trainer.events import Event, StepEvent
from trainer.families.base import Family, text_options
from trainer.generation import Trained
from trainer.job import RunFolder
from trainer.machine import inference_precision
from trainer.resolve import Layer, resolve
from trainer.runner import supervise
from trainer.strength import apply, finished_run

# Pictures of the subject that a training is given: two on each ground.
PLACES = tuple(
    (background, position)
    for number, background in enumerate(BACKGROUNDS)
    for position in (list(POSITIONS)[number], "center")
)
CLASS = SUBJECT.shape
STYLE = "in the TOK style"


class Maker(Protocol):
    """Whatever makes pictures of prompts."""

    def pictures(
        self, run: Path | None, prompts: Sequence[str], *, seed: int, strength: float = 1.0
    ) -> torch.Tensor:
        """Pictures (prompts, 3, 64, 64) from 0 to 1 by a run, or by the base model."""


@dataclass(frozen=True)
class World:
    """The base model, and who makes pictures with it and what was trained on it.

    Args:
        folder: of the base model.
        work: a folder for photographs and runs.
        leaves: options of every training.
        draws_class: whether it draws the subject's class where no colour is told.
        masked: options of trainings on pictures whose masks are tried.
        words: options of trainings of new words alone.
        few: what the steps of a training are divided by to be too few for it.
    """

    folder: Path
    work: Path
    leaves: Mapping[str, Any] = field(default_factory=lambda: SDXL)
    draws_class: bool = True
    masked: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)
    few: int = 4

    @cached_property
    def base(self) -> BaseModel:
        """The base model as it is found."""
        length = self.leaves.get("max_sequence_length")
        settings = ModelConfig(model_url=str(self.folder), max_sequence_length=length)
        return base_model.locate(settings, vae_is_explicit=False)

    @cached_property
    def family(self) -> Family:
        """The base model in memory."""
        return base_model.load(self.base, inference_precision(self.base.settings))

    def train(
        self,
        name: str,
        photos: Path,
        leaves: Mapping[str, Any],
        *,
        stopped_after: int | None = None,
    ) -> Path:
        """Trains, and returns the run folder.

        Args:
            name: of the run folder.
            photos: with their captions.
            leaves: options beside and over those of every training.
            stopped_after: steps after which it is stopped, and begun again. None: never.

        Raises:
            RuntimeError: the training did not end well.
        """
        folder = RunFolder(self.work / name)
        shutil.rmtree(folder.root, ignore_errors=True)
        values = {**self.leaves, "model_url": str(self.folder), "images_data_url": str(photos)}
        config = resolve([Layer("check", {**values, **leaves}, explicit=True)])
        if stopped_after is not None:
            clock = _Clock()
            stopped = supervise(
                config,
                folder,
                [clock],
                engine=engine.run,
                stop=lambda: clock.steps >= stopped_after,
            )
            assert stopped.status == "interrupted", stopped
        result = supervise(config, folder, [], engine=engine.run, stop=lambda: False)
        if result.status != "done":
            raise RuntimeError(f"{name}: {result.error}")
        return folder.root

    def pictures(
        self, run: Path | None, prompts: Sequence[str], *, seed: int, strength: float = 1.0
    ) -> torch.Tensor:
        """Pictures (prompts, 3, 64, 64) from 0 to 1 by a run's files, or by the base model."""
        with self._with(run, strength) as replaced:
            told = [replaced(text) for text in prompts]
            options = text_options(self.family)
            return sampled(self.family.pipeline, told, seed=seed, **options)

    @contextmanager
    def _with(self, run: Path | None, strength: float) -> Iterator[Any]:
        if run is None:
            yield str
            return
        finished = finished_run(Trained(run=str(run), strength=strength))
        applied = apply(self.family, self.base, [finished], guided=False)
        try:
            yield applied.taught.replaced
        finally:
            applied.undo()


class _Clock(nullcontext[None]):
    """Counts the steps of a training."""

    steps = 0

    def hear(self, event: Event) -> None:
        """Takes note of a step."""
        if isinstance(event, StepEvent):
            self.steps = event.step

    def __enter__(self) -> Self:
        return self


COMMON: Mapping[str, Any] = {
    "instance_prompt": f"a TOK {CLASS}",
    "output_name": "learnt",
    "resolution_width": SIDE,
    "resolution_height": SIDE,
    "rank": 16,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "max_train_steps": 400,
    "mixed_precision": "no",
    "center_crop": True,
    "tensorboard": False,
    "checkpointing_steps": 10_000,
}
SDXL = COMMON | {
    "text_encoder_lr": 5e-3,
    "target_unet_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"],
    # Guidance leads away from what is drawn without a caption: that has to learn, too.
    "caption_dropout": 0.1,
}
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out")
FLUX = COMMON | {
    "text_encoder_lr": 2e-2,
    "target_unet_modules": [
        *("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj"),
        *("to_add_out", *FEED_FORWARD),
    ],
    # Captions have a dozen words; 512 places would make a step five times dearer.
    "max_sequence_length": 64,
}
# Half of a token of 16 pixels is ground wherever the figure ends, and attention carries that on:
# with masks only what each token makes of itself learns, most of all where there is much noise.
# What the text encoder learns holds on any ground; small masks want more pictures in a step.
FLUX_MASKED: Mapping[str, Any] = {
    "lora_type": "loha",
    "target_unet_modules": list(FEED_FORWARD),
    "train_text_encoder": True,
    "text_encoder_lr": 1e-3,
    "timestep_shift": 3.0,
    "batch_size": 12,
}
# New words find the subject where there is much noise, and far from what other words are.
FLUX_WORDS: Mapping[str, Any] = {
    "text_encoder_lr": 3e-2,
    "token_retraction": 0.0,
    "timestep_shift": 3.0,
}


def write_photos(
    folder: Path,
    places: Sequence[tuple[str, str]] = PLACES,
    *,
    told: bool = True,
    masked: bool = False,
    seed: int = 0,
) -> Path:
    """Photographs of the subject, a file each.

    Args:
        places: (background, position) of each.
        told: whether captions tell of the background.
        masked: whether masks of the subject lie beside them.
        seed: of exact places and sizes.
    """
    pictures, masks = SUBJECT.draw(places, torch.Generator().manual_seed(seed))
    for number, (background, _) in enumerate(places):
        ground = f" on a {background} background" if told else ""
        save(folder / f"{number}.png", pictures[number])
        (folder / f"{number}.txt").write_text(f"a TOK {CLASS}{ground}")
        if masked:
            save(folder / "masks" / f"{number}.png", masks[number].expand(3, -1, -1))
    return folder


def write_style(folder: Path, *, seed: int = 0) -> Path:
    """Photographs of several figures in a style, a file each."""
    # On black nothing is darker.
    scenes = [scene for scene in SCENES if scene.background != "black"][7::29]
    for number, picture in enumerate(draw_in_style(scenes, torch.Generator().manual_seed(seed))):
        scene = scenes[number]
        save(folder / f"{number}.png", picture)
        caption = f"a {scene.colour} {scene.shape} on a {scene.background} background, {STYLE}"
        (folder / f"{number}.txt").write_text(caption)
    return folder


def save(path: Path, picture: torch.Tensor) -> None:
    """A picture (3, H, W) from 0 to 1 as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def subject_prompts(count: int) -> list[tuple[str, str]]:
    """Prompts of the subject, each with the background that it asks for."""
    grounds = [list(BACKGROUNDS)[number % len(BACKGROUNDS)] for number in range(count)]
    return [(f"a TOK {CLASS} on a {ground} background", ground) for ground in grounds]


@dataclass(frozen=True)
class Learnt:
    """What pictures with a run show.

    Args:
        likeness: share of pictures of the subject that show it.
        mean_likeness: of these pictures.
        coloured: mean share of their figures that has the subject's colours, wherever.
        background: share of them with the background that was asked for.
        kept: share of plain figures of its class that are drawn as asked.
        pictures: what was looked at: of the subject, then plain ones.
    """

    likeness: float
    mean_likeness: float
    coloured: float
    background: float
    kept: float
    pictures: torch.Tensor


def measure(
    world: Maker, run: Path | None, *, count: int, seed: int, strength: float = 1.0
) -> Learnt:
    """Looks at pictures of the subject and of its class, as many of each."""
    asked = subject_prompts(count)
    plain = _plain(count)
    prompts = [prompt for prompt, _ in asked] + [scene.captions[1] for scene in plain]
    pictures = world.pictures(run, prompts, seed=seed, strength=strength)
    of_subject, of_class = pictures[:count], pictures[count:]
    likeness = [SUBJECT.likeness(picture) for picture in of_subject]
    grounds = [
        look(p).background == ground for p, (_, ground) in zip(of_subject, asked, strict=True)
    ]
    kept = [_is_as_asked(picture, scene) for picture, scene in zip(of_class, plain, strict=True)]
    return Learnt(
        likeness=sum(value >= SHOWN for value in likeness) / count,
        mean_likeness=sum(likeness) / count,
        coloured=sum(map(SUBJECT.coloured, of_subject)) / count,
        background=sum(grounds) / count,
        kept=sum(kept) / count,
        pictures=pictures,
    )


def untold(
    world: Maker, run: Path | None, background: str, *, count: int, seed: int
) -> tuple[float, float]:
    """Pictures of the subject where prompts ask for no ground.

    Returns:
        The share of them on this ground, and their mean likeness.
    """
    pictures = world.pictures(run, [f"a TOK {CLASS}"] * count, seed=seed)
    on_it = sum(look(picture).background == background for picture in pictures)
    return on_it / count, sum(map(SUBJECT.likeness, pictures)) / count


def share_in_style(world: World, run: Path | None, *, count: int, seed: int) -> float:
    """Share of pictures that show the style where it is asked for."""
    seen = [scene for scene in SCENES if scene.background != "black"]
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    scenes = [seen[number] for number in order[:count].tolist()]
    told = [f"{scene.captions[1]}, {STYLE}" for scene in scenes]
    pictures = world.pictures(run, told, seed=seed)
    return sum(styled(picture) > 0.5 for picture in pictures) / len(pictures)


def _is_as_asked(picture: torch.Tensor, scene: Scene) -> bool:
    seen = look(picture).agrees(scene)
    return seen["shape"] and seen["background"] and is_plain(picture, scene.colour)


def _plain(count: int) -> list[Scene]:
    """Plain figures of the subject's class, in all colours on all grounds."""
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    return [
        Scene(CLASS, colours[n % len(colours)], grounds[n % len(grounds)], "center")
        for n in range(count)
    ]
