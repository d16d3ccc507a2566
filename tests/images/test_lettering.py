"""Text on pictures: every letter leaves a trace, no line is wider than its room."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trainer.images.lettering import Style, cut, cut_in_the_middle, one_line, wrapped

STYLE = Style(16, (0, 0, 0))


def ink(text: str) -> np.ndarray:
    """A line as it is drawn: dark is 1."""
    page = Image.new("L", (400, 40), 255)
    Style(16, 0).write(ImageDraw.Draw(page), (5, 5), text)
    return 1 - np.asarray(page, np.float32) / 255


@pytest.mark.parametrize("letter", "éüßçøłčńő€Ωж→×")
def test_letters_of_europe_are_drawn_as_themselves(letter: str) -> None:
    missing = ink("\U0010fffe")

    assert ink(letter).sum() > 5
    assert not np.array_equal(ink(letter), missing)


def test_an_accent_is_seen() -> None:
    assert not np.array_equal(ink("u"), ink("ü"))


@pytest.mark.parametrize("letter", "中あ한ไ\U0001f9d1")
def test_a_letter_that_the_typeface_lacks_is_a_box(letter: str) -> None:
    assert ink(letter).sum() > 5
    assert np.array_equal(ink(letter), ink("\U0010fffe"))


def test_an_accent_beside_its_letter_is_joined_to_it() -> None:
    assert one_line("u\u0308") == "ü"


def test_letters_without_a_shape_are_dropped_and_lines_joined() -> None:
    assert one_line("a\n\tb\u200d\ufe0f\u202ec\0") == "a bc"


def test_a_name_that_is_not_unicode_can_be_written() -> None:
    assert ink(one_line("bad\udc80name.jpg")).sum() > 5


def test_a_text_that_fits_stays_whole() -> None:
    assert cut("short", STYLE, 200) == "short"
    assert cut_in_the_middle("short", STYLE, 200) == "short"
    assert wrapped("short", STYLE, 200, max_lines=1) == ("short",)


def test_a_long_line_ends_in_an_ellipsis() -> None:
    line = cut("a photograph of a woman in a space suit", STYLE, 120)

    assert line.endswith("…")
    assert line.startswith("a photo")
    assert STYLE.width(line) <= 120


def test_a_long_name_keeps_its_beginning_and_its_end() -> None:
    line = cut_in_the_middle("holiday/a very long name indeed, number 7.jpg", STYLE, 200)

    assert line.startswith("holiday")
    assert line.endswith("7.jpg")
    assert STYLE.width(line) <= 200


def test_a_text_is_wrapped_at_its_words() -> None:
    text = "a photograph of a woman in an orange space suit before a flag"

    lines = wrapped(text, STYLE, 150, max_lines=9)

    assert " ".join(lines) == text
    assert len(lines) > 2
    assert max(STYLE.width(line) for line in lines) <= 150


def test_a_word_wider_than_the_line_is_broken() -> None:
    lines = wrapped("x" * 60, STYLE, 100, max_lines=9)

    assert "".join(lines) == "x" * 60
    assert max(STYLE.width(line) for line in lines) <= 100


def test_lines_beyond_the_last_are_told_by_an_ellipsis() -> None:
    lines = wrapped("one two three four five six seven " * 9, STYLE, 150, max_lines=3)

    assert len(lines) == 3
    assert lines[2].endswith("…")
    assert max(STYLE.width(line) for line in lines) <= 150


def test_an_endless_text_is_cut_like_a_long_one() -> None:
    long = "one two three four five six seven " * 99

    assert wrapped(long * 99, STYLE, 150, max_lines=3) == wrapped(long, STYLE, 150, max_lines=3)


def test_an_empty_text_has_no_lines() -> None:
    assert wrapped(" \n", STYLE, 150, max_lines=3) == ()
