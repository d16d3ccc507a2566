"""Batches by step: every option recovered from the pixels of grid pictures."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from grid import bytes_of, grid_examples, plan_of, seen
from PIL import Image
from torch.utils.data import DataLoader

from trainer.config import DataConfig
from trainer.data.dataset import Batch, Dataset
from trainer.data.plan import Plan
from trainer.data.prepare import Example

Examples = tuple[Example, ...]
HEIGHT, WIDTH = 80, 100  # of the prepared pictures; the trained size is 64 x 64
RANDOM = {
    "center_crop": False,
    "random_flip": True,
    "caption_dropout": 0.5,
    "random_crop_offset_x": 3,
    "random_crop_offset_y": 2,
}


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return grid_examples(tmp_path / "prepared", 5, height=HEIGHT, width=WIDTH)


def dataset_of(
    examples: Sequence[Example],
    *,
    with_pixels: bool = True,
    plan: Plan | None = None,
    **options: object,
) -> Dataset:
    data = DataConfig(**{"resolution_width": 64, "resolution_height": 64, **options})
    plan = plan or plan_of(len(examples))
    return Dataset(examples, plan, data, with_pixels=with_pixels)


def batches_of(dataset: Dataset, steps: int) -> list[Batch]:
    return [batch for step in range(steps) for batch in dataset[step]]


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("numbers", "positions", "captions", "flipped"):
        assert getattr(left, name) == getattr(right, name)
    assert left.geometry.keys() == right.geometry.keys()
    for name, sizes in left.geometry.items():
        assert torch.equal(sizes, right.geometry[name])
    assert torch.equal(left.weights, right.weights)
    assert left.pixels is not None
    assert right.pixels is not None
    assert torch.equal(left.pixels, right.pixels)


def test_captions_and_geometry_belong_to_the_pixels_over_shuffled_epochs(
    examples: Examples,
) -> None:
    dataset = dataset_of(examples, plan=plan_of(5, batch_size=2), **RANDOM | {"caption_dropout": 0})

    for batch in batches_of(dataset, 9):
        for row, pixels in enumerate(batch.pixels):
            top, left, mirrored, number = seen(pixels)
            assert batch.numbers[row] == number
            assert batch.captions[row] == f"caption {number}"
            assert batch.flipped[row] == mirrored
            # In the mirrored picture the window starts where the unmirrored one ends.
            corner = WIDTH - 64 - left if mirrored else left
            assert batch.geometry["crop_top_left"][row].tolist() == [top, corner]


def test_a_batch_has_the_shapes_that_families_expect(examples: Examples) -> None:
    (batch,) = dataset_of(examples, plan=plan_of(5, batch_size=2), resolution_width=72)[0]

    assert batch.pixels.shape == (2, 3, 64, 72)
    assert batch.pixels.dtype == torch.float32
    assert batch.geometry["original_size"].tolist() == [[500, 501]] * 2
    assert batch.geometry["target_size"].tolist() == [[64, 72]] * 2
    assert {sizes.dtype for sizes in batch.geometry.values()} == {torch.int64}
    assert batch.weights.tolist() == [0.5, 0.5]


def test_pixels_run_from_minus_one_to_one(tmp_path: Path) -> None:
    (example,) = grid_examples(tmp_path, 1, height=64, width=64)
    image = Image.new("RGB", (64, 64), (0, 51, 255))
    image.save(example.path)

    pixels = dataset_of([example]).pixels_of(0, False)

    # x / 127.5 - 1: 51 / 127.5 = 0.4.
    assert pixels.amin((1, 2)).tolist() == pytest.approx([-1, -0.6, 1])
    assert torch.equal(pixels.amin((1, 2)), pixels.amax((1, 2)))


def test_center_crop_shows_the_middle_window_every_time(examples: Examples) -> None:
    shown = {seen(batch.pixels[0])[:3] for batch in batches_of(dataset_of(examples), 15)}

    assert shown == {(8, 18, False)}  # (80 - 64) / 2 and (100 - 64) / 2


def test_without_center_crop_the_window_is_drawn_anew_each_time(tmp_path: Path) -> None:
    examples = grid_examples(tmp_path, 1, height=HEIGHT, width=WIDTH)

    shown = [seen(b.pixels[0]) for b in batches_of(dataset_of(examples, center_crop=False), 60)]

    tops, lefts = {top for top, *_ in shown}, {left for _, left, *_ in shown}
    assert min(tops) >= 0
    assert max(tops) <= 16
    assert min(lefts) >= 0
    assert max(lefts) <= 36
    assert len(tops) > 10
    assert len(lefts) > 20


@pytest.mark.parametrize(
    ("option", "moving", "still"),
    [("random_crop_offset_x", 1, 0), ("random_crop_offset_y", 0, 1)],
)
def test_a_crop_offset_moves_the_window_along_its_axis_only(
    examples: Examples, option: str, moving: int, still: int
) -> None:
    middle = (8, 18)

    shown = [seen(b.pixels[0])[:2] for b in batches_of(dataset_of(examples, **{option: 3}), 60)]

    places = {place[moving] - middle[moving] for place in shown}
    assert places == {-3, -2, -1, 0, 1, 2, 3}
    assert {place[still] for place in shown} == {middle[still]}


def test_random_flip_mirrors_half_of_the_uses_of_the_same_picture(tmp_path: Path) -> None:
    examples = grid_examples(tmp_path, 1, height=HEIGHT, width=WIDTH)

    mirrored = [
        seen(batch.pixels[0])[2] for batch in batches_of(dataset_of(examples, random_flip=True), 64)
    ]

    assert 0.3 <= sum(mirrored) / 64 <= 0.7


def test_without_random_flip_nothing_is_mirrored(examples: Examples) -> None:
    assert not any(seen(batch.pixels[0])[2] for batch in batches_of(dataset_of(examples), 20))


def test_the_pixels_of_a_mirrored_picture_are_exactly_the_mirror(examples: Examples) -> None:
    dataset = dataset_of(examples)

    plain, mirrored = dataset.pixels_of(3, False), dataset.pixels_of(3, True)

    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


def test_caption_dropout_empties_its_share_of_the_captions(examples: Examples) -> None:
    def empty(share: float) -> float:
        dataset = dataset_of(examples, with_pixels=False, caption_dropout=share)
        captions = [batch.captions[0] for batch in batches_of(dataset, 200)]
        return captions.count("") / len(captions)

    assert empty(0.0) == 0
    assert empty(1.0) == 1
    assert 0.4 <= empty(0.5) <= 0.6


def test_everything_that_a_step_may_ask_for_can_be_encoded_before(examples: Examples) -> None:
    dataset = dataset_of(examples, with_pixels=False, random_flip=True, caption_dropout=0.5)

    batches = batches_of(dataset, 100)

    asked = {view for b in batches for view in zip(b.numbers, b.flipped, strict=True)}
    assert asked == set(dataset.all_views())
    assert {caption for b in batches for caption in b.captions} == set(dataset.all_captions())
    assert len(dataset.all_views()) == 10
    plain = dataset_of(examples, with_pixels=False)
    assert plain.all_views() == tuple((number, False) for number in range(5))
    assert "" not in plain.all_captions()


def test_the_pixels_for_cached_latents_are_those_of_the_uncached_run(examples: Examples) -> None:
    options = {"random_flip": True, "caption_dropout": 0.5}
    cached = dataset_of(examples, with_pixels=False, **options)
    uncached = dataset_of(examples, **options)

    for without, with_ in zip(batches_of(cached, 15), batches_of(uncached, 15), strict=True):
        assert without.pixels is None
        for row, (number, flipped) in enumerate(zip(without.numbers, without.flipped, strict=True)):
            assert torch.equal(cached.pixels_of(number, flipped), with_.pixels[row])
        assert without.captions == with_.captions
        for name, sizes in without.geometry.items():
            assert torch.equal(sizes, with_.geometry[name])


def test_the_seed_decides_every_draw(examples: Examples) -> None:
    def draws(seed: int) -> list[object]:
        plan = plan_of(5, seed=seed)
        batches = batches_of(dataset_of(examples, plan=plan, **RANDOM), 10)
        return [(b.numbers, b.captions, seen(b.pixels[0])) for b in batches]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_two_processes_see_the_same_slots_with_the_same_draws_as_one(examples: Examples) -> None:
    def by_position(**layout: int) -> dict[int, tuple[object, ...]]:
        dataset = dataset_of(examples, plan=plan_of(5, **layout), **RANDOM)
        return {
            position: (batch.numbers[row], batch.captions[row], bytes_of(pixels).tobytes())
            for batch in batches_of(dataset, 6)
            for row, (position, pixels) in enumerate(
                zip(batch.positions, batch.pixels, strict=True)
            )
            if batch.weights[row] > 0
        }

    one = by_position(batch_size=2)
    first = by_position(num_processes=2, process_index=0)
    second = by_position(num_processes=2, process_index=1)

    assert not first.keys() & second.keys()
    assert first | second == one
    assert by_position(gradient_accumulation_steps=2) == one


def test_the_number_of_workers_changes_nothing(examples: Examples) -> None:
    dataset = dataset_of(examples, plan=plan_of(5, batch_size=2), **RANDOM)

    def batches(num_workers: int) -> list[Batch]:
        loader = DataLoader(dataset, batch_size=None, sampler=range(4), num_workers=num_workers)
        return [batch for step in loader for batch in step]

    for alone, worked in zip(batches(0), batches(2), strict=True):
        assert_equal(alone, worked)


def test_a_step_can_be_asked_for_in_any_order_and_after_pickling(examples: Examples) -> None:
    dataset = dataset_of(examples, **RANDOM)
    late = dataset[7]

    again = pickle.loads(pickle.dumps(dataset))

    assert_equal(late[0], again[7][0])
