"""The one geometric transform, by hand arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest
from grid import grid_image

from trainer.data.crop import (
    Placement,
    Size,
    Window,
    center_window,
    cover_size,
    jittered,
    random_window,
    resize_to_cover,
)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((1000, 2000), (500, 500), (500, 1000)),
        ((2000, 1000), (500, 500), (1000, 500)),
        ((100, 100), (64, 128), (128, 128)),
        # 3000 * 768 / 4032 = 571.43 is too low for 768, so the height decides: 4032 * 768 / 3000.
        ((3000, 4032), (768, 768), (768, 1032)),
        ((333, 777), (64, 64), (64, 149)),
        ((768, 768), (768, 768), (768, 768)),
    ],
)
def test_the_smallest_size_that_covers_the_target_keeps_the_aspect(
    size: Size, target: Size, expected: Size
) -> None:
    assert cover_size(size, target) == expected
    image = grid_image(10, 10).resize((size[1], size[0]))
    resized = resize_to_cover(image, target)
    assert (resized.height, resized.width) == expected


def test_the_middle_window_starts_at_half_the_rest() -> None:
    assert center_window((70, 101), (64, 64)) == Window(3, 18, 64, 64)  # 37 / 2 = 18.5 → 18


def test_a_random_window_reaches_every_place_and_none_outside() -> None:
    rng = random.Random(0)

    windows = [random_window((66, 67), (64, 64), rng) for _ in range(300)]

    assert {(w.top, w.left) for w in windows} == {(t, s) for t in range(3) for s in range(4)}


def test_jitter_moves_both_ways_within_its_offsets_and_stays_inside() -> None:
    rng = random.Random(0)
    middle = Window(10, 10, 64, 64)

    moved = [jittered(middle, (84, 84), rng, offset_x=3, offset_y=0) for _ in range(200)]
    far = [jittered(middle, (84, 84), rng, offset_x=0, offset_y=50) for _ in range(200)]

    assert {w.left for w in moved} == set(range(7, 14))
    assert {w.top for w in moved} == {10}
    assert {w.left for w in far} == {10}
    assert min(w.top for w in far) == 0
    assert max(w.top for w in far) == 20


def test_a_placement_shows_its_window_and_mirrors_it() -> None:
    pixels = np.asarray(grid_image(40, 50))
    window = Window(top=5, left=7, height=20, width=30)

    plain = Placement(window).apply(pixels)
    mirrored = Placement(window, flipped=True).apply(pixels)

    assert plain.shape == (20, 30, 3)
    assert tuple(plain[0, 0, :2]) == (7, 5)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_anything_of_the_same_size_stays_aligned_with_the_picture() -> None:
    pixels = np.asarray(grid_image(40, 50))
    mask = pixels[..., 0]

    placement = Placement(Window(3, 4, 20, 20), flipped=True)

    np.testing.assert_array_equal(placement.apply(mask), placement.apply(pixels)[..., 0])


def test_the_corner_of_a_mirrored_picture_is_mirrored() -> None:
    window = Window(top=5, left=7, height=20, width=30)

    assert Placement(window).crop_top_left((40, 50)) == (5, 7)
    # 50 - 30 - 7: what lies left of the window in the mirrored picture.
    assert Placement(window, flipped=True).crop_top_left((40, 50)) == (5, 13)
