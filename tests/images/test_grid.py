"""The grid of pictures: where they stand, how large they are, and that labels have room."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainer.images.grid import LARGEST, SMALLEST, GridRow, Tile, grid, tile_picture, tile_size

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
LONG = "a name that is far too long for its place " * 9


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (200, 200)) -> Image.Image:
    return Image.new("RGB", size, colour)


def box(page: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of everything in a colour; all of it must have the colour."""
    found = (np.asarray(page) == colour).all(-1)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert found[top:bottom, left:right].all()
    return int(left), int(top), int(right), int(bottom)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((64, 64), (192, 192)),
        ((1, 1), (160, 160)),
        ((64, 32), (192, 96)),
        ((160, 40), (160, 40)),
        ((300, 200), (300, 200)),
        ((512, 512), (512, 512)),
        ((1024, 1024), (512, 512)),
        ((1024, 512), (512, 256)),
        ((2000, 3), (512, 1)),
    ],
)
def test_small_pictures_are_enlarged_by_whole_numbers_and_large_ones_shrunk(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert tile_size(size) == shown
    assert SMALLEST <= max(shown) <= LARGEST


def test_enlarged_pixels_stay_squares_of_one_colour() -> None:
    small = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20)

    shown = np.asarray(tile_picture(small))

    assert shown.shape == (160, 160, 3)
    np.testing.assert_array_equal(shown[::80, ::80], np.asarray(small))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 4


def test_a_tile_is_a_tile_already() -> None:
    once = tile_picture(plain(RED, (700, 300)))

    assert tile_picture(once).size == once.size


def test_pictures_of_a_row_and_of_a_column_stand_in_line() -> None:
    rows = [
        GridRow("one", [Tile(plain(RED)), Tile(plain(GREEN))], "a text"),
        GridRow("two", [Tile(plain(BLUE)), Tile(None)]),
    ]

    page = grid(["0 (base)", "1"], rows, title="me")

    red, green, blue = (box(page, colour) for colour in (RED, GREEN, BLUE))
    assert red[1] == green[1]
    assert red[0] == blue[0]
    assert green[0] > red[2]
    assert blue[1] > red[3]
    assert page.width - green[2] == page.height - blue[3] == 40


@pytest.mark.parametrize("size", [(64, 64), (1024, 300), (300, 1024)])
def test_a_picture_is_drawn_whole_whatever_its_shape(size: tuple[int, int]) -> None:
    page = grid(["1"], [GridRow("one", [Tile(plain(RED, size), "likeness 0.83")])])

    left, top, right, bottom = box(page, RED)

    assert (right - left, bottom - top) == tile_size(size)


def test_the_longest_labels_lie_on_no_picture_and_stay_on_the_page() -> None:
    tiles = [Tile(plain(RED, (64, 64)), LONG), Tile(plain(GREEN, (64, 64)), LONG)]
    row, last = GridRow(LONG, tiles, LONG), GridRow("last", [Tile(plain(BLUE)), Tile(None)])

    page = grid([LONG, LONG.replace(" ", "")], [row, last], title=LONG, subtitle=LONG)

    for colour in (RED, GREEN, BLUE):
        box(page, colour)
    edge = np.asarray(page)
    for side in (edge[:20], edge[-20:], edge[:, :20], edge[:, -20:]):
        assert (side == edge[0, 0]).all()


def test_labels_are_drawn_beside_above_and_below() -> None:
    def ink(**given: str) -> np.ndarray:
        row = GridRow(given.get("name", ""), [Tile(plain(RED), given.get("caption", ""))])
        page = np.asarray(grid([given.get("column", "")], [row])).astype(int)
        left, top, right, bottom = box(Image.fromarray(page.astype(np.uint8)), RED)
        dark = (page < 100).all(-1)
        return np.array([dark[:, :left].sum(), dark[:top].sum(), dark[bottom:, left:right].sum()])

    assert (ink() == 0).all()
    assert (ink(name="cat") > 0).tolist() == [True, False, False]
    assert (ink(column="0.5") > 0).tolist() == [False, True, False]
    assert (ink(caption="likeness") > 0).tolist() == [False, False, True]


def test_the_same_pictures_give_the_same_grid() -> None:
    rows = [GridRow("one", [Tile(plain(RED), "0.5")], "a text")]

    assert grid(["1"], rows).tobytes() == grid(["1"], rows).tobytes()
