"""What the training saw, as files to look at: pictures with their captions, and the loss's masks.

Takes plain values; knows neither how examples are made nor how the loss uses its weights. Both
kinds of entries number the examples in the order given, so that a mask has its picture's number.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Weights = NDArray[np.float32]


class SeenExample(Protocol):
    """An example as the training met it at one step."""

    @property
    def name(self) -> str:
        """The picture's name among the training pictures."""

    @property
    def caption(self) -> str:
        """The text beside it, as it was encoded."""

    @property
    def is_class(self) -> bool:
        """Whether it is a class image."""

    @property
    def step(self) -> int:
        """The optimizer step."""

    @property
    def position(self) -> int:
        """Its place among all examples of the run."""

    @property
    def flipped(self) -> bool:
        """Whether it was mirrored."""

    @property
    def angle(self) -> float:
        """Its rotation in degrees."""

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) before everything."""

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """(top, left) of the crop."""

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) after the crop."""

    @property
    def pixels(self) -> Pixels:
        """The picture (H, W, 3)."""


def dataset_entries(examples: Iterable[SeenExample]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `images/NUMBER_NAME.png`, then of `examples.jsonl` with the rest.

    Args:
        examples: taken one by one.
    """
    lines = []
    for number, example in enumerate(examples):
        name = f"images/{_stem(number, example)}.png"
        lines.append(json.dumps({"file": name, **_facts(example)}, ensure_ascii=False) + "\n")
        yield name, _png(example.pixels)
    yield "examples.jsonl", "".join(lines).encode()


def mask_entries(
    examples: Iterable[tuple[SeenExample, Weights | None]],
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `masks/NUMBER_NAME.npy` and of the same as a picture.

    The array holds the numbers that the loss used. The picture is for the eye: white is the
    largest weight, and each weight is as many pixels wide as the part of the picture that it
    stands for.

    Args:
        examples: each with the loss's weights (h, w) in latent size; None: all of them are one.
    """
    for number, (example, given) in enumerate(examples):
        height, width = example.pixels.shape[:2]
        size = height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT
        weights = np.ones(size, np.float32) if given is None else given.astype(np.float32)
        name = f"masks/{_stem(number, example)}"
        yield f"{name}.npy", _npy(weights)
        yield f"{name}.png", _png(_picture(weights, height, width))


# All families' autoencoders make one latent of 8 x 8 pixels.
_PIXELS_PER_LATENT = 8


def _facts(example: SeenExample) -> dict[str, Any]:
    return {
        "name": example.name,
        "caption": example.caption,
        "is_class": example.is_class,
        "step": example.step,
        "position": example.position,
        "flipped": example.flipped,
        "angle": example.angle,
        "original_size": list(example.original_size),
        "crop_top_left": list(example.crop_top_left),
        "target_size": list(example.target_size),
    }


def _stem(number: int, example: SeenExample) -> str:
    plain = re.sub(r"[^\w.-]", "_", PurePosixPath(example.name).stem)
    return f"{number:06}_{plain}"


def _picture(weights: Weights, height: int, width: int) -> Pixels:
    """Weights as grey values, each enlarged to its block of pixels."""
    largest = float(weights.max())
    share = weights / largest if largest > 0 else weights
    grey = np.rint(share * 255).astype(np.uint8)
    rows, columns = height // weights.shape[0], width // weights.shape[1]
    return grey.repeat(rows, axis=0).repeat(columns, axis=1)


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _npy(weights: Weights) -> bytes:
    file = io.BytesIO()
    np.save(file, weights, allow_pickle=False)
    return file.getvalue()
