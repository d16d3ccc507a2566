"""What a training was shown, made again: equal to what the steps had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grid import bytes_of, grid_examples, plan_of, with_mask

from trainer.config import DataConfig
from trainer.data.dataset import Dataset
from trainer.data.debug import trained_examples
from trainer.data.plan import Portion

DRAWN = DataConfig(
    center_crop=False,
    random_flip=True,
    caption_dropout=0.5,
    random_rotation_start=-30,
    random_rotation_end=30,
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three pictures, the first with a mask, and two of the class; process 0 of 2."""
    first, *others = grid_examples(tmp_path, 3, height=80, width=100, num_class_images=2)
    examples = [with_mask(first, np.full((80, 100), 0.5)), *others]
    plan = plan_of(Portion((0, 1, 2), class_images=(3, 4)), num_processes=2)
    return Dataset(examples, plan, DRAWN, with_pixels=True)


def test_the_examples_of_all_processes_are_those_that_the_steps_trained(dataset: Dataset) -> None:
    shown = {example.position: example for example in trained_examples(dataset, range(6))}

    second = Dataset(
        dataset.examples, replace(dataset.plan, process_index=1), DRAWN, with_pixels=True
    )
    trained = 0
    for step in range(6):
        for batch in [*dataset[step], *second[step]]:
            for row, position in enumerate(batch.positions):
                if batch.weights[row] == 0:
                    continue
                trained += 1
                example = shown[position]
                assert example.step == step + 1
                assert example.name == f"{batch.numbers[row]}.jpg"
                assert example.caption == batch.captions[row]
                assert example.is_class == bool(batch.is_class[row])
                assert (example.flipped, example.angle) == (batch.flipped[row], batch.angles[row])
                for name in ("original_size", "crop_top_left", "target_size"):
                    assert list(vars(example)[name]) == batch.geometry[name][row].tolist()
                assert example.pixels.dtype == np.uint8
                np.testing.assert_array_equal(example.pixels, bytes_of(batch.pixels[row]))
                mask = torch.ones(64, 64) if batch.masks is None else batch.masks[row, 0]
                if example.mask is None:
                    assert bool((mask == 1).all())
                else:
                    np.testing.assert_array_equal(example.mask, mask.numpy())
    # Three epochs of three pictures, each with one of the class beside.
    assert trained == len(shown) == 18


def test_they_come_in_the_order_of_positions_with_the_class_picture_behind(
    dataset: Dataset,
) -> None:
    positions = [example.position for example in trained_examples(dataset, range(2))]

    # Two steps are an epoch of three; the second step leaves the second process idle.
    assert positions == [0, ~0, 1, ~1, 2, ~2]


def test_a_class_picture_is_of_the_concept_of_the_picture_beside_it(tmp_path: Path) -> None:
    examples = grid_examples(tmp_path, 4, height=64, width=64, num_class_images=1)
    # Both concepts share the class picture.
    portions = [
        Portion(numbers, class_images=(4,), concept=concept)
        for concept, numbers in enumerate(((0, 3), (1, 2)), start=1)
    ]
    still = DataConfig()
    dataset = Dataset(examples, plan_of(*portions, batch_size=3), still, with_pixels=True)

    shown = {example.position: example for example in trained_examples(dataset, range(2))}

    of = {"0.jpg": 1, "3.jpg": 1, "1.jpg": 2, "2.jpg": 2}
    assert len(shown) == 8
    for position in range(4):
        assert shown[position].concept == of[shown[position].name]
        assert shown[~position].name == "4.jpg"
        assert shown[~position].concept == shown[position].concept


def test_class_pictures_of_other_sizes_come_behind_theirs_with_their_concept(
    tmp_path: Path,
) -> None:
    tall, wide = (96, 64), (64, 96)
    tall_ones = grid_examples(tmp_path / "tall", 4, height=96, width=64, target=tall)
    wide_ones = grid_examples(
        tmp_path / "wide", 4, height=64, width=96, target=wide, num_class_images=1
    )
    # Both concepts have two tall pictures; the class they share has one wide one.
    examples = (*tall_ones, wide_ones[4])
    sizes = (tall, tall, tall, tall, wide)
    portions = [
        Portion(numbers, class_images=(4,), concept=concept)
        for concept, numbers in enumerate(((0, 3), (1, 2)), start=1)
    ]
    plan = plan_of(*portions, batch_size=2, num_processes=2, sizes=sizes)
    dataset = Dataset(examples, plan, DataConfig(), with_pixels=True)

    shown = list(trained_examples(dataset, range(1)))

    assert [example.position for example in shown] == [0, ~0, 1, ~1, 2, ~2, 3, ~3]
    of = {"0.jpg": 1, "3.jpg": 1, "1.jpg": 2, "2.jpg": 2}
    for own, partner in zip(shown[::2], shown[1::2], strict=True):
        assert own.concept == partner.concept == of[own.name]
        assert (own.target_size, own.pixels.shape) == (tall, (*tall, 3))
        assert (partner.target_size, partner.pixels.shape) == (wide, (*wide, 3))
        assert (partner.name, partner.is_class) == ("4.jpg", True)


def test_the_facts_are_all_but_pixels_and_mask(dataset: Dataset) -> None:
    (example, *_) = trained_examples(dataset, range(1))

    assert example.facts() == {
        "name": example.name,
        "concept": 1,
        "caption": example.caption,
        "is_class": False,
        "step": 1,
        "position": 0,
        "flipped": example.flipped,
        "angle": example.angle,
        "original_size": (500, 501),
        "crop_top_left": example.crop_top_left,
        "target_size": (64, 64),
    }


def test_some_steps_alone_are_the_same_as_among_all(dataset: Dataset) -> None:
    alone = list(trained_examples(dataset, range(3, 4)))
    among = [example for example in trained_examples(dataset, range(6)) if example.step == 4]

    assert [example.position for example in alone] == [example.position for example in among]
    for one, other in zip(alone, among, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_training_with_cached_latents_can_be_shown_too(dataset: Dataset) -> None:
    still = DataConfig()
    cached = Dataset(dataset.examples, dataset.plan, still, with_pixels=False)

    shown = list(trained_examples(cached, range(2)))

    for example in shown:
        number = int(example.name.removesuffix(".jpg"))
        np.testing.assert_array_equal(example.pixels, bytes_of(cached.pixels_of(number, False)))
        assert (example.mask is not None) == (number == 0)
