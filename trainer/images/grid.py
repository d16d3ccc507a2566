"""Pictures side by side: a row for each prompt, a column for each way to make them, all labelled.

Only drawing: pictures and labels in, one picture out. Small pictures are enlarged so that their
pixels are seen, large ones shrunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from trainer.images.lettering import Style, cut, wrapped

# The longer side of a picture in the grid is at least and at most this long, in pixels.
SMALLEST, LARGEST = 160, 512

_MARGIN = 40
_GUTTER = 18
_LABELS_WIDTH = 236
_LABELS_GAP = 28
_HEAD_GAP = 14
_CAPTION_GAP = 6
# Of a line before its capitals, which then stand level with the pictures.
_ABOVE_LETTERS = 5
_NAME_LINES = 2
_TEXT_LINES = 10
_COLUMN_LINES = 2

_PAPER = (252, 251, 249)
_INK = (32, 35, 41)
_QUIET = (120, 124, 133)
_LINE = (226, 224, 219)
_PANEL = (243, 241, 237)

_TITLE = Style(28, _INK, bold=True)
_SUBTITLE = Style(16, _QUIET)
_COLUMN = Style(18, _INK, bold=True)
_NAME = Style(18, _INK, bold=True)
_TEXT = Style(15, _QUIET)
_CAPTION = Style(15, _INK)


@dataclass(frozen=True)
class Tile:
    """One place of the grid.

    Args:
        picture: of any size. None: the place says that there is none.
        caption: what stands under it.
    """

    picture: Image.Image | None
    caption: str = ""


@dataclass(frozen=True)
class GridRow:
    """One row.

    Args:
        name: what stands before it.
        tiles: one for each column.
        text: more about it, in small letters.
    """

    name: str
    tiles: Sequence[Tile]
    text: str = ""


def grid(
    columns: Sequence[str], rows: Sequence[GridRow], *, title: str = "", subtitle: str = ""
) -> Image.Image:
    """Draws rows of pictures under the names of their columns.

    Args:
        columns: their names, wrapped or cut to the width of the pictures below.
        rows: each with a tile for every column.
        title: above it all; nothing where it is empty.
        subtitle: under the title.
    """
    assert all(len(row.tiles) == len(columns) for row in rows)
    shown = [
        GridRow(row.name, [Tile(_reduced(t.picture), t.caption) for t in row.tiles], row.text)
        for row in rows
    ]
    cell = _cell_of(shown)
    head = _Head(columns, cell[0], title, subtitle)
    heights = [_row_height(row, cell) for row in shown]
    lefts = [_left_of(column, cell[0]) for column in range(len(columns))]
    width = _left_of(len(columns), cell[0]) - _GUTTER + _MARGIN
    height = head.height + sum(heights) + _GUTTER * max(0, len(rows) - 1) + _MARGIN
    page = Image.new("RGB", (width, height), _PAPER)
    head.draw(page, lefts)
    top = head.height
    for row, row_height in zip(shown, heights, strict=True):
        _draw_row(page, row, lefts, top, cell)
        top += row_height + _GUTTER
    return page


def tile_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that a picture of this size has in a grid.

    A small one is enlarged by a whole number.
    """
    longer = max(size)
    if longer < SMALLEST:
        times = -(-SMALLEST // longer)
        return size[0] * times, size[1] * times
    share = min(1.0, LARGEST / longer)
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def tile_picture(picture: Image.Image) -> Image.Image:
    """A picture in RGB as a grid shows it: all that need be kept of it until then."""
    size = tile_size(picture.size)
    larger = size[0] > picture.width
    kind = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    whole = picture.convert("RGB")
    return whole if size == picture.size else whole.resize(size, kind)


def _reduced(picture: Image.Image | None) -> Image.Image | None:
    return None if picture is None else tile_picture(picture)


def _cell_of(rows: Sequence[GridRow]) -> tuple[int, int]:
    """The (width, height) that every picture fits into."""
    sizes = [t.picture.size for row in rows for t in row.tiles if t.picture is not None]
    widths, heights = zip(*sizes, strict=True) if sizes else ((SMALLEST,), (SMALLEST,))
    return max(*widths, 96), max(heights)


def _left_of(column: int, cell_width: int) -> int:
    return _MARGIN + _LABELS_WIDTH + _LABELS_GAP + column * (cell_width + _GUTTER)


class _Head:
    """What stands above the rows: the title, and the columns' names on one base line."""

    def __init__(self, columns: Sequence[str], width: int, title: str, subtitle: str) -> None:
        self._title = title
        self._subtitle = subtitle
        self._names = [wrapped(name, _COLUMN, width, max_lines=_COLUMN_LINES) for name in columns]
        lines = max((len(name) for name in self._names), default=0)
        self._names_height = lines * _COLUMN.line_height
        titles = (_TITLE.line_height if title else 0) + (_SUBTITLE.line_height if subtitle else 0)
        self._names_top = _MARGIN + titles + (_GUTTER if titles else 0)
        self.height = self._names_top + self._names_height + _HEAD_GAP

    def draw(self, page: Image.Image, lefts: Sequence[int]) -> None:
        draw = ImageDraw.Draw(page)
        room = page.width - 2 * _MARGIN
        top = _MARGIN
        for text, style in ((self._title, _TITLE), (self._subtitle, _SUBTITLE)):
            if text:
                style.write(draw, (_MARGIN, top), cut(text, style, room))
                top += style.line_height
        bottom = self._names_top + self._names_height
        for lines, left in zip(self._names, lefts, strict=True):
            for place, line in enumerate(lines):
                above = (len(lines) - place) * _COLUMN.line_height
                _COLUMN.write(draw, (left, bottom - above), line)
        draw.line((_MARGIN, bottom + 5, page.width - _MARGIN, bottom + 5), _LINE, 1)


def _labels(row: GridRow, room: int) -> list[tuple[Style, str]]:
    """The lines before a row: its name, and of its text what has room beside the pictures."""
    name = wrapped(row.name, _NAME, _LABELS_WIDTH, max_lines=_NAME_LINES)
    left = room - len(name) * _NAME.line_height
    most = max(2, min(_TEXT_LINES, left // _TEXT.line_height))
    text = wrapped(row.text, _TEXT, _LABELS_WIDTH, max_lines=most) if row.text else ()
    return [*((_NAME, line) for line in name), *((_TEXT, line) for line in text)]


def _row_height(row: GridRow, cell: tuple[int, int]) -> int:
    has_captions = any(t.caption for t in row.tiles)
    pictures = cell[1] + (_CAPTION_GAP + _CAPTION.line_height if has_captions else 0)
    labels = sum(style.line_height for style, _ in _labels(row, cell[1]))
    return max(pictures, labels)


def _draw_row(
    page: Image.Image, row: GridRow, lefts: Sequence[int], top: int, cell: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(page)
    line_top = top - _ABOVE_LETTERS
    for style, line in _labels(row, cell[1]):
        style.write(draw, (_MARGIN, line_top), line)
        line_top += style.line_height
    for each, left in zip(row.tiles, lefts, strict=True):
        bottom = top + cell[1]
        if each.picture is None:
            box = (left, top, left + cell[0] - 1, bottom - 1)
            draw.rectangle(box, _PANEL, _LINE)
            middle = (cell[0] - _TEXT.width("none")) / 2, (cell[1] - _TEXT.line_height) / 2
            _TEXT.write(draw, (left + middle[0], top + middle[1]), "none")
        else:
            page.paste(each.picture, (left, top))
            bottom = top + each.picture.height
        caption = cut(each.caption, _CAPTION, cell[0])
        _CAPTION.write(draw, (left, bottom + _CAPTION_GAP), caption)
