"""The contact sheet: what a training makes of each picture, drawn on pages.

Whoever looks at it should see at once what is trained, what counts, and what is odd. Only drawing:
where pages are kept and what made the pictures is not known here. Sizes are (height, width), boxes
(left, top, width, height).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

from PIL import Image, ImageDraw

from trainer.data.thumbnails import (
    CROP,
    MAIN_FACE,
    OTHER_FACE,
    PAPER,
    Box,
    Colour,
    dimmed,
    fitted,
    fitted_size,
    fitted_weights,
    grey,
    marked,
)
from trainer.images.crop import Mask, Size
from trainer.images.findings import Remark
from trainer.images.lettering import Style, cut, cut_in_the_middle, wrapped

ROWS_PER_PAGE = 24
QUALITY = 90

_PAGE_WIDTH = 1600
_HEAD_HEIGHT = 166
_MARGIN = 48
_GUTTER = 26
_CELL = 228
_SOURCE_WIDTH = 312
# What small pictures are fitted into: (height, width).
_SOURCE_ROOM = (_CELL, _SOURCE_WIDTH)
_CELL_ROOM = (_CELL, _CELL)
_LEFT_OUT_ROOM = (72, 72)
_FACE_ROOM = (150, 150)

_INK: Colour = (32, 35, 41)
_QUIET: Colour = (120, 124, 133)
_LINE: Colour = (226, 224, 219)
_PANEL: Colour = (243, 241, 237)
_ALARM: Colour = (196, 43, 28)
_AMBER: Colour = (201, 106, 0)
_PALE: Colour = (186, 189, 196)

_TITLE = Style(30, _INK, bold=True)
_SUBTITLE = Style(17, _QUIET)
_COLUMN = Style(14, _QUIET, bold=True)
_NAME = Style(18, _INK, bold=True)
_BODY = Style(16, _INK)
_ASIDE = Style(14, _QUIET)
_NOTE = Style(15, _INK)
_QUIET_NOTE = Style(15, _QUIET)
_REASON = Style(16, _ALARM)
_TAG = Style(13, (255, 255, 255), bold=True)
_LETTER = Style(12, (255, 255, 255), bold=True)

_COLUMN_NAMES = ("source", "trained", "loss weight", "overlay", "caption and notes")
_LEGEND = ((MAIN_FACE, "main face"), (OTHER_FACE, "other faces"), (CROP, "trained crop"))
# Bounded, for a JPEG cannot be higher than 65535 pixels.
_CAPTION_LINES = 6
_REMARK_LINES = 8
_NAME_LINE = 36
_SIGN_SIZE = 17
_NOTE_INDENT = 26


@dataclass(frozen=True)
class Row:
    """What is shown of one picture.

    Args:
        source: the upright picture, of any size; the sheet shows it small.
        source_size: of the upright picture, in whose pixels the boxes are.
        faces: the main face first.
        crop_box: what is trained of the picture.
        crop: what is trained, of any size. None: the picture is left out, and remarks say why.
        weights: (h, w) in [0, 1] over the crop. None: every pixel counts alike.
        restored: a face before and after it was redrawn.
        facts: short ones: `enlarged 1.3 times`.
    """

    name: str
    source: Image.Image | None = None
    source_size: Size | None = None
    faces: tuple[Box, ...] = ()
    crop_box: Box | None = None
    crop: Image.Image | None = None
    weights: Mask | None = None
    caption: str = ""
    caption_origin: str = ""
    remarks: tuple[Remark, ...] = ()
    restored: tuple[Image.Image, Image.Image] | None = None
    facts: tuple[str, ...] = ()


def pages(
    rows: Iterable[Row], count: int, *, title: str, subtitle: str = ""
) -> Iterator[Image.Image]:
    """Draws pictures in their order, so many on a page; one page says so where there are none.

    Args:
        rows: taken page by page, so that no more of them need be held at once.
        count: of the rows.
    """
    waiting = iter(rows)
    num_pages = max(1, -(-count // ROWS_PER_PAGE))
    for number in range(1, num_pages + 1):
        group = tuple(islice(waiting, ROWS_PER_PAGE))
        yield _page(group, title, subtitle, f"{number} of {num_pages}")


def jpeg(page: Image.Image) -> bytes:
    """A page as the content of a JPEG file."""
    content = BytesIO()
    # Colours keep their full resolution: thin lines and small letters would bleed.
    page.save(content, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return content.getvalue()


def thumbnail(image: Image.Image) -> Image.Image:
    """A picture as small as the sheet shows it: all that need be kept of it until then."""
    return fitted(image, _SOURCE_ROOM)


def _page(rows: Sequence[Row], title: str, subtitle: str, number: str) -> Image.Image:
    items = [_left_out(row) if row.crop is None else _Trained(row, row.crop) for row in rows]
    height = sum(item.height for item in items) if items else _CELL
    page = Image.new("RGB", (_PAGE_WIDTH, _HEAD_HEIGHT + height + _MARGIN), PAPER)
    _draw_head(page, title, subtitle, number)
    if not items:
        _SUBTITLE.write(ImageDraw.Draw(page), (_MARGIN, _HEAD_HEIGHT + _GUTTER), "no pictures")
    top = _HEAD_HEIGHT
    for position, item in enumerate(items):
        if position > 0:
            _rule(ImageDraw.Draw(page), top)
        item.draw(page, top)
        top += item.height
    return page


def _rule(draw: ImageDraw.ImageDraw, top: int) -> None:
    draw.line((_MARGIN, top, _PAGE_WIDTH - _MARGIN, top), _LINE, 1)


def _columns() -> tuple[int, ...]:
    """Where the columns begin."""
    widths = (_SOURCE_WIDTH, _CELL, _CELL, _CELL)
    lefts = [_MARGIN]
    for width in widths:
        lefts.append(lefts[-1] + width + _GUTTER)
    return tuple(lefts)


_LEFTS = _columns()
_NOTES_WIDTH = _PAGE_WIDTH - _MARGIN - _LEFTS[-1]


def _draw_head(page: Image.Image, title: str, subtitle: str, number: str) -> None:
    """What stands above the rows of a page."""
    draw = ImageDraw.Draw(page)
    right = _PAGE_WIDTH - _MARGIN
    number_left = right - _SUBTITLE.width(number)
    _TITLE.write(draw, (_MARGIN, 36), cut(title, _TITLE, number_left - _MARGIN - _GUTTER))
    _SUBTITLE.write(draw, (number_left, 46), number)
    legend_left = _draw_legend(draw, right)
    room = legend_left - _MARGIN - _GUTTER
    _SUBTITLE.write(draw, (_MARGIN, 82), cut(subtitle, _SUBTITLE, room))
    for left, name in zip(_LEFTS, _COLUMN_NAMES, strict=True):
        _COLUMN.write(draw, (left, 130), name)
    _rule(draw, _HEAD_HEIGHT - 8)


def _draw_legend(draw: ImageDraw.ImageDraw, right: float) -> float:
    """Draws what the colours of boxes mean, up to its right end; gives its left end."""
    for colour, name in reversed(_LEGEND):
        right -= _ASIDE.width(name)
        _ASIDE.write(draw, (right, 84), name)
        right -= 26
        draw.rectangle((right, 87, right + 16, 100), outline=colour, width=3)
        right -= _GUTTER
    return right + _GUTTER


@dataclass(frozen=True)
class _Trained:
    """A picture that is trained: four small pictures and what is said of them."""

    row: Row
    crop: Image.Image

    @property
    def height(self) -> int:
        tallest = fitted_size(self.crop, _CELL_ROOM)[0]
        if self.row.source is not None:
            tallest = max(tallest, fitted_size(self.row.source, _SOURCE_ROOM)[0])
        pictures = tallest + 5 + _ASIDE.line_height
        return 14 + _NAME_LINE + max(pictures, _notes_height(self.row)) + 18

    def draw(self, page: Image.Image, top: int) -> None:
        draw = ImageDraw.Draw(page)
        _headline(draw, self.row, top + 14)
        top += 14 + _NAME_LINE
        crop = fitted(self.crop, _CELL_ROOM)
        source = self.row.source
        if source is None:
            _empty(draw, (_LEFTS[0], top), "not shown", (crop.height, crop.width))
        else:
            _paste(page, _source(source, self.row), (_LEFTS[0], top), _size_of(self.row))
        _paste(page, crop, (_LEFTS[1], top), _share_of(self.row))
        size = crop.height, crop.width
        if self.row.weights is None:
            _empty(draw, (_LEFTS[2], top), "every pixel counts alike", size)
            _empty(draw, (_LEFTS[3], top), "as trained", size)
        else:
            weights = fitted_weights(self.row.weights, size)
            mean = float(self.row.weights.mean())
            _paste(page, grey(weights), (_LEFTS[2], top), f"mean {mean:.2f}")
            _paste(page, dimmed(crop, weights), (_LEFTS[3], top), "dark counts less")
        _draw_notes(page, self.row, top)


@dataclass(frozen=True)
class _LeftOut:
    """A picture that is not trained: its name and why."""

    row: Row
    reasons: tuple[str, ...]

    @property
    def height(self) -> int:
        text = _NAME_LINE + len(self.reasons) * _REASON.line_height
        return 16 + max(text, 0 if self.row.source is None else _LEFT_OUT_ROOM[0]) + 16

    def draw(self, page: Image.Image, top: int) -> None:
        draw = ImageDraw.Draw(page)
        left = _MARGIN
        if self.row.source is not None:
            _paste(page, fitted(self.row.source, _LEFT_OUT_ROOM), (left, top + 16), "")
            left += _LEFT_OUT_ROOM[1] + 18
        tag = "left out"
        width = round(_TAG.width(tag)) + 18
        draw.rounded_rectangle((left, top + 17, left + width, top + 40), 11, _ALARM)
        _TAG.write(draw, (left + 9, top + 19), tag)
        room = _PAGE_WIDTH - _MARGIN - left - width - 14
        name = cut_in_the_middle(self.row.name, _NAME, room)
        _NAME.write(draw, (left + width + 14, top + 16), name)
        for line, text in enumerate(self.reasons):
            _REASON.write(draw, (left, top + 16 + _NAME_LINE + line * _REASON.line_height), text)


def _left_out(row: Row) -> _LeftOut:
    room = _PAGE_WIDTH - 2 * _MARGIN - _LEFT_OUT_ROOM[1] - 18
    texts = [wrapped(remark.text, _REASON, room, max_lines=_REMARK_LINES) for remark in row.remarks]
    return _LeftOut(row, tuple(line for lines in texts for line in lines))


def _headline(draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
    """The picture's name at the left, facts about it behind."""
    room = _PAGE_WIDTH - 2 * _MARGIN
    name = cut_in_the_middle(row.name, _NAME, room * 0.6)
    _NAME.write(draw, (_MARGIN, top), name)
    left = _MARGIN + _NAME.width(name) + 20
    facts = cut(" · ".join(row.facts), _ASIDE, _PAGE_WIDTH - _MARGIN - left)
    _ASIDE.write(draw, (left, top + 4), facts)


def _source(source: Image.Image, row: Row) -> Image.Image:
    """The small picture with its boxes."""
    size = row.source_size or (source.height, source.width)
    return marked(source, size, _SOURCE_ROOM, faces=row.faces, crop_box=row.crop_box)


def _size_of(row: Row) -> str:
    if row.source_size is None:
        return ""
    height, width = row.source_size
    return f"{width}×{height} pixels"


def _share_of(row: Row) -> str:
    """How much of the picture is trained."""
    if row.source_size is None or row.crop_box is None:
        return ""
    share = row.crop_box[2] * row.crop_box[3] / (row.source_size[0] * row.source_size[1])
    return f"{min(share, 1):.0%} of the picture"


@dataclass(frozen=True)
class _Sign:
    """A white letter on a round ground."""

    letter: str
    colour: Colour

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[int, int]) -> None:
        left, top = place
        draw.ellipse((left, top, left + _SIGN_SIZE, top + _SIGN_SIZE), self.colour)
        indent = (_SIGN_SIZE + 1 - _LETTER.width(self.letter)) / 2
        _LETTER.write(draw, (left + indent, top + 0.5), self.letter)


# A remark's style and sign, by its kind.
_REMARK_LOOKS = {
    "warning": (_NOTE, _Sign("!", _AMBER)),
    "info": (_QUIET_NOTE, _Sign("i", _PALE)),
}


@dataclass(frozen=True)
class _Paragraph:
    """Lines of one style among the notes; the first may have a sign before it.

    Args:
        gap: pixels above it.
    """

    lines: tuple[str, ...]
    style: Style
    gap: int = 0
    sign: _Sign | None = None

    @property
    def height(self) -> int:
        return self.gap + len(self.lines) * self.style.line_height


def _paragraphs(row: Row) -> list[_Paragraph]:
    """The caption and the remarks, warnings first."""
    origin = f"caption: {row.caption_origin}" if row.caption_origin else "caption"
    found = [_Paragraph((cut(origin, _ASIDE, _NOTES_WIDTH),), _ASIDE)]
    if row.caption.strip():
        lines = wrapped(row.caption, _BODY, _NOTES_WIDTH, max_lines=_CAPTION_LINES)
        found.append(_Paragraph(lines, _BODY))
    else:
        found.append(_Paragraph(("empty",), _QUIET_NOTE))
    for remark in sorted(row.remarks, key=lambda remark: remark.kind != "warning"):
        style, sign = _REMARK_LOOKS[remark.kind]
        width = _NOTES_WIDTH - _NOTE_INDENT
        lines = wrapped(remark.text, style, width, max_lines=_REMARK_LINES)
        found.append(_Paragraph(lines, style, 7, sign))
    return found


def _notes_height(row: Row) -> int:
    faces = 0 if row.restored is None else 14 + _FACE_ROOM[0] + 5 + _ASIDE.line_height
    return sum(paragraph.height for paragraph in _paragraphs(row)) + faces


def _draw_notes(page: Image.Image, row: Row, top: int) -> None:
    draw = ImageDraw.Draw(page)
    left = _LEFTS[-1]
    for paragraph in _paragraphs(row):
        top += paragraph.gap
        indent = 0
        if paragraph.sign is not None:
            indent = _NOTE_INDENT
            paragraph.sign.draw(draw, (left, top + 2))
        for line in paragraph.lines:
            paragraph.style.write(draw, (left + indent, top), line)
            top += paragraph.style.line_height
    if row.restored is not None:
        for face, label in zip(row.restored, ("face before", "restored"), strict=True):
            _paste(page, fitted(face, _FACE_ROOM), (left, top + 14), label)
            left += _FACE_ROOM[1] + 16


def _paste(page: Image.Image, picture: Image.Image, place: tuple[int, int], label: str) -> None:
    """Puts a picture on the page, with a hairline around it and a label below."""
    left, top = place
    page.paste(picture, place)
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_LINE)
    if label:
        _ASIDE.write(draw, (left, top + picture.height + 5), label)


def _empty(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: Size) -> None:
    """An empty panel that says why there is no picture."""
    (left, top), (height, width) = place, size
    draw.rectangle((left - 1, top - 1, left + width, top + height), _PANEL, _LINE)
    lines = wrapped(text, _ASIDE, width - 16, max_lines=2)
    top += (height - len(lines) * _ASIDE.line_height) // 2
    for line in lines:
        _ASIDE.write(draw, (left + (width - _ASIDE.width(line)) / 2, top), line)
        top += _ASIDE.line_height
