"""What the training saw, as files: pictures, captions and the weights of the loss."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from trainer.export.debug import SeenExample, dataset_entries, mask_entries

FACTS = {"caption": "a portrait of TOK, naïve", "step": 3, "crop_top_left": (0, 8)}
ONES = np.ones((3, 2), np.float32)


def seen(name: str = "photo 1.jpg") -> SeenExample:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 16, 3), np.uint8)
    return SeenExample(name, pixels, FACTS)


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_pictures_are_the_pixels_and_lines_the_rest() -> None:
    examples = [seen(), seen("../class/7.png")]

    entries = dict(dataset_entries(examples))

    assert list(entries) == [
        "images/000000_photo_1.png",
        "images/000001_7.png",
        "examples.jsonl",
    ]
    assert np.array_equal(picture(entries["images/000000_photo_1.png"]), examples[0].pixels)
    lines = [json.loads(line) for line in entries["examples.jsonl"].decode().splitlines()]
    assert [line["file"] for line in lines] == list(entries)[:2]
    assert lines[0] == {
        "file": "images/000000_photo_1.png",
        "caption": "a portrait of TOK, naïve",
        "step": 3,
        "crop_top_left": [0, 8],
    }


def test_examples_are_taken_one_by_one() -> None:
    taken = []

    def examples() -> object:
        for number in range(3):
            taken.append(number)
            yield seen()

    entries = dataset_entries(examples())
    next(entries)

    assert taken == [0]


def test_a_mask_is_the_losss_own_numbers_and_a_picture_of_them() -> None:
    weights = np.array([[0.5, 2.0], [0.0, 1.0], [1.0, 0.001]], np.float32)

    entries = dict(mask_entries([(seen(), weights)]))

    assert list(entries) == ["masks/000000_photo_1.npy", "masks/000000_photo_1.png"]
    found = np.load(io.BytesIO(entries["masks/000000_photo_1.npy"]))
    assert found.dtype == np.float32
    assert np.array_equal(found, weights)
    grey = picture(entries["masks/000000_photo_1.png"])
    # By hand: shares of the largest weight, in blocks of 24 / 3 x 16 / 2 pixels.
    expected = np.array([[64, 255], [0, 128], [128, 0]], np.uint8)
    assert grey.shape == (24, 16)
    assert np.array_equal(grey, np.kron(expected, np.ones((8, 8), np.uint8)))


def test_the_blocks_are_as_large_as_the_weights_say() -> None:
    weights = np.array([[1, 0, 0.5, 1]], np.float32).repeat(6, axis=0)

    entries = dict(mask_entries([(seen(), weights)]))

    # 24 / 6 x 16 / 4 pixels each.
    grey = picture(entries["masks/000000_photo_1.png"])
    assert np.array_equal(grey[0], np.array([255, 0, 128, 255], np.uint8).repeat(4))


def test_a_mask_of_nothing_is_black() -> None:
    entries = dict(mask_entries([(seen(), np.zeros((3, 2), np.float32))]))

    assert (picture(entries["masks/000000_photo_1.png"]) == 0).all()


def test_a_mask_has_the_number_of_its_picture() -> None:
    examples = [seen(), seen(), seen("b.png")]

    pictures = [name for name, _ in dataset_entries(examples)][:-1]
    masks = [name for name, _ in mask_entries((example, ONES) for example in examples)]

    stems = [name.removeprefix("images/") for name in pictures]
    assert [name.removeprefix("masks/") for name in masks if name.endswith("png")] == stems


@pytest.mark.parametrize("entries", [dataset_entries, lambda e: mask_entries((x, ONES) for x in e)])
def test_the_same_examples_give_the_same_bytes(entries: object) -> None:
    assert list(entries([seen()])) == list(entries([seen()]))
