"""Small pictures of a sheet: boxes where they belong, weights as brightness, what counts bright."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainer.data.thumbnails import (
    CROP,
    MAIN_FACE,
    OTHER_FACE,
    dimmed,
    fitted,
    fitted_weights,
    grey,
    marked,
)

GREEN = (0, 120, 0)


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of a colour, the last ones included."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (200, 150)), ((50, 100), (100, 200)), ((3, 4000), (1, 200))],
)
def test_a_picture_is_as_large_as_fits(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = fitted(Image.new("L", (size[1], size[0])), (200, 200))

    assert (image.height, image.width) == expected
    assert image.mode == "RGB"


def test_a_picture_of_the_right_size_is_not_changed() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (200, 150, 3), np.uint8)

    np.testing.assert_array_equal(fitted(Image.fromarray(pixels), (200, 200)), pixels)


def test_boxes_are_drawn_where_they_are_in_the_picture() -> None:
    shown = marked(
        Image.new("RGB", (300, 200), GREEN),
        (2000, 3000),
        (200, 300),
        faces=((1000, 500, 400, 300), (2000, 1000, 600, 600)),
        crop_box=(500, 0, 2500, 2000),
    )

    # A tenth of the picture's pixels.
    assert extent(shown, MAIN_FACE) == (100, 50, 139, 79)
    assert extent(shown, OTHER_FACE) == (200, 100, 259, 159)
    assert extent(shown, CROP) == (50, 0, 299, 199)


def test_only_what_is_trained_keeps_its_colours() -> None:
    source = Image.new("RGB", (300, 200), GREEN)

    shown = marked(source, (200, 300), (200, 300), crop_box=(100, 0, 200, 200))

    assert shown.getpixel((200, 100)) == GREEN
    assert sum(shown.getpixel((50, 100))) > 2 * sum(GREEN)
    assert marked(source, (200, 300), (200, 300)).getpixel((50, 100)) == GREEN


def test_a_box_that_leaves_the_picture_is_kept_inside() -> None:
    shown = marked(
        Image.new("RGB", (300, 200), GREEN),
        (200, 300),
        (200, 300),
        faces=((-50, -50, 100, 100), (290, 190, 500, 500), (400, 400, 10, 10)),
    )

    assert extent(shown, MAIN_FACE) == (0, 0, 49, 49)
    assert extent(shown, OTHER_FACE)[2:] == (299, 199)


def test_the_main_face_is_on_top() -> None:
    shown = marked(
        Image.new("RGB", (300, 200)), (200, 300), (200, 300), faces=((50, 50, 80, 80),) * 2
    )

    assert shown.getpixel((50, 50)) == MAIN_FACE


def test_the_source_is_not_drawn_upon() -> None:
    source = Image.new("RGB", (300, 200), GREEN)

    marked(source, (200, 300), (200, 300), faces=((0, 0, 50, 50),), crop_box=(0, 0, 100, 100))

    assert source.getextrema() == tuple((value, value) for value in GREEN)


def test_weights_are_means_over_what_a_small_pixel_covers() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[0, 0] = 1
    weights[2:, 2:] = 0.5

    # By hand: one of four, none, none, four halves.
    np.testing.assert_allclose(fitted_weights(weights, (2, 2)), [[0.25, 0], [0, 0.5]])


def test_weights_are_shown_as_brightness() -> None:
    image = grey(np.array([[0, 0.5, 1]], np.float32))

    assert [image.getpixel((column, 0))[0] for column in range(3)] == [0, 128, 255]


def test_what_counts_fully_keeps_its_colour_and_what_counts_less_is_darker() -> None:
    crop = Image.new("RGB", (3, 1), (200, 150, 100))

    shown = dimmed(crop, np.array([[1, 0.5, 0]], np.float32))

    full, half, none = (shown.getpixel((column, 0)) for column in range(3))
    assert full == (200, 150, 100)
    assert sum(full) > sum(half) > sum(none)
