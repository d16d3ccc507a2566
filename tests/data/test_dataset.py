"""Batches by step: every option recovered from the pixels of grid pictures."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grid import bytes_of, grid_examples, grid_image, plan_of, seen, with_mask
from PIL import Image
from torch.utils.data import DataLoader

from trainer.config import DataConfig
from trainer.data.dataset import Batch, Dataset, has_fixed_window
from trainer.data.plan import Plan, Portion
from trainer.data.prepared import Example
from trainer.images.crop import Size

Examples = tuple[Example, ...]
HEIGHT, WIDTH = 80, 100  # of the prepared pictures; the trained size is 64 x 64
WIDE, TALL, SQUARE = (64, 96), (96, 64), (64, 64)
RANDOM = {
    "center_crop": False,
    "random_flip": True,
    "caption_dropout": 0.5,
    "random_crop_offset_x": 3,
    "random_crop_offset_y": 2,
}
TURNED = {"random_rotation_start": -40, "random_rotation_end": 40}


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return grid_examples(tmp_path / "prepared", 5, height=HEIGHT, width=WIDTH)


def dataset_of(
    examples: Sequence[Example],
    *,
    with_pixels: bool = True,
    plan: Plan | None = None,
    target: Size | None = None,
    **options: object,
) -> Dataset:
    """A data set of pictures, perhaps all trained at another size."""
    if target is not None:
        examples = [replace(example, target=target) for example in examples]
    plan = plan or plan_of(len(examples))
    return Dataset(examples, plan, DataConfig(**options), with_pixels=with_pixels)


def of_sizes(
    folder: Path, sizes: Sequence[Size], targets: Sequence[Size], num_class_images: int = 0
) -> Examples:
    """Grid pictures of several prepared and trained sizes; the last ones are of the class."""
    num_instances = len(sizes) - num_class_images
    examples = []
    for number, ((height, width), target) in enumerate(zip(sizes, targets, strict=True)):
        (example, *_) = grid_examples(folder / str(number), 1, height=height, width=width)
        grid_image(height, width, blue=number).save(example.path)
        named = replace(example, number=number, name=f"{number}.jpg", caption=f"caption {number}")
        examples.append(replace(named, target=target, is_class=number >= num_instances))
    return tuple(examples)


def batches_of(dataset: Dataset, steps: int) -> list[Batch]:
    return [batch for step in range(steps) for batch in dataset[step]]


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("numbers", "positions", "captions", "flipped", "angles"):
        assert getattr(left, name) == getattr(right, name)
    assert left.geometry.keys() == right.geometry.keys()
    for name, sizes in left.geometry.items():
        assert torch.equal(sizes, right.geometry[name])
    assert torch.equal(left.weights, right.weights)
    assert left.pixels is not None
    assert right.pixels is not None
    assert torch.equal(left.pixels, right.pixels)
    assert (left.masks is None) == (right.masks is None)
    if left.masks is not None:
        assert torch.equal(left.masks, right.masks)
    assert torch.equal(left.is_class, right.is_class)


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
    (batch,) = dataset_of(examples, plan=plan_of(5, batch_size=2), target=(64, 72))[0]

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
        batches = batches_of(dataset_of(examples, plan=plan, **RANDOM, **TURNED), 10)
        return [(b.numbers, b.captions, b.angles, seen(b.pixels[0])) for b in batches]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_two_processes_see_the_same_slots_with_the_same_draws_as_one(examples: Examples) -> None:
    def by_position(**layout: int) -> dict[int, tuple[object, ...]]:
        dataset = dataset_of(examples, plan=plan_of(5, **layout), **RANDOM, **TURNED)
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
    dataset = dataset_of(examples, plan=plan_of(5, batch_size=2), **RANDOM, **TURNED)

    def batches(num_workers: int) -> list[Batch]:
        loader = DataLoader(dataset, batch_size=None, sampler=range(4), num_workers=num_workers)
        return [batch for step in loader for batch in step]

    for alone, worked in zip(batches(0), batches(2), strict=True):
        assert_equal(alone, worked)


def test_a_step_can_be_asked_for_in_any_order_and_after_pickling(examples: Examples) -> None:
    dataset = dataset_of(examples, **RANDOM, **TURNED)
    late = dataset[7]

    again = pickle.loads(pickle.dumps(dataset))

    assert_equal(late[0], again[7][0])


def with_class(folder: Path, count: int, class_count: int) -> tuple[Examples, Plan]:
    """Grid pictures of which the last ones are of the class, one batch an epoch."""
    examples = grid_examples(
        folder, count, height=HEIGHT, width=WIDTH, num_class_images=class_count
    )
    portion = Portion(tuple(range(count)), class_images=tuple(range(count, count + class_count)))
    return examples, plan_of(portion, batch_size=count)


def test_the_class_half_follows_with_captions_and_geometry_of_its_own(tmp_path: Path) -> None:
    examples, plan = with_class(tmp_path, 3, 4)
    dataset = dataset_of(examples, plan=plan, **RANDOM | {"caption_dropout": 0})

    for batch in batches_of(dataset, 8):
        assert batch.is_class.tolist() == [False] * 3 + [True] * 3
        assert batch.is_class.dtype == torch.bool
        for row, pixels in enumerate(batch.pixels):
            top, left, mirrored, number = seen(pixels)
            assert batch.numbers[row] == number
            assert (number >= 3) == bool(batch.is_class[row])
            assert batch.captions[row] == f"caption {number}"
            corner = WIDTH - 64 - left if mirrored else left
            assert batch.geometry["crop_top_left"][row].tolist() == [top, corner]


def test_a_class_picture_has_draws_of_its_own(tmp_path: Path) -> None:
    examples, plan = with_class(tmp_path, 1, 1)
    batches = batches_of(dataset_of(examples, plan=plan, **RANDOM, **TURNED), 64)

    assert any(batch.flipped[0] != batch.flipped[1] for batch in batches)
    assert all(batch.angles[0] != batch.angles[1] for batch in batches)


def test_captions_of_class_pictures_are_never_dropped(tmp_path: Path) -> None:
    examples, plan = with_class(tmp_path, 2, 2)
    dataset = dataset_of(examples, plan=plan, with_pixels=False, caption_dropout=1.0)

    for batch in batches_of(dataset, 10):
        assert batch.captions[:2] == ("", "")
        assert set(batch.captions[2:]) == {"caption 2", "caption 3"}


def test_class_pictures_can_be_encoded_before_too(tmp_path: Path) -> None:
    examples, plan = with_class(tmp_path, 2, 3)
    dataset = dataset_of(examples, plan=plan, with_pixels=False, random_flip=True)

    assert {number for number, _ in dataset.all_views()} == {0, 1, 2, 3, 4}
    assert "caption 4" in dataset.all_captions()


@pytest.mark.parametrize(("start", "end"), [(-20, 20), (5, 15), (-30, -29)])
def test_random_rotation_turns_within_its_range_and_hides_what_it_makes_up(
    tmp_path: Path, start: int, end: int
) -> None:
    examples = grid_examples(tmp_path, 1, height=200, width=200)
    dataset = dataset_of(
        examples,
        target=(192, 192),
        random_rotation_start=start,
        random_rotation_end=end,
    )
    down, across = np.mgrid[:192, :192] - 95.5
    inner = np.maximum(np.abs(down), np.abs(across)) < 64
    places = np.stack([across, down, np.ones_like(down)], axis=-1)

    angles = []
    for batch in batches_of(dataset, 20):
        shown = bytes_of(batch.pixels[0]).astype(float)
        # Red is the column and green the row of the picture: planes, turned.
        of_column, of_row = np.linalg.lstsq(places[inner], shown[inner][:, :2], rcond=None)[0].T
        angle = math.degrees(math.atan2(of_row[0] - of_column[1], of_column[0] + of_row[1]))
        angles.append(angle)
        assert batch.angles[0] == pytest.approx(angle, abs=0.2)
        # Drawn on to the window's corners, the planes say where the picture ends.
        outside = np.maximum(abs(places @ of_column - 99.5), abs(places @ of_row - 99.5)) - 100
        mask = np.ones((192, 192)) if batch.masks is None else batch.masks[0, 0].numpy()
        assert (mask[outside > 1] == 0).all()
        assert (mask[outside < -1] == 1).all()
    assert start - 0.3 <= min(angles) <= max(angles) <= end + 0.3
    assert max(angles) - min(angles) > 0.6 * (end - start) - 0.3


def test_a_fixed_quarter_turn_is_exactly_that_of_numpy(tmp_path: Path) -> None:
    examples = [with_mask(e, ramp()) for e in grid_examples(tmp_path, 2, height=64, width=64)]
    quarter = {"random_rotation_start": 90, "random_rotation_end": 90}
    upright = {b.numbers[0]: b for b in batches_of(dataset_of(examples), 2)}

    for batch in batches_of(dataset_of(examples, **quarter), 2):
        straight = upright[batch.numbers[0]]
        assert batch.angles == (90.0,)
        assert torch.equal(batch.pixels, torch.rot90(straight.pixels, 1, (2, 3)))
        assert torch.equal(batch.masks, torch.rot90(straight.masks, 1, (2, 3)))


def test_no_rotation_leaves_every_pixel(tmp_path: Path) -> None:
    examples = grid_examples(tmp_path, 1, height=HEIGHT, width=WIDTH)

    (batch,) = dataset_of(examples)[0]

    with Image.open(examples[0].path) as image:
        np.testing.assert_array_equal(bytes_of(batch.pixels[0]), np.asarray(image)[8:72, 18:82])
    assert batch.angles == (0.0,)
    assert batch.masks is None


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({}, True),
        ({"random_flip": True}, True),
        ({"random_rotation_start": 3, "random_rotation_end": 3}, True),
        ({"random_rotation_start": -2, "random_rotation_end": 2}, False),
        ({"random_crop_offset_y": 1}, False),
        ({"center_crop": False}, False),
        ({"center_crop": False, "face_aware_cropping": True}, True),
        ({"face_aware_cropping": True, "random_crop_offset_x": 1}, False),
        ({"face_aware_cropping": True, "random_rotation_end": 1}, False),
    ],
)
def test_latents_can_be_cached_where_nothing_but_the_mirror_is_drawn(
    options: dict[str, object], fixed: bool
) -> None:
    assert has_fixed_window(DataConfig(**options)) == fixed


def test_a_fixed_angle_is_seen_by_cached_latents_too(examples: Examples) -> None:
    turned = {"random_rotation_start": 30, "random_rotation_end": 30}
    cached = dataset_of(examples, with_pixels=False, **turned)

    (batch,) = dataset_of(examples, **turned)[0]

    assert torch.equal(cached.pixels_of(batch.numbers[0], False), batch.pixels[0])
    assert batch.masks is not None
    assert torch.equal(cached.mask_of(batch.numbers[0], False)[None], batch.masks)


def ramp(height: int = 64, width: int = 64) -> np.ndarray:
    """A mask that tells its places apart, from 0.1 to 1."""
    return np.linspace(0.1, 1, height * width, dtype=np.float32).reshape(height, width)


def test_masks_follow_the_window_the_mirror_and_the_jitter_of_their_pictures(
    examples: Examples,
) -> None:
    weights = ramp(HEIGHT, WIDTH)
    masked = [with_mask(example, weights) for example in examples]

    for batch in batches_of(dataset_of(masked, **RANDOM | {"center_crop": True}), 40):
        top, left, mirrored, _ = seen(batch.pixels[0])
        expected = weights[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(
            batch.masks[0, 0].numpy(), expected[:, ::-1] if mirrored else expected
        )


def test_masks_are_there_with_cached_latents_and_never_rounded(examples: Examples) -> None:
    weights = np.full((HEIGHT, WIDTH), 0.001, np.float32)
    weights[40, 50] = 1
    masked = [with_mask(example, weights) for example in examples]

    mask = dataset_of(masked, with_pixels=False).mask_of(0, False)

    assert mask.shape == (1, 64, 64)
    assert mask.dtype == torch.float32
    assert float(mask.min()) == np.float32(0.001)


def test_there_are_no_masks_where_every_weight_is_one(examples: Examples) -> None:
    ones = [with_mask(example, np.ones((HEIGHT, WIDTH))) for example in examples]

    assert dataset_of(examples)[0][0].masks is None
    assert dataset_of(ones)[0][0].masks is None


def test_a_picture_without_a_mask_counts_wholly_beside_one_with_a_mask(examples: Examples) -> None:
    mixed = [with_mask(examples[0], ramp(HEIGHT, WIDTH)), *examples[1:]]

    (batch,) = dataset_of(mixed, plan=plan_of(5, batch_size=5))[0]

    for row, number in enumerate(batch.numbers):
        assert bool((batch.masks[row] == 1).all()) == (number != 0)


def test_a_window_without_anything_of_the_subject_weighs_nothing(examples: Examples) -> None:
    # The middle window begins at column 18 and row 8.
    corner = np.zeros((HEIGHT, WIDTH), np.float32)
    corner[:4, :4] = 1
    masked = [with_mask(examples[0], corner), *examples[1:]]

    (batch,) = dataset_of(masked, plan=plan_of(5, batch_size=5))[0]

    shares = [0.0 if number == 0 else 0.2 for number in batch.numbers]
    assert batch.weights.tolist() == pytest.approx(shares)
    # A loss cannot be normalised by a mask of zeros.
    assert batch.masks is None or bool((batch.masks.flatten(1).sum(1) > 0).all())


@pytest.fixture(scope="module")
def luminance_examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """Smooth pictures with the luminance of each as its mask."""
    folder = tmp_path_factory.mktemp("luminance")
    examples = []
    for example in grid_examples(folder, 3, height=HEIGHT, width=WIDTH, target=(80, 80)):
        noise = np.random.default_rng(example.number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(example.path)
        luminance = luminance_of(np.asarray(image))
        examples.append(with_mask(example, luminance / luminance.max()))
    return tuple(examples)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center_crop": False, "random_flip": True},
        {"random_crop_offset_x": 5, "random_crop_offset_y": 4, "random_flip": True},
        {"random_rotation_start": 90, "random_rotation_end": 90},
        {"center_crop": False, "random_flip": True, **TURNED},
    ],
)
def test_the_luminance_of_the_final_pixels_is_the_mask(
    luminance_examples: Examples, options: dict[str, object]
) -> None:
    largest = {}
    for example in luminance_examples:
        with Image.open(example.path) as image:
            largest[example.number] = luminance_of(np.asarray(image)).max()

    for batch in batches_of(dataset_of(luminance_examples, **options), 12):
        number, pixels = batch.numbers[0], bytes_of(batch.pixels[0])
        mask = batch.masks[0, 0].numpy()
        valid = mask > 0
        expected = luminance_of(pixels) / largest[number]
        assert valid.mean() > 0.6
        # Turned pixels are rounded, the mask is not.
        assert np.abs(mask - expected)[valid].max() < 0.01
        # It could have failed: the mirror of a picture is not its mask.
        assert np.abs(mask - expected[:, ::-1])[valid].max() > 0.1


def luminance_of(pixels: np.ndarray) -> np.ndarray:
    """ITU-R BT.601."""
    return pixels.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255


def corner_mask(height: int, width: int) -> np.ndarray:
    """Keeps nothing but so much of the top left corner."""
    mask = np.zeros((HEIGHT, WIDTH))
    mask[:height, :width] = 1
    return mask


@pytest.mark.parametrize(
    ("options", "unseen"),
    [
        # The middle window of 64 x 64 begins at row 8 and column 18.
        ({}, ["0.jpg", "1.jpg"]),
        ({"random_flip": True}, ["0.jpg", "1.jpg"]),
        # A quarter turn about the same middle shows the same square.
        ({"random_rotation_start": 90, "random_rotation_end": 90}, ["0.jpg", "1.jpg"]),
        # A larger window begins at row 0 and column 2.
        ({"target": (80, 96)}, []),
        # What is drawn may show something in another step.
        ({"center_crop": False}, []),
        ({"random_crop_offset_x": 1}, []),
    ],
)
def test_pictures_whose_mask_keeps_nothing_of_the_one_view_of_them_are_named(
    options: dict[str, object], unseen: list[str], tmp_path: Path
) -> None:
    examples = grid_examples(tmp_path, 4, height=HEIGHT, width=WIDTH, num_class_images=1)
    masks = [corner_mask(8, WIDTH), corner_mask(HEIGHT, 18), corner_mask(9, WIDTH)]
    masked = [with_mask(*pair) for pair in zip(examples[:3], masks, strict=True)]
    of_class = with_mask(examples[4], corner_mask(1, 1))

    dataset = dataset_of([*masked, examples[3], of_class], plan=plan_of(4), **options)

    assert dataset.unseen() == unseen
    if has_fixed_window(dataset.data):
        weightless = {
            batch.numbers[0] for batch in batches_of(dataset, 4) if not batch.weights.any()
        }
        assert [f"{number}.jpg" for number in sorted(weightless)] == unseen


@pytest.mark.parametrize(
    ("sizes", "targets", "options", "without"),
    [
        ([(64, 64), (64, 64)], [SQUARE] * 2, {"x": 3, "y": 2}, ["x", "y"]),
        ([(64, 80), (64, 64)], [SQUARE] * 2, {"x": 3, "y": 2}, ["y"]),
        ([(64, 80), (90, 64)], [SQUARE] * 2, {"x": 3, "y": 2}, []),
        ([(64, 64)], [SQUARE], {"x": 0, "y": 2}, ["y"]),
        ([(64, 64)], [SQUARE], {"x": 0, "y": 0}, []),
        # Each against its own trained size: wider than another's is not room.
        ([(64, 96), (72, 64)], [WIDE, SQUARE], {"x": 3, "y": 2}, ["x"]),
        ([(64, 96), (72, 64)], [SQUARE, SQUARE], {"x": 3, "y": 2}, []),
    ],
)
def test_an_offset_that_no_picture_has_room_for_is_named(
    sizes: list[Size],
    targets: list[Size],
    options: dict[str, int],
    without: list[str],
    tmp_path: Path,
) -> None:
    examples = of_sizes(tmp_path, sizes, targets)
    offsets = {f"random_crop_offset_{axis}": pixels for axis, pixels in options.items()}

    plan = plan_of(len(examples), sizes=tuple(targets))
    dataset = dataset_of(examples, plan=plan, **offsets)

    assert dataset.offsets_without_room() == [f"random_crop_offset_{axis}" for axis in without]
    shown = [batch.geometry["crop_top_left"][0].tolist() for batch in batches_of(dataset, 20)]
    for place, axis in ((1, "x"), (0, "y")):
        moves = len({corner[place] for corner in shown}) > 1
        assert moves == (options[axis] > 0 and axis not in without)


TARGETS = (WIDE, TALL, SQUARE, WIDE, TALL)


@pytest.fixture
def mixed(tmp_path: Path) -> Examples:
    """Five pictures of three trained sizes, each with room on one side."""
    prepared = ((64, 110), (110, 64), (64, 90), (70, 96), (96, 75))
    return of_sizes(tmp_path / "mixed", prepared, TARGETS)


def mixed_plan(**layout: int) -> Plan:
    return plan_of(5, sizes=TARGETS, **layout)


def test_each_batch_has_the_size_of_its_pictures(mixed: Examples) -> None:
    shapes = set()

    for batch in batches_of(dataset_of(mixed, plan=mixed_plan(batch_size=2)), 6):
        (target,) = {mixed[number].target for number in batch.numbers}
        assert batch.pixels.shape == (2, 3, *target)
        assert batch.geometry["target_size"].tolist() == [list(target)] * 2
        shapes.add(target)
        for row, pixels in enumerate(batch.pixels):
            top, left, _, number = seen(pixels)
            height, width = mixed[number].size
            assert batch.numbers[row] == number
            # The middle window.
            assert (top, left) == (
                round((height - target[0]) / 2),
                round((width - target[1]) / 2),
            )
            assert batch.geometry["crop_top_left"][row].tolist() == [top, left]
    assert shapes == {WIDE, TALL, SQUARE}


def test_masks_and_fillings_have_the_size_of_their_batch(mixed: Examples) -> None:
    # One of the wide pictures has a mask, one of the tall ones keeps nothing.
    masked = [
        with_mask(mixed[0], ramp(64, 110)),
        with_mask(mixed[1], np.zeros((110, 64))),
        *mixed[2:],
    ]
    dataset = dataset_of(masked, plan=mixed_plan(batch_size=2))

    kept = {WIDE: 0, TALL: 0, SQUARE: 0}
    for batch in batches_of(dataset, 9):
        target = mixed[batch.numbers[0]].target
        if batch.masks is not None:
            kept[target] += 1
            assert batch.masks.shape == (2, 1, *target)
        assert [float(weight) > 0 for weight in batch.weights] == [n != 1 for n in batch.numbers]
    assert kept == {WIDE: 3, TALL: 0, SQUARE: 0}
    assert dataset.unseen() == ["1.jpg"]


def test_pictures_of_several_sizes_are_drawn_alike_over_processes_and_accumulation(
    mixed: Examples,
) -> None:
    def by_position(**layout: int) -> dict[int, tuple[object, ...]]:
        plan = mixed_plan(batch_size=2, **layout)
        dataset = dataset_of(mixed, plan=plan, **RANDOM, **TURNED)
        return {
            position: (batch.numbers[row], batch.captions[row], bytes_of(pixels).tobytes())
            for batch in batches_of(dataset, 6)
            for row, (position, pixels) in enumerate(
                zip(batch.positions, batch.pixels, strict=True)
            )
            if batch.weights[row] > 0
        }

    one = by_position(gradient_accumulation_steps=2)
    first = by_position(num_processes=2, process_index=0)
    second = by_position(num_processes=2, process_index=1)

    assert not first.keys() & second.keys()
    assert first | second == one


def test_cached_views_of_several_sizes_are_those_of_the_uncached_run(mixed: Examples) -> None:
    cached = dataset_of(mixed, plan=mixed_plan(batch_size=2), with_pixels=False, random_flip=True)
    uncached = dataset_of(mixed, plan=mixed_plan(batch_size=2), random_flip=True)

    for without, with_ in zip(batches_of(cached, 6), batches_of(uncached, 6), strict=True):
        for row, (number, flipped) in enumerate(zip(without.numbers, without.flipped, strict=True)):
            assert torch.equal(cached.pixels_of(number, flipped), with_.pixels[row])


def test_class_pictures_of_another_size_are_a_batch_of_their_own(tmp_path: Path) -> None:
    examples = of_sizes(tmp_path, [WIDE, WIDE, TALL], [WIDE, WIDE, TALL], num_class_images=1)
    plan = plan_of(Portion((0, 1), class_images=(2,)), batch_size=2, sizes=(WIDE, WIDE, TALL))

    own, of_class = dataset_of(examples, plan=plan)[1]

    assert (own.pixels.shape, of_class.pixels.shape) == ((2, 3, *WIDE), (2, 3, *TALL))
    assert (own.is_class.tolist(), of_class.is_class.tolist()) == ([False] * 2, [True] * 2)
    assert of_class.positions == tuple(~position for position in own.positions)
    assert of_class.weights.tolist() == own.weights.tolist() == [0.5, 0.5]


def test_a_window_that_was_found_is_shown_whatever_center_crop_says(examples: Examples) -> None:
    found = [replace(examples[0], window=(3, 30)), *examples[1:]]

    for options in ({}, {"center_crop": False}):
        for batch in batches_of(dataset_of(found, **options), 20):
            top, left, _, number = seen(batch.pixels[0])
            assert number != 0 or (top, left) == (3, 30)
            assert batch.geometry["crop_top_left"][0].tolist() == [top, left]


def test_a_found_window_is_what_cached_latents_and_masks_see(examples: Examples) -> None:
    weights = ramp(HEIGHT, WIDTH)
    windows = [(0, 0), (16, 36), (5, 6), (16, 0), (1, 35)]
    found = [
        replace(with_mask(example, weights), window=window)
        for example, window in zip(examples, windows, strict=True)
    ]
    options = {"center_crop": False, "face_aware_cropping": True}
    cached = dataset_of(found, with_pixels=False, **options)

    for batch in batches_of(cached, 5):
        (number,) = batch.numbers
        top, left = windows[number]
        assert seen(cached.pixels_of(number, False)) == (top, left, False, number)
        expected = weights[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(cached.mask_of(number, False)[0].numpy(), expected)


def test_offsets_move_a_found_window_inside_the_picture(tmp_path: Path) -> None:
    (example,) = grid_examples(tmp_path, 1, height=HEIGHT, width=WIDTH)
    found = replace(example, window=(8, 35))
    dataset = dataset_of([found], center_crop=False, random_crop_offset_x=3, random_crop_offset_y=2)

    shown = [seen(batch.pixels[0])[:2] for batch in batches_of(dataset, 60)]

    assert {top for top, _ in shown} == {6, 7, 8, 9, 10}
    # 36 is the last column where a window of 64 fits into 100.
    assert {left for _, left in shown} == {32, 33, 34, 35, 36}


def test_a_mask_outside_of_a_found_window_is_named(tmp_path: Path) -> None:
    first, second = grid_examples(tmp_path, 2, height=HEIGHT, width=WIDTH)
    upper = [with_mask(example, corner_mask(8, WIDTH)) for example in (first, second)]
    found = [replace(upper[0], window=(7, 0)), replace(upper[1], window=(8, 0))]
    options = {"center_crop": False, "face_aware_cropping": True}

    assert dataset_of(found, **options).unseen() == ["1.jpg"]
