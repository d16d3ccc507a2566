"""Text on pictures: one typeface, wrapped and cut to a width.

The letters are DejaVu's, which comes with matplotlib: Latin with its accents, Greek, Cyrillic and
more, the same on every machine. A letter that it lacks is drawn as a box. What is written is not
known here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import matplotlib
from PIL import ImageDraw, ImageFont

_ELLIPSIS = "…"
# Control characters, and those that only say how their neighbours are drawn: a file's name must
# not turn a line around.
_WITHOUT_A_SHAPE = ("Cc", "Cf")
_VARIATION_SELECTORS = {chr(code) for code in range(0xFE00, 0xFE10)}


@dataclass(frozen=True)
class Style:
    """How a text looks.

    Args:
        size: in pixels.
        colour: red, green and blue.
    """

    size: int
    colour: tuple[int, int, int]
    bold: bool = False

    @property
    def line_height(self) -> int:
        """Pixels from one line to the next."""
        return round(self.size * 1.42)

    def width(self, text: str) -> float:
        """Pixels that a line takes."""
        return _font(self.size, self.bold).getlength(text)

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str) -> None:
        """Draws one line whose upper left corner is at (x, y)."""
        left, top = place
        middle = top + self.line_height / 2
        draw.text((left, middle), text, self.colour, _font(self.size, self.bold), anchor="lm")


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    # The other layout engine needs a library that not every machine has.
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def one_line(text: str) -> str:
    """A text as one line of letters that have a shape; accents are joined to their letters."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    spaced = " ".join(whole.split())
    return "".join(letter for letter in unicodedata.normalize("NFC", spaced) if _has_shape(letter))


def _has_shape(letter: str) -> bool:
    return (
        unicodedata.category(letter) not in _WITHOUT_A_SHAPE and letter not in _VARIATION_SELECTORS
    )


def cut(text: str, style: Style, width: float) -> str:
    """A line no wider than so many pixels, with an ellipsis at its end where it was longer."""
    line = one_line(text)
    if _fits(line, style, width):
        return line
    return _longest_start(line, style, width - style.width(_ELLIPSIS)).rstrip() + _ELLIPSIS


def cut_in_the_middle(text: str, style: Style, width: float) -> str:
    """A line no wider than so many pixels that keeps its beginning and its end."""
    line = one_line(text)
    if _fits(line, style, width):
        return line
    half = (width - style.width(_ELLIPSIS)) / 2
    end = _longest_start(line[::-1], style, half)[::-1]
    return _longest_start(line, style, half) + _ELLIPSIS + end


def wrapped(text: str, style: Style, width: float, *, max_lines: int) -> tuple[str, ...]:
    """A text in lines no wider than so many pixels; an ellipsis ends it where lines are missing."""
    lines = tuple(islice(_lines(one_line(text), style, width), max_lines + 1))
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    return (*lines[: max_lines - 1], cut(f"{last} {lines[max_lines]}", style, width))


def _lines(text: str, style: Style, width: float) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if _fits(longer, style, width):
            line = longer
            continue
        if line:
            yield line
        line = word
        while not _fits(line, style, width):
            start = _longest_start(line, style, width) or line[0]
            yield start
            line = line[len(start) :]
    if line:
        yield line


def _longest_start(line: str, style: Style, width: float) -> str:
    """The longest beginning of a line that is no wider than so many pixels."""
    least, most = 0, min(len(line), int(width))
    while least < most:
        length = (least + most + 1) // 2
        if _fits(line[:length], style, width):
            least = length
        else:
            most = length - 1
    return line[:least]


def _fits(line: str, style: Style, width: float) -> bool:
    # A letter takes a pixel at least: an endless line is not measured.
    return len(line) <= width and style.width(line) <= width
