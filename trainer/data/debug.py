"""What a training was shown, made again to look at: its pictures, captions and masks.

Nothing is recorded while training: whatever was drawn for an example is a function of its
position, so the same steps give the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.data.dataset import Batch, Dataset
from trainer.data.plan import Plan
from trainer.images.crop import Mask, Pixels, Size


@dataclass(frozen=True)
class TrainedExample:
    """One example as a step trained it.

    Args:
        name: of the picture in the user's source.
        concept: whose picture it is, from 1; a class picture's is that of the picture beside it.
        caption: as trained, in the user's words: empty where dropped.
        is_class: whether it is a class picture.
        step: from 1.
        position: in the run, see `plan.Slot`.
        flipped: whether mirrored.
        angle: degrees by which it is turned, counter-clockwise as seen.
        original_size: (height, width) upright, before resizing.
        crop_top_left: (top, left) in the resized and perhaps mirrored picture.
        target_size: (height, width).
        pixels: (H, W, 3).
        mask: (H, W) in [0, 1], or nothing where every pixel counts alike.
    """

    name: str
    concept: int
    caption: str
    is_class: bool
    step: int
    position: int
    flipped: bool
    angle: float
    original_size: Size
    crop_top_left: tuple[int, int]
    target_size: Size
    pixels: Pixels
    mask: Mask | None

    def facts(self) -> dict[str, Any]:
        """Everything but pixels and mask, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("pixels", "mask")}


def trained_examples(dataset: Dataset, steps: range) -> Iterator[TrainedExample]:
    """What all processes trained in some steps, in the order of the positions.

    A class picture follows the picture that it stands beside. What weighs nothing is left out.

    Args:
        dataset: of any process, with or without pixels.
        steps: from 0.
    """
    processes = [
        Dataset(
            dataset.examples,
            replace(dataset.plan, process_index=index),
            dataset.data,
            with_pixels=True,
        )
        for index in range(dataset.plan.num_processes)
    ]
    for step in steps:
        batches = [batch for process in processes for batch in process[step]]
        rows = [(batch, row) for batch in batches for row in range(len(batch.numbers))]
        numbers = {batch.positions[row]: batch.numbers[row] for batch, row in rows}
        for batch, row in sorted(rows, key=_place):
            if batch.weights[row] > 0:
                concept = _concept(dataset.plan, numbers, batch.positions[row])
                yield _trained(dataset, batch, row, step=step, concept=concept)


def _place(item: tuple[Batch, int]) -> tuple[int, bool]:
    batch, row = item
    position = batch.positions[row]
    return (~position, True) if position < 0 else (position, False)


def _trained(
    dataset: Dataset, batch: Batch, row: int, *, step: int, concept: int
) -> TrainedExample:
    assert batch.pixels is not None
    mask: Mask | None = None
    if batch.masks is not None and not bool((batch.masks[row] == 1).all()):
        mask = batch.masks[row, 0].numpy()
    geometry = {name: _pair(sizes[row].tolist()) for name, sizes in batch.geometry.items()}
    return TrainedExample(
        name=dataset.examples[batch.numbers[row]].name,
        concept=concept,
        caption=batch.captions[row],
        is_class=bool(batch.is_class[row]),
        step=step + 1,
        position=batch.positions[row],
        flipped=batch.flipped[row],
        angle=batch.angles[row],
        original_size=geometry["original_size"],
        crop_top_left=geometry["crop_top_left"],
        target_size=geometry["target_size"],
        pixels=_bytes(batch.pixels[row]),
        mask=mask,
    )


def _concept(plan: Plan, numbers: Mapping[int, int], position: int) -> int:
    """The concept of an example, from 1; a class picture may be in another batch than its own.

    Args:
        plan: of any process.
        numbers: of all pictures of the step, by position.
        position: of the example.
    """
    number = numbers[position if position >= 0 else ~position]
    return next(portion.concept for portion in plan.portions if number in portion.instances)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _bytes(pixels: torch.Tensor) -> Pixels:
    """Pixels (3, H, W) in [-1, 1] as the bytes (H, W, 3) that they came from."""
    values = ((pixels.double() + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())
