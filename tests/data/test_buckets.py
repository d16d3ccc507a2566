"""Trained sizes of one area: compared with kohya's list, written out again, and by hand."""

from __future__ import annotations

import math
from itertools import permutations

import pytest

from trainer.data.buckets import bucket_of, bucket_sizes, bucket_table
from trainer.images.crop import Size


def kohyas_list(width: int, height: int, smallest: int, largest: int, step: int) -> set[Size]:
    """sd-scripts' `make_bucket_resolutions`, as it stands there."""
    area = width * height
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)}
    side = smallest
    while side <= largest:
        other = min(largest, int((area // side) // step) * step)
        if other >= smallest:
            sizes |= {(side, other), (other, side)}
        side += step
    return sizes


@pytest.mark.parametrize(
    ("width", "height", "smallest", "largest", "step"),
    [
        (1024, 1024, 256, 2048, 64),
        (768, 768, 256, 1536, 64),
        (512, 512, 256, 1024, 64),
        # From 256 on the models' own step; half of the side where that is below 256.
        (256, 256, 128, 512, 64),
        (320, 320, 128, 640, 64),
        (64, 64, 32, 128, 16),
        (1152, 896, 256, 2304, 64),
    ],
)
def test_the_sizes_are_kohyas(
    width: int, height: int, smallest: int, largest: int, step: int
) -> None:
    expected = kohyas_list(width, height, smallest, largest, step)

    assert set(bucket_sizes(width, height)) == expected | {(height, width), (width, height)}


def test_the_sizes_of_a_tiny_model_by_hand() -> None:
    # Widths 32, 48 … 128 with heights of at most 4096 pixels, and all of them on their side.
    upright = [(32, 96), (32, 112), (32, 128), (48, 80)]

    assert list(bucket_sizes(64, 64)) == sorted(
        [*upright, (64, 64), *((down, right) for right, down in upright)]
    )


@pytest.mark.parametrize(
    ("width", "height"), [(1024, 1024), (768, 1344), (1000, 1000), (72, 72), (512, 768), (64, 200)]
)
def test_the_given_size_is_among_them_and_no_other_is_larger(width: int, height: int) -> None:
    sizes = bucket_sizes(width, height)

    assert {(height, width), (width, height)} <= set(sizes)
    assert max(down * right for down, right in sizes) == height * width
    assert len(set(sizes)) == len(sizes)
    assert {(right, down) for down, right in sizes} == set(sizes)


@pytest.mark.parametrize("side", [64, 72, 128, 250, 256, 512, 1000, 1024])
def test_all_but_the_given_size_have_sides_of_the_step(side: int) -> None:
    step = 64 if side >= 256 else 16

    others = set(bucket_sizes(side, side)) - {(side, side)}

    assert others
    assert {length % step for size in others for length in size} == {0}


@pytest.mark.parametrize(
    ("width", "height", "cut_off"),
    # What was measured of kohya's list with sides up to 2048: 3:4 3.6 %, 9:16 1.6 %, 3:2 2.6 %.
    [
        (3024, 4032, 0.036),
        (1080, 1920, 0.016),
        (6000, 4000, 0.026),
        (4000, 6000, 0.026),
        (900, 900, 0.0),
    ],
)
def test_little_is_cut_off_common_photographs(width: int, height: int, cut_off: float) -> None:
    down, right = bucket_of((height, width), bucket_sizes(1024, 1024))

    kept = min(right / width, down / height) / max(right / width, down / height)
    assert 1 - kept == pytest.approx(cut_off, abs=0.0005)


def test_the_nearest_aspect_is_that_of_the_nearest_log() -> None:
    # 1.42 is nearer to 1 than to 2, its log nearer to that of 2: 0.342 and 0.351 away.
    assert bucket_of((100, 142), [(100, 100), (100, 200)]) == (100, 200)
    assert bucket_of((142, 100), [(100, 100), (200, 100)]) == (200, 100)
    assert bucket_of((100, 141), [(100, 100), (100, 200)]) == (100, 100)


@pytest.mark.parametrize(
    ("size", "sizes", "chosen"),
    [
        # One aspect: the larger area.
        ((10, 20), [(64, 128), (128, 256), (96, 192)], (128, 256)),
        # A square between a size and itself on its side: the wider.
        ((50, 50), [(64, 96), (96, 64)], (64, 96)),
        # Two aspects at the same distance of 4:3 (1:1 and 16:9): the larger area.
        ((300, 400), [(100, 100), (90, 160)], (90, 160)),
        ((300, 400), [(121, 121), (90, 160)], (121, 121)),
    ],
)
def test_ties_are_broken_in_whatever_order_the_sizes_come(
    size: Size, sizes: list[Size], chosen: Size
) -> None:
    assert {bucket_of(size, order) for order in permutations(sizes)} == {chosen}


def test_without_a_choice_every_picture_has_the_one_size() -> None:
    assert bucket_of((4000, 100), [(64, 64)]) == (64, 64)


def test_the_table_names_each_size_as_width_and_height_the_fullest_first() -> None:
    counts = {(1024, 1024): 1, (832, 1216): 5, (1216, 832): 1}

    assert bucket_table(counts) == (
        "1216x832: 5 pictures",
        "1024x1024: 1 picture",
        "832x1216: 1 picture",
    )
    assert bucket_table({}) == ()
