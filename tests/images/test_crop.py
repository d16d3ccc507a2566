"""The one geometric transform, by hand arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest
from grid import grid_image
from PIL import Image

from trainer.images.crop import (
    Placement,
    Size,
    Window,
    center_window,
    centre_of_mass,
    cover_size,
    face_region,
    face_window,
    jittered,
    random_window,
    resize_to_cover,
    upper_window,
    window_around,
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


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_no_turn_cuts_the_pixels_out_bit_for_bit() -> None:
    pixels, weights = noise(40, 50), noise(40, 50)[..., 0].astype(np.float32) / 255
    placement = Placement(Window(3, 4, 20, 21), angle=0.0)

    np.testing.assert_array_equal(placement.apply(pixels), pixels[3:23, 4:25])
    np.testing.assert_array_equal(placement.apply(weights), weights[3:23, 4:25])
    assert (placement.valid((40, 50)) == 1).all()


@pytest.mark.parametrize(("angle", "quarters"), [(90, 1), (180, 2), (-90, 3), (-180, 2)])
@pytest.mark.parametrize("side", [32, 33])
def test_a_quarter_turn_of_a_square_is_exactly_that_of_numpy(
    angle: int, quarters: int, side: int
) -> None:
    pixels = noise(side, side)
    placement = Placement(Window(0, 0, side, side), angle=angle)

    turned = placement.apply(pixels)

    assert turned.dtype == np.uint8
    np.testing.assert_array_equal(turned, np.rot90(pixels, quarters))
    assert (placement.valid((side, side)) == 1).all()


def test_a_window_turns_about_its_own_middle_and_sees_what_lies_around_it() -> None:
    pixels = noise(60, 70)
    # The middle is (30, 40); 20 high and 10 wide, on its side it is 10 high and 20 wide.
    placement = Placement(Window(20, 35, 20, 10), angle=90)

    np.testing.assert_array_equal(placement.apply(pixels), np.rot90(pixels[25:35, 30:50]))


def test_a_turn_is_bilinear_and_counter_clockwise_as_pillows() -> None:
    pixels = noise(64, 64)

    turned = Placement(Window(0, 0, 64, 64), angle=17.3).apply(pixels)

    pillows = np.asarray(Image.fromarray(pixels).rotate(17.3, Image.Resampling.BILINEAR))
    # Pillow works with fixed-point numbers; away from the corners, which it paints black.
    difference = np.abs(turned.astype(int) - pillows)[12:-12, 12:-12]
    assert difference.max() <= 1


def test_outside_the_picture_its_edge_is_repeated_and_counts_nothing() -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    placement = Placement(Window(0, 0, 32, 32), angle=45)

    valid = placement.valid((32, 32))

    assert (placement.apply(pixels) == 200).all()
    assert valid.dtype == np.float32
    assert set(np.unique(valid)) == {0, 1}
    # A square in a turned equal square keeps the octagon: 2 * (sqrt(2) - 1) = 0.828 of it.
    assert valid.mean() == pytest.approx(0.828, abs=0.01)
    assert valid[0, 0] == valid[-1, -1] == valid[0, -1] == valid[-1, 0] == 0
    assert valid[16, 16] == valid[0, 16] == 1


def test_turned_then_mirrored_is_the_mirror_of_turned() -> None:
    pixels, window = noise(64, 80), Window(2, 3, 50, 50)

    mirrored = Placement(window, flipped=True, angle=20)
    plain = Placement(window, angle=20)

    np.testing.assert_array_equal(mirrored.apply(pixels), plain.apply(pixels)[:, ::-1])
    np.testing.assert_array_equal(mirrored.valid((64, 80)), plain.valid((64, 80))[:, ::-1])


def test_a_mask_turns_with_its_picture_without_rounding() -> None:
    pixels = np.asarray(grid_image(100, 100))
    weights = pixels[..., 0].astype(np.float32) / 255
    placement = Placement(Window(20, 20, 60, 60), angle=33, flipped=True)

    turned = placement.apply(weights)

    assert turned.dtype == np.float32
    # The picture is rounded to whole numbers, the mask is not.
    np.testing.assert_allclose(turned * 255, placement.apply(pixels)[..., 0], atol=0.501)
    assert np.abs(turned * 255 - np.rint(turned * 255)).max() > 0.4


def test_a_window_is_put_around_a_point_and_kept_inside() -> None:
    assert window_around((100, 200), (60, 80), 0.5, 0.25) == Window(20, 10, 60, 80)
    assert window_around((100, 200), (60, 80), 0.0, 1.0) == Window(0, 120, 60, 80)
    assert window_around((70, 101), (64, 64), 0.5, 0.5) == center_window((70, 101), (64, 64))


def test_without_a_face_an_upright_picture_is_shown_a_little_above_its_middle() -> None:
    # 0.42 * 200 - 50.
    assert upper_window((200, 100), (100, 100)) == Window(34, 0, 100, 100)
    assert upper_window((100, 200), (100, 100)) == Window(0, 50, 100, 100)
    assert upper_window((100, 100), (100, 100)) == Window(0, 0, 100, 100)


def test_a_face_is_put_in_the_middle_and_above_half() -> None:
    # The face's middle is (100, 80): 100 - 0.38 * 100 and 80 - 50.
    assert face_window((300, 300), (100, 100), (70, 90, 20, 20)) == Window(62, 30, 100, 100)


def test_a_face_near_the_corner_has_a_window_inside_the_picture() -> None:
    assert face_window((300, 300), (100, 100), (0, 0, 20, 20)) == Window(0, 0, 100, 100)
    assert face_window((300, 300), (100, 100), (290, 290, 20, 20)) == Window(200, 200, 100, 100)


def test_a_window_moves_so_that_no_hair_is_cut_off() -> None:
    # A head from 100 - 0.45 * 60 = 73 to 100 + 1.2 * 60 = 172 fits into 100: by the face alone,
    # the window would start at 130 - 38 = 92.
    assert face_window((300, 300), (100, 100), (100, 100, 60, 60)).top == 73


def test_a_window_moves_so_that_no_ear_is_cut_off() -> None:
    # At the right edge of 300 the ear would end at 310: what is in the picture is in view. On
    # the left it starts at 60 - 0.25 * 60 = 45, where the window by the face alone has 40.
    assert face_window((300, 300), (100, 100), (240, 100, 60, 60)).left == 200
    assert face_window((300, 300), (100, 100), (60, 100, 60, 60)).left == 40


def test_a_head_that_does_not_fit_keeps_its_face_in_view() -> None:
    window = face_window((400, 400), (100, 100), (100, 100, 200, 200))

    # 200 - 0.38 * 100 and 200 - 50: about the middle of the face.
    assert window == Window(162, 150, 100, 100)


@pytest.mark.parametrize("seed", range(20))
def test_a_head_is_wholly_in_view_wherever_it_fits(seed: int) -> None:
    rng = random.Random(seed)
    side = rng.uniform(5, 60)
    left, top = rng.uniform(0, 200 - side), rng.uniform(0, 300 - side)

    window = face_window((300, 200), (100, 100), (left, top, side, side))

    assert 0 <= window.top <= 200
    assert 0 <= window.left <= 100
    # 1.65 sides high, 1.5 sides wide; one pixel is lost to rounding.
    assert window.top <= max(top - 0.45 * side, 0) + 1
    assert window.top + 100 >= min(top + 1.2 * side, 300) - 1
    assert window.left <= max(left - 0.25 * side, 0) + 1
    assert window.left + 100 >= min(left + 1.25 * side, 200) - 1


def test_the_region_of_a_face_is_a_square_of_so_many_faces() -> None:
    # 1.5 * 40 about the middle (100, 90).
    assert face_region((200, 200), (80, 75, 40, 30), 1.5) == Window(60, 70, 60, 60)


def test_the_region_of_a_face_is_moved_inside_before_it_is_made_smaller() -> None:
    assert face_region((200, 300), (0, 0, 40, 40), 2) == Window(0, 0, 80, 80)
    assert face_region((200, 300), (250, 150, 40, 40), 2) == Window(120, 220, 80, 80)
    # 10 * 40 is more than the height: as large as can be, and still about the face.
    assert face_region((200, 300), (250, 150, 40, 40), 10) == Window(0, 100, 200, 200)


def test_the_mass_of_a_mask_lies_where_its_weights_are() -> None:
    mask = np.zeros((40, 80), np.float32)
    mask[10:20, 60:80] = 0.5

    y, x = centre_of_mass(mask)

    # Rows 10 … 20 of 40, columns 60 … 80 of 80.
    assert y == pytest.approx(15 / 40, abs=1e-3)
    assert x == pytest.approx(70 / 80, abs=1e-3)


def test_an_empty_mask_has_its_mass_in_the_middle() -> None:
    assert centre_of_mass(np.zeros((30, 50), np.float32)) == pytest.approx((0.5, 0.5))


def test_a_mask_of_any_resolution_has_its_mass_in_the_same_place() -> None:
    small = np.zeros((8, 8), np.float32)
    small[1, 6] = 1

    large = small.repeat(16, axis=0).repeat(16, axis=1)

    assert centre_of_mass(large) == pytest.approx(centre_of_mass(small))
