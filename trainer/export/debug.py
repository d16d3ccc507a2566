"""What the training saw, as files to look at: pictures with their captions, and the loss's masks.

Takes plain values; knows neither how examples are made nor how the loss uses its weights. Both
kinds of entries number the examples in the order given, so that a mask has its picture's number.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class SeenExample:
    """An example as the training met it at one step.

    Args:
        name: of its picture among the training pictures.
        pixels: the picture (H, W, 3).
        facts: everything else that is worth a look, as JSON can hold it.
    """

    name: str
    pixels: Pixels
    facts: Mapping[str, Any]


def dataset_entries(examples: Iterable[SeenExample]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `images/NUMBER_NAME.png`, then of `examples.jsonl` with the facts.

    Args:
        examples: taken one by one.
    """
    lines = []
    for number, example in enumerate(examples):
        name = f"images/{_stem(number, example)}.png"
        lines.append(json.dumps({"file": name, **example.facts}, ensure_ascii=False) + "\n")
        yield name, _png(example.pixels)
    yield "examples.jsonl", "".join(lines).encode()


def mask_entries(
    examples: Iterable[tuple[SeenExample, Weights]],
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `masks/NUMBER_NAME.npy` and of the same as a picture.

    The array holds the numbers that the loss used. The picture is for the eye: white is the
    largest weight, and each weight is as many pixels wide as the part of the picture that it
    stands for.

    Args:
        examples: each with the loss's weights (h, w) in latent size, float32.
    """
    for number, (example, weights) in enumerate(examples):
        height, width = example.pixels.shape[:2]
        name = f"masks/{_stem(number, example)}"
        yield f"{name}.npy", _npy(weights)
        yield f"{name}.png", _png(_picture(weights, height, width))


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
