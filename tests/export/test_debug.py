"""What the training saw, as files: pictures, captions and the weights of the loss."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from trainer.export.debug import dataset_entries, mask_entries


@dataclass(frozen=True)
class Seen:
    """An example as plain values."""

    name: str = "photo 1.jpg"
    caption: str = "a portrait of TOK, naïve"
    is_class: bool = False
    step: int = 3
    position: int = 12
    flipped: bool = True
    angle: float = 1.5
    original_size: tuple[int, int] = (512, 300)
    crop_top_left: tuple[int, int] = (0, 8)
    target_size: tuple[int, int] = (24, 16)
    pixels: np.ndarray = field(
        default_factory=lambda: np.random.default_rng(1).integers(0, 256, (24, 16, 3), np.uint8)
    )


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_pictures_are_the_pixels_and_lines_the_rest() -> None:
    examples = [Seen(), Seen(name="../class/7.png", is_class=True, position=~12)]

    entries = dict(dataset_entries(examples))

    assert list(entries) == [
        "images/000000_photo_1.png",
        "images/000001_7.png",
        "examples.jsonl",
    ]
    assert np.array_equal(picture(entries["images/000000_photo_1.png"]), examples[0].pixels)
    lines = [json.loads(line) for line in entries["examples.jsonl"].decode().splitlines()]
    assert [line["is_class"] for line in lines] == [False, True]
    assert lines[0] == {
        "file": "images/000000_photo_1.png",
        "name": "photo 1.jpg",
        "caption": "a portrait of TOK, naïve",
        "is_class": False,
        "step": 3,
        "position": 12,
        "flipped": True,
        "angle": 1.5,
        "original_size": [512, 300],
        "crop_top_left": [0, 8],
        "target_size": [24, 16],
    }


def test_examples_are_taken_one_by_one() -> None:
    taken = []

    def examples() -> object:
        for number in range(3):
            taken.append(number)
            yield Seen()

    entries = dataset_entries(examples())
    next(entries)

    assert taken == [0]


def test_a_mask_is_the_losss_own_numbers_and_a_picture_of_them() -> None:
    weights = np.array([[0.5, 2.0], [0.0, 1.0], [1.0, 0.001]], np.float32)

    entries = dict(mask_entries([(Seen(), weights)]))

    assert list(entries) == ["masks/000000_photo_1.npy", "masks/000000_photo_1.png"]
    found = np.load(io.BytesIO(entries["masks/000000_photo_1.npy"]))
    assert found.dtype == np.float32
    assert np.array_equal(found, weights)
    grey = picture(entries["masks/000000_photo_1.png"])
    # By hand: shares of the largest weight, in blocks of 8 x 8.
    expected = np.array([[64, 255], [0, 128], [128, 0]], np.uint8)
    assert grey.shape == (24, 16)
    assert np.array_equal(grey, np.kron(expected, np.ones((8, 8), np.uint8)))


def test_an_example_without_a_mask_counts_everywhere() -> None:
    entries = dict(mask_entries([(Seen(), None)]))

    found = np.load(io.BytesIO(entries["masks/000000_photo_1.npy"]))
    assert np.array_equal(found, np.ones((3, 2), np.float32))
    assert (picture(entries["masks/000000_photo_1.png"]) == 255).all()


def test_a_mask_of_nothing_is_black() -> None:
    entries = dict(mask_entries([(Seen(), np.zeros((3, 2), np.float32))]))

    assert (picture(entries["masks/000000_photo_1.png"]) == 0).all()


def test_a_mask_has_the_number_of_its_picture() -> None:
    examples = [Seen(), Seen(), Seen(name="b.png")]

    pictures = [name for name, _ in dataset_entries(examples)][:-1]
    masks = [name for name, _ in mask_entries((example, None) for example in examples)]

    stems = [name.removeprefix("images/") for name in pictures]
    assert [name.removeprefix("masks/") for name in masks if name.endswith("png")] == stems


@pytest.mark.parametrize("entries", [dataset_entries, lambda e: mask_entries((x, None) for x in e)])
def test_the_same_examples_give_the_same_bytes(entries: object) -> None:
    assert list(entries([Seen()])) == list(entries([Seen()]))
