"""The batches of every optimizer step: pixels, captions, geometry, all drawn by position.

What is random about an example (window, mirror, dropped caption) is a function of the seed and
of its position in the run, drawn anew each time a picture is used. Latents and conditioning are
not known here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from trainer import randomness
from trainer.config import DataConfig
from trainer.data.crop import (
    Pixels,
    Placement,
    Size,
    center_window,
    jittered,
    random_window,
)
from trainer.data.plan import Plan, Slot
from trainer.data.prepare import Example

__all__ = ["Batch", "Dataset", "Plan", "Slot"]


@dataclass(frozen=True)
class Batch:
    """The examples of one forward pass.

    Args:
        numbers: of the pictures.
        positions: of the examples in the run.
        captions: as trained: empty where dropped.
        flipped: whether mirrored.
        geometry: int64 tensors (B, 2): `original_size` (height, width) before resizing,
            `crop_top_left` (top, left) in the resized and perhaps mirrored picture,
            `target_size` (height, width).
        pixels: float32 (B, 3, H, W) in [-1, 1], or nothing where latents are cached.
        weights: float32 (B,), see `plan.Slot`.
    """

    numbers: tuple[int, ...]
    positions: tuple[int, ...]
    captions: tuple[str, ...]
    flipped: tuple[bool, ...]
    geometry: dict[str, torch.Tensor]
    pixels: torch.Tensor | None
    weights: torch.Tensor


class Dataset(torch.utils.data.Dataset[list[Batch]]):
    """Batches by step: `dataset[step]` is what this process trains in that step (from 0).

    Args:
        examples: the prepared pictures, by number.
        plan: which of them a step takes.
        data: geometry and caption options; both resolutions are set.
        with_pixels: false where latents are cached; the window is then always the middle one.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Plan,
        data: DataConfig,
        *,
        with_pixels: bool,
    ) -> None:
        assert data.resolution_height is not None
        assert data.resolution_width is not None
        assert with_pixels or has_fixed_window(data)
        self.examples = tuple(examples)
        self.plan = plan
        self.data = data
        self.target: Size = data.resolution_height, data.resolution_width
        self.with_pixels = with_pixels

    def __getitem__(self, step: int) -> list[Batch]:
        """The batches of this process in one optimizer step."""
        return [self._batch(slots) for slots in self.plan.at(step)]

    def pixels_of(self, number: int, flipped: bool) -> torch.Tensor:
        """The middle window of one picture, perhaps mirrored: float32 (3, H, W) in [-1, 1]."""
        example = self.examples[number]
        placement = Placement(center_window(example.size, self.target), flipped)
        return _to_tensor(placement.apply(_load(example)))

    def all_captions(self) -> tuple[str, ...]:
        """Every caption that a step may ask for, each once, in the order of the pictures."""
        dropped = [""] if self.data.caption_dropout > 0 else []
        captions = [example.caption for example in self.examples]
        return tuple(dict.fromkeys([*captions, *dropped]))

    def all_views(self) -> tuple[tuple[int, bool], ...]:
        """Every (picture, mirrored) that a step may ask for."""
        mirrored = (False, True) if self.data.random_flip else (False,)
        return tuple((example.number, flip) for example in self.examples for flip in mirrored)

    def _batch(self, slots: Sequence[Slot]) -> Batch:
        examples = [self.examples[slot.number] for slot in slots]
        placements = [self._placement(slot) for slot in slots]
        corners = [
            placement.crop_top_left(example.size)
            for placement, example in zip(placements, examples, strict=True)
        ]
        pixels = None
        if self.with_pixels:
            pixels = torch.stack(
                [
                    _to_tensor(placement.apply(_load(example)))
                    for placement, example in zip(placements, examples, strict=True)
                ]
            )
        return Batch(
            numbers=tuple(slot.number for slot in slots),
            positions=tuple(slot.position for slot in slots),
            captions=tuple(self._caption(slot) for slot in slots),
            flipped=tuple(placement.flipped for placement in placements),
            geometry={
                "original_size": torch.tensor([example.original_size for example in examples]),
                "crop_top_left": torch.tensor(corners),
                "target_size": torch.tensor([self.target for _ in slots]),
            },
            pixels=pixels,
            weights=torch.tensor([slot.weight for slot in slots], dtype=torch.float32),
        )

    def _placement(self, slot: Slot) -> Placement:
        size, data = self.examples[slot.number].size, self.data
        rng = self._source("crop", slot)
        window = (
            center_window(size, self.target)
            if data.center_crop
            else random_window(size, self.target, rng)
        )
        window = jittered(
            window,
            size,
            rng,
            offset_x=data.random_crop_offset_x,
            offset_y=data.random_crop_offset_y,
        )
        flipped = data.random_flip and self._source("flip", slot).random() < 0.5
        return Placement(window, flipped)

    def _caption(self, slot: Slot) -> str:
        dropped = self._source("caption_dropout", slot).random() < self.data.caption_dropout
        return "" if dropped else self.examples[slot.number].caption

    def _source(self, purpose: str, slot: Slot) -> random.Random:
        return randomness.source(self.plan.seed, purpose, slot.position)


def has_fixed_window(data: DataConfig) -> bool:
    """Whether every use of a picture shows the same window, so that its latents can be cached."""
    return data.center_crop and data.random_crop_offset_x == data.random_crop_offset_y == 0


def _load(example: Example) -> Pixels:
    with Image.open(example.path) as image:
        return np.asarray(image.convert("RGB"))


def _to_tensor(pixels: Pixels) -> torch.Tensor:
    """Pixels (H, W, 3) in 0 … 255 as float32 (3, H, W) in [-1, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return planes.float() / 127.5 - 1
