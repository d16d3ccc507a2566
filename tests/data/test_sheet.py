"""The contact sheet: a row for each picture, left-out ones too, on pages that are always alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from trainer.data.sheet import ROWS_PER_PAGE, Row, jpeg, pages, thumbnail
from trainer.data.thumbnails import CROP, MAIN_FACE, OTHER_FACE, PAPER
from trainer.images.findings import Remark

AMBER, RED = (201, 106, 0), (196, 43, 28)
WOMAN = Image.fromarray(photographs.astronaut())
# A ramp from left to right, of the size that it is shown at.
WEIGHTS = np.tile(np.linspace(0, 1, 228, dtype=np.float32), (228, 1))
ROW = Row(
    "IMG_2031.JPG",
    source=thumbnail(WOMAN),
    source_size=(512, 512),
    crop_box=(100, 0, 400, 400),
    crop=thumbnail(WOMAN.crop((100, 0, 500, 400))),
    caption="a photograph of TOK",
    caption_origin="IMG_2031.txt",
)
LEFT_OUT = Row("broken.jpg", remarks=(Remark.warning("is cut off or damaged"),))


def page_of(*rows: Row) -> Image.Image:
    (page,) = pages(rows, len(rows), title="Pictures")
    return page


def num_pixels(page: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many pixels below the head are of a colour: the legend does not count."""
    return int((np.asarray(page)[166:] == colour).all(axis=2).sum())


def num_changed(first: Image.Image, second: Image.Image) -> int:
    assert first.size == second.size
    return int((np.asarray(first) != np.asarray(second)).any(axis=2).sum())


def test_pages_hold_twenty_four_rows_at_most() -> None:
    count = 2 * ROWS_PER_PAGE + 1

    drawn = list(pages([LEFT_OUT] * count, count, title="Pictures"))

    heights = [page.height for page in drawn]
    assert ROWS_PER_PAGE == 24
    assert len(drawn) == 3
    assert heights[0] == heights[1] > heights[2]
    assert {page.width for page in drawn} == {1600}


def test_pages_are_numbered() -> None:
    count = 2 * ROWS_PER_PAGE

    first, second = pages([LEFT_OUT] * count, count, title="Pictures")

    # Alike but for the number at the upper right.
    rows, columns = np.nonzero((np.asarray(first) != np.asarray(second)).any(axis=2))
    assert rows.size > 0
    assert rows.max() < 80
    assert columns.min() > 1400


def test_rows_are_taken_page_by_page() -> None:
    taken = []

    def rows() -> Iterator[Row]:
        for number in range(2 * ROWS_PER_PAGE):
            taken.append(number)
            yield LEFT_OUT

    drawn = pages(rows(), 2 * ROWS_PER_PAGE, title="Pictures")

    assert taken == []
    next(drawn)
    assert len(taken) == ROWS_PER_PAGE


def test_no_pictures_are_a_page_that_says_so() -> None:
    page = page_of()

    assert page.height > 166
    assert 0 < (np.asarray(page)[166:] != PAPER).any(axis=2).sum() < 3000


def test_faces_and_the_trained_crop_have_colours_of_their_own() -> None:
    plain = page_of(replace(ROW, crop_box=None))
    page = page_of(replace(ROW, faces=((177, 66, 96, 96), (10, 10, 60, 60))))

    assert [num_pixels(plain, colour) for colour in (MAIN_FACE, OTHER_FACE, CROP)] == [0, 0, 0]
    assert min(num_pixels(page, colour) for colour in (MAIN_FACE, OTHER_FACE, CROP)) > 100


def test_loss_weights_and_their_overlay_are_shown() -> None:
    alike = page_of(ROW)

    page = page_of(replace(ROW, weights=WEIGHTS))

    trained, weights, overlay = (
        np.asarray(page)[216:444, left : left + 228].astype(int) for left in (386, 640, 894)
    )
    np.testing.assert_array_equal(weights[100, :, 0], np.rint(WEIGHTS[100] * 255))
    np.testing.assert_array_equal(overlay[:, -1], trained[:, -1])
    assert overlay[:, 0].mean() < trained[:, 0].mean() / 2
    assert num_changed(alike, page) > 228 * 228


def test_the_mean_weight_is_written_below_the_weights() -> None:
    half = page_of(replace(ROW, weights=np.full((8, 8), 0.5, np.float32)))
    other = page_of(replace(ROW, weights=np.full((8, 8), 0.6, np.float32)))

    below = slice(216 + 229, 216 + 260)
    first, second = np.asarray(half)[below], np.asarray(other)[below]
    assert (first != second).any(axis=2).sum() > 5


def test_a_warning_has_a_coloured_sign_and_other_remarks_have_none() -> None:
    told = page_of(replace(ROW, remarks=(Remark.info("is turned upright"),)))
    warned = page_of(replace(ROW, remarks=(Remark.warning("shows no face"),)))

    assert num_pixels(told, AMBER) == 0
    assert num_pixels(warned, AMBER) > 50


def test_warnings_come_before_other_remarks() -> None:
    info, warning = Remark.info("is turned upright"), Remark.warning("shows no face")

    first = page_of(replace(ROW, remarks=(info, warning)))
    second = page_of(replace(ROW, remarks=(warning, info)))

    assert num_changed(first, second) == 0


def test_a_row_grows_with_what_is_said_of_the_picture() -> None:
    remarks = tuple(Remark.warning(f"is odd in its way number {n} " * 3) for n in range(8))

    assert page_of(replace(ROW, remarks=remarks)).height > page_of(ROW).height


def test_a_left_out_picture_is_a_narrow_row_with_its_reason_in_red() -> None:
    page = page_of(LEFT_OUT)

    assert num_pixels(page, RED) > 500
    assert page.height < page_of(ROW).height - 100
    with_thumbnail = page_of(replace(LEFT_OUT, source=thumbnail(WOMAN)))
    assert num_changed(page.resize(with_thumbnail.size), with_thumbnail) > 72 * 60


def test_a_restored_face_is_shown_before_and_after() -> None:
    before, after = Image.new("RGB", (80, 80), (9, 99, 9)), Image.new("RGB", (512, 512), (9, 9, 99))

    page = page_of(replace(ROW, restored=(before, after)))

    assert num_pixels(page, (9, 99, 9)) == num_pixels(page, (9, 9, 99)) == 150 * 150


@pytest.mark.parametrize(
    "text",
    [
        "中文 あいう \U0001f600\U0001f469\u200d\U0001f680",
        "עברית \u202egpj.exe",
        "bad\udc80name",
        "a\nb\0c",
        "x" * 1_000_000,
        "one two " * 100_000,
        "",
    ],
    ids=["other scripts", "right to left", "not Unicode", "control", "long", "many", "empty"],
)
def test_any_text_can_be_drawn(text: str) -> None:
    row = replace(
        ROW,
        name=text,
        caption=text,
        caption_origin=text,
        remarks=(Remark.info(text), Remark.warning(text)),
        facts=(text, text),
    )
    left_out = replace(row, crop=None)

    (page,) = pages([row, left_out], 2, title=text, subtitle=text)

    # Nothing reaches into the margin at the right.
    assert bool((np.asarray(page)[:, 1600 - 40 :] == PAPER).all())
    assert page.height < 65535 / ROWS_PER_PAGE


def test_a_very_long_picture_and_one_of_odd_weights_can_be_drawn() -> None:
    row = replace(
        ROW,
        source=Image.new("RGB", (3000, 2)),
        source_size=(2, 3000),
        faces=((0, 0, 1, 1),),
        crop_box=(10, 0, 2, 2),
        crop=Image.new("L", (2, 2)),
        weights=np.ones((3, 1), np.float32),
    )

    assert page_of(row).height > 166


def test_only_the_name_and_the_crop_are_needed() -> None:
    assert page_of(Row("a.jpg", crop=Image.new("RGB", (64, 64)))).height > 300


def test_a_page_is_a_jpeg_of_its_size_and_always_the_same_bytes() -> None:
    row = replace(ROW, weights=WEIGHTS, remarks=(Remark.warning("shows no face"),))

    first, second = (jpeg(page_of(row)) for _ in range(2))

    image = Image.open(BytesIO(first))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert (image.format, image.size) == ("JPEG", page_of(row).size)
    # Quality 90 has this first number in its table (3 * 2 / 10 of the standard's 16, rounded).
    assert image.quantization[0][0] == 3


def test_a_thumbnail_is_drawn_as_the_picture_itself_would_be() -> None:
    whole = page_of(replace(ROW, source=WOMAN))

    difference = np.asarray(whole).astype(int) - np.asarray(page_of(ROW)).astype(int)
    assert np.abs(difference).max() == 0
