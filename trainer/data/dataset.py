"""The batches of every optimizer step: pixels, masks, captions, geometry, drawn by position.

What is random about an example (window, turn, mirror, dropped caption) is a function of the seed
and of its position in the run, drawn anew each time a picture is used. Latents and conditioning
are not known here.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer import randomness
from trainer.config import DataConfig
from trainer.data.plan import Plan, Slot
from trainer.data.prepared import Example, sha256_of
from trainer.images.crop import (
    Mask,
    Pixels,
    Placement,
    Size,
    Window,
    center_window,
    jittered,
    random_window,
)
from trainer.images.masks import resized_mask

# A picture by its number, and whether it is mirrored.
View = tuple[int, bool]

__all__ = ["Batch", "Dataset", "Plan", "Slot", "View", "leave_signals_to_the_training"]

# Ctrl-C, a closed terminal and many service managers send theirs to every process of a group.
_SIGNALS_TO_A_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Batch:
    """The examples of one forward pass, all of one size: first the subject's, then its class's.

    Args:
        numbers: of the pictures.
        positions: of the examples in the run.
        captions: as trained: empty where dropped.
        flipped: whether mirrored.
        angles: degrees by which they are turned, counter-clockwise as seen.
        geometry: int64 tensors (B, 2): `original_size` (height, width) before resizing,
            `crop_top_left` (top, left) in the resized and perhaps mirrored picture,
            `target_size` (height, width).
        pixels: float32 (B, 3, H, W) in [-1, 1], or nothing where latents are cached.
        masks: float32 (B, 1, H, W) in [0, 1], or nothing where every pixel counts alike or
            latents are cached: views then have theirs for good, see `Dataset.mask_of`.
        weights: float32 (B,), see `plan.Slot`; 0 where nothing is seen of what a mask keeps.
        is_class: bool (B,).
    """

    numbers: tuple[int, ...]
    positions: tuple[int, ...]
    captions: tuple[str, ...]
    flipped: tuple[bool, ...]
    angles: tuple[float, ...]
    geometry: dict[str, torch.Tensor]
    pixels: torch.Tensor | None
    masks: torch.Tensor | None
    weights: torch.Tensor
    is_class: torch.Tensor

    @property
    def views(self) -> tuple[View, ...]:
        """What is seen of which picture, where only mirrors are drawn."""
        return tuple(zip(self.numbers, self.flipped, strict=True))

    @property
    def size(self) -> Size:
        """Trained (height, width)."""
        height, width = self.geometry["target_size"][0].tolist()
        return height, width

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where a GPU takes it while all others work."""
        return replace(self, pixels=_pinned(self.pixels), masks=_pinned(self.masks))


class Dataset(torch.utils.data.Dataset[list[Batch]]):
    """Batches by step: `dataset[step]` is what this process trains in that step (from 0).

    Args:
        examples: the prepared pictures, by number.
        plan: which of them a step takes.
        data: geometry and caption options.
        with_pixels: false where latents are cached; window and angle are then always the same.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Plan,
        data: DataConfig,
        *,
        with_pixels: bool,
    ) -> None:
        assert with_pixels or has_fixed_window(data)
        assert data.center_crop or with_pixels or all(e.window is not None for e in examples)
        self.examples = tuple(examples)
        self.plan = plan
        self.data = data
        self.with_pixels = with_pixels

    def __getitem__(self, step: int) -> list[Batch]:
        """The batches of this process in one optimizer step."""
        return [self._batch(slots) for slots in self.plan.at(step)]

    @property
    def trained(self) -> tuple[Example, ...]:
        """The subjects' pictures that steps show: those held out are none of them."""
        numbers = {number for portion in self.plan.portions for number in portion.instances}
        return tuple(example for example in self.examples if example.number in numbers)

    def pixels_of(self, number: int, flipped: bool) -> torch.Tensor:
        """The fixed view of one picture, perhaps mirrored: float32 (3, H, W) in [-1, 1]."""
        example = self.examples[number]
        return _to_tensor(self._fixed_placement(example, flipped).apply(_load(example)))

    def still(self, number: int, positions: Sequence[int]) -> Batch:
        """A batch of one picture's fixed view, once for each position, with its own caption."""
        example, count = self.examples[number], len(positions)
        placement = self._fixed_placement(example, flipped=False)
        pixels = masks = None
        if self.with_pixels:
            pixels = self.pixels_of(number, False).expand(count, -1, -1, -1)
            mask = self.mask_of(number, False)
            masks = None if mask is None else mask.expand(count, -1, -1, -1)
        return Batch(
            numbers=(number,) * count,
            positions=tuple(positions),
            captions=(example.caption,) * count,
            flipped=(False,) * count,
            angles=(placement.angle,) * count,
            geometry=_geometry([example] * count, [placement] * count),
            pixels=pixels,
            masks=masks,
            weights=torch.full((count,), 1 / count),
            is_class=torch.zeros(count, dtype=torch.bool),
        )

    def mask_of(self, number: int, flipped: bool) -> torch.Tensor | None:
        """The weights of the fixed view of one picture: float32 (1, H, W) in [0, 1].

        Nothing where every pixel counts alike, and where none counts, see `Batch.weights`.
        """
        example = self.examples[number]
        masks = _stacked([_mask(example, self._fixed_placement(example, flipped))])
        return None if masks is None else masks[0]

    def geometry_of(self, views: Sequence[View]) -> dict[str, torch.Tensor]:
        """The geometry of fixed views, as in `Batch`."""
        examples = [self.examples[number] for number, _ in views]
        placements = [self._fixed_placement(self.examples[n], flipped) for n, flipped in views]
        return _geometry(examples, placements)

    def counts(self, number: int) -> bool:
        """Whether the fixed view of a picture shows anything that its mask keeps."""
        return self._counts[number]

    def ingredients_of(self, number: int, flipped: bool) -> dict[str, Any]:
        """All that decides the pixels of a fixed view, as JSON can hold it.

        Raises:
            OSError: the prepared file cannot be read.
        """
        example = self.examples[number]
        placement = self._fixed_placement(example, flipped)
        return {
            "file": sha256_of(example.path.read_bytes()),
            "size": example.size,
            **asdict(placement),
        }

    def all_captions(self) -> tuple[str, ...]:
        """Every caption that a step may ask for, each once, in the order of the pictures."""
        dropped = [""] if self.data.caption_dropout > 0 else []
        captions = [example.caption for example in self.examples]
        return tuple(dict.fromkeys([*captions, *dropped]))

    def all_views(self) -> tuple[tuple[int, bool], ...]:
        """Every (picture, mirrored) that a step may ask for."""
        mirrored = (False, True) if self.data.random_flip else (False,)
        return tuple((example.number, flip) for example in self.examples for flip in mirrored)

    def unseen(self) -> list[str]:
        """Names of the subjects' pictures that weigh nothing in any step, once for each size.

        Their masks keep nothing of the one view that is shown of them. Where views are drawn,
        each may show something else, so none is named.
        """
        if not has_fixed_window(self.data):
            return []
        counted = zip(self.examples, self._counts, strict=True)
        return [example.name for example, counts in counted if not (counts or example.is_class)]

    def offsets_without_room(self) -> list[str]:
        """The options that move windows, where every picture is just as long as its window."""
        axes = (
            ("random_crop_offset_x", self.data.random_crop_offset_x, 1),
            ("random_crop_offset_y", self.data.random_crop_offset_y, 0),
        )
        return [
            option
            for option, offset, axis in axes
            if offset > 0
            and all(example.size[axis] == example.target[axis] for example in self.examples)
        ]

    @cached_property
    def _counts(self) -> tuple[bool, ...]:
        """By number, whether a fixed view shows anything that its mask keeps."""
        seen = [_mask(e, self._fixed_placement(e, flipped=False)) for e in self.examples]
        return tuple(mask is None or bool(mask.any()) for mask in seen)

    def _fixed_placement(self, example: Example, flipped: bool) -> Placement:
        window = _given_window(example) or center_window(example.size, example.target)
        start, end = self.data.random_rotation_start, self.data.random_rotation_end
        return Placement(window, flipped, (start + end) / 2)

    def _batch(self, slots: Sequence[Slot]) -> Batch:
        examples = [self.examples[slot.number] for slot in slots]
        assert len({example.target for example in examples}) == 1
        placements = [self._placement(slot) for slot in slots]
        pixels = masks = None
        if self.with_pixels:
            shown = list(zip(examples, placements, strict=True))
            pixels = torch.stack([_to_tensor(p.apply(_load(example))) for example, p in shown])
            seen = [_mask(example, placement) for example, placement in shown]
            masks = _stacked(seen)
            counts = [mask is None or bool(mask.any()) for mask in seen]
        else:
            counts = [self._counts[slot.number] for slot in slots]
        weights = [slot.weight if c else 0.0 for slot, c in zip(slots, counts, strict=True)]
        return Batch(
            numbers=tuple(slot.number for slot in slots),
            positions=tuple(slot.position for slot in slots),
            captions=tuple(self._caption(slot) for slot in slots),
            flipped=tuple(placement.flipped for placement in placements),
            angles=tuple(placement.angle for placement in placements),
            geometry=_geometry(examples, placements),
            pixels=pixels,
            masks=masks,
            weights=torch.tensor(weights, dtype=torch.float32),
            is_class=torch.tensor([slot.is_class for slot in slots]),
        )

    def _placement(self, slot: Slot) -> Placement:
        example, data = self.examples[slot.number], self.data
        flipped = data.random_flip and self._source("flip", slot).random() < 0.5
        if not self.with_pixels:
            return self._fixed_placement(example, flipped)
        rng = self._source("crop", slot)
        window = _given_window(example)
        if window is None and data.center_crop:
            window = center_window(example.size, example.target)
        window = jittered(
            window or random_window(example.size, example.target, rng),
            example.size,
            rng,
            offset_x=data.random_crop_offset_x,
            offset_y=data.random_crop_offset_y,
        )
        smallest, largest = data.random_rotation_start, data.random_rotation_end
        angle = self._source("rotation", slot).uniform(smallest, largest)
        return Placement(window, flipped, angle)

    def _caption(self, slot: Slot) -> str:
        # The class keeps its caption: it is what the prior preserves.
        if slot.is_class or self.data.caption_dropout == 0:
            return self.examples[slot.number].caption
        dropped = self._source("caption_dropout", slot).random() < self.data.caption_dropout
        return "" if dropped else self.examples[slot.number].caption

    def _source(self, purpose: str, slot: Slot) -> random.Random:
        return randomness.source(self.plan.seed, purpose, slot.position)


def leave_signals_to_the_training(_: int) -> None:
    """Lets a process that reads pictures live on when asked to end, for the steps until then.

    It ends with the training, which it looks for every few seconds.
    """
    for number in _SIGNALS_TO_A_GROUP:
        signal.signal(number, signal.SIG_IGN)


def has_fixed_window(data: DataConfig) -> bool:
    """Whether every use of a picture shows the same view, so that its latents can be cached.

    With face-aware cropping each picture has a window of its own, found once.
    """
    still = data.random_crop_offset_x == data.random_crop_offset_y == 0
    upright = data.random_rotation_start == data.random_rotation_end
    return (data.center_crop or data.face_aware_cropping) and still and upright


def _geometry(
    examples: Sequence[Example], placements: Sequence[Placement]
) -> dict[str, torch.Tensor]:
    """What a denoiser may be told of pictures, see `Batch`."""
    corners = [p.crop_top_left(e.size) for e, p in zip(examples, placements, strict=True)]
    return {
        "original_size": torch.tensor([example.original_size for example in examples]),
        "crop_top_left": torch.tensor(corners),
        "target_size": torch.tensor([example.target for example in examples]),
    }


def _given_window(example: Example) -> Window | None:
    """The window that a face or mask put in view, if one did."""
    return None if example.window is None else Window(*example.window, *example.target)


def _load(example: Example) -> Pixels:
    with Image.open(example.path) as image:
        pixels = image.convert("RGB")
    height, width = example.size
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(pixels)


def _mask(example: Example, placement: Placement) -> Mask | None:
    """The weights (H, W) of what is seen of a picture, or nothing where all are 1."""
    valid = placement.valid(example.size) if placement.angle else None
    if example.mask_path is None:
        return valid
    mask: Mask = np.load(example.mask_path)
    if mask.shape != example.size:
        mask = resized_mask(mask, example.size)
    seen = placement.apply(mask)
    return seen if valid is None else seen * valid


def _stacked(masks: Sequence[Mask | None]) -> torch.Tensor | None:
    """The masks (B, 1, H, W) of a batch, or nothing where every weight is 1.

    A mask without any weight becomes a whole one: a loss cannot be normalised by it, and its
    example weighs nothing.
    """
    weights = [mask if mask is not None and mask.any() else None for mask in masks]
    shapes = [mask.shape for mask in weights if mask is not None and not (mask == 1).all()]
    if not shapes:
        return None
    rows = [np.ones(shapes[0], np.float32) if mask is None else mask for mask in weights]
    return torch.from_numpy(np.stack(rows)[:, None])


def _pinned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.pin_memory()


def _to_tensor(pixels: Pixels) -> torch.Tensor:
    """Pixels (H, W, 3) in 0 … 255 as float32 (3, H, W) in [-1, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return planes.float() / 127.5 - 1
