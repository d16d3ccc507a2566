"""Reads files of captions: JSON lines that name pictures, and text files beside them.

Rows are matched to pictures by path, and by base name only where that is unique; never by order.
Which file goes before which other is not known here.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError, JSONDecoder
from pathlib import PurePosixPath
from typing import Any

from trainer.config import Note
from trainer.errors import InputError, Problem
from trainer.sources.archive import FIELD as PICTURES
from trainer.sources.archive import BadEntry, Source

FIELD = "captions_file_url"
# The second is what kohya's tools write unless told otherwise.
TEXT_SUFFIXES = (".txt", ".caption")

_EXAMPLE = '{"file_name": "a.jpg", "text": "a photograph of a TOK"}'
_ONE_PER_LINE = f"write one object per line: {_EXAMPLE}"
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SHOWN_NAMES = 10
_SHOWN_PROBLEMS = 20
_SHOWN_LETTERS = 40

# JSON can spell one half of a character that UTF-16 writes as two; no file can hold it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Table:
    """A file of JSON lines, each with the name of a picture and its caption.

    Args:
        label: what messages call it.
        column: key of the captions.
        folder: for a file among the pictures the folder that its names start from, empty for the
            source itself; nothing for a file that the user named.
    """

    label: str
    column: str
    folder: str | None = None

    @property
    def field(self) -> str:
        """The option at fault where the file cannot be used."""
        return FIELD if self.folder is None else PICTURES

    def problem(self, message: str, hint: str, *, field: str | None = None) -> Problem:
        """What is wrong with the file; one that nobody asked for can also be taken away."""
        if self.folder is not None:
            hint += f", or take `{self.label}` out of the pictures"
        return Problem(field or self.field, message, hint)

    def full_name(self, file_name: str) -> str:
        """The picture that a row means, as archives write it."""
        path = PurePosixPath(self.folder or "") / file_name.replace("\\", "/")
        return unicodedata.normalize("NFC", path.as_posix())


@dataclass(frozen=True)
class _Row:
    """One caption of a table.

    Args:
        number: its place among the rows.
        line: the line it stands on, from 1.
        name: the picture's name as archives write it.
    """

    number: int
    line: int
    name: str
    text: str


def read_table(
    content: bytes, table: Table, names: Sequence[str]
) -> tuple[dict[str, str], list[Note]]:
    """The captions of a table by the names of the pictures they belong to; empty ones are none.

    Args:
        names: of all pictures that it may speak of.

    Raises:
        InputError: the file is damaged, or no caption belongs to a picture.
    """
    encoding = _marked_encoding(content) or "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"`{table.label}` is not {encoding.upper()} (byte {error.start})"
        raise InputError([table.problem(message, "save it as UTF-8")]) from error
    rows, notes = _parse(text, table)
    matched = _match(rows, names, table)
    used = {row.number for row in matched.values()}
    lost = [row.name for row in rows if row.number not in used]
    if not matched:
        pictures = f"the pictures are {listed(names)}" if names else "no picture lies beside it"
        message = f"none of the {len(rows)} captions in `{table.label}` belongs to a picture; "
        message += f"it names {listed(lost)}, {pictures}"
        hint = "write the pictures' paths or file names as `file_name`"
        raise InputError([table.problem(message, hint)])
    if lost:
        message = f"{len(lost)} captions in `{table.label}` have no picture: {listed(lost)}"
        notes.append(_warning(table.field, message))
    return {name: row.text for name, row in matched.items() if row.text.strip()}, notes


def read_texts(source: Source, names: Sequence[str]) -> tuple[dict[str, str], list[Note]]:
    """Captions in `a.txt` or `a.jpg.txt` beside `a.jpg`, without surrounding white space."""
    texts = [e.name for e in source.entries() if e.name.lower().endswith(TEXT_SUFFIXES)]
    # Of two beside one picture, the later in this order is taken.
    files = {
        _stem(name): name
        for suffix in reversed(TEXT_SUFFIXES)
        for name in texts
        if name.lower().endswith(suffix)
    }
    captions: dict[str, str] = {}
    notes: list[Note] = []
    used: set[str] = set()
    for name in names:
        beside = files.get(name) or files.get(_stem(name))
        if beside is None:
            continue
        used.add(beside)
        text, note = _read_text(source, beside)
        if text:
            captions[name] = text
        if note is not None and note not in notes:
            notes.append(note)
    unused = sorted(set(texts) - used)
    if unused:
        message = f"these text files are no picture's caption and are not used: {listed(unused)}"
        notes.append(_warning(PICTURES, message))
    return captions, notes


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of them where there are many."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _warning(field: str, message: str) -> Note:
    return Note(kind="warning", field=field, message=message)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _marked_encoding(content: bytes) -> str | None:
    """The encoding that a byte order mark tells."""
    return next((e for mark, e in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)


def _read_text(source: Source, name: str) -> tuple[str, Note | None]:
    """A text file's caption, empty where there is none, and what is odd about it."""
    try:
        content = source.read(name)
    except BadEntry as error:
        return "", _warning(PICTURES, f"the caption `{name}` is left out: {error}")
    text, is_guessed = _decoded(content)
    if not text.strip():
        return "", _warning(PICTURES, f"the caption file `{name}` is empty")
    message = f"`{name}` is not UTF-8 and was read as Windows-1252; save it as UTF-8"
    return text.strip(), _warning(PICTURES, message) if is_guessed else None


def _decoded(content: bytes) -> tuple[str, bool]:
    """UTF-8 or marked UTF-16 text; anything else as Windows-1252, and that this is a guess."""
    marked = _marked_encoding(content)
    if marked is not None:
        return content.decode(marked, "replace"), False
    try:
        return content.decode(), False
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace"), True


def _parse(text: str, table: Table) -> tuple[list[_Row], list[Note]]:
    """The rows of a table, and what is odd about their lines.

    Raises:
        InputError: not JSON lines, or a key is missing; names every such line, and of those that
            lack the same the first.
    """
    if text.lstrip().startswith("["):
        message = f"`{table.label}` is one JSON list"
        raise InputError([table.problem(message, _ONE_PER_LINE)])
    rows: list[_Row] = []
    problems: dict[str, list[Problem]] = {}
    for line, content in enumerate(text.split("\n"), start=1):
        try:
            for value in _values(content):
                name, caption = _name_and_caption(value, table.column)
                rows.append(_Row(len(rows), line, table.full_name(name), caption))
        except JSONDecodeError as error:
            message = f"line {line}, column {error.colno} of `{table.label}` is not valid JSON "
            message += f"({error.msg})"
            # Damaged objects are damaged each in its place; all lines of a CSV file are alike.
            alike = message
            if not content.lstrip().startswith("{"):
                alike, message = "no object", f"{message}: `{content.strip()[:_SHOWN_LETTERS]}`"
            problems.setdefault(alike, []).append(table.problem(message, _ONE_PER_LINE))
        except _BadRow as error:
            message = f"line {line} of `{table.label}` {error}"
            problem = table.problem(message, error.hint, field=error.field)
            problems.setdefault(str(error), []).append(problem)
    if problems:
        raise InputError([_together(alike) for alike in problems.values()][:_SHOWN_PROBLEMS])
    if not rows:
        raise InputError([table.problem(f"`{table.label}` is empty", _ONE_PER_LINE)])
    rows, notes = _without_halves(rows, table)
    return rows, notes + _notes_on_lines(rows, table)


def _together(alike: Sequence[Problem]) -> Problem:
    """The first of the problems that lines share, and how many more there are."""
    more = len(alike) - 1
    likewise = f"; {more} more line{'s' if more > 1 else ''} likewise" if more else ""
    return replace(alike[0], message=alike[0].message + likewise)


def _without_halves(rows: Sequence[_Row], table: Table) -> tuple[list[_Row], list[Note]]:
    """The rows with a mark in place of halves of characters, and that there were some."""
    halves = [row.line for row in rows if _HALF_CHARACTER.search(row.name + row.text)]
    if not halves:
        return list(rows), []
    whole = [replace(row, name=_whole(row.name), text=_whole(row.text)) for row in rows]
    more = f" and {len(halves) - 1} more" if len(halves) > 1 else ""
    message = f"line {halves[0]}{more} of `{table.label}` holds half a character (`\\ud800` to "
    message += f"`\\udfff` alone), which is read as `{_REPLACEMENT}`; write the character itself"
    return whole, [_warning(table.field, message)]


def _whole(text: str) -> str:
    return _HALF_CHARACTER.sub(_REPLACEMENT, text)


def _notes_on_lines(rows: Sequence[_Row], table: Table) -> list[Note]:
    """That other programs would not read several objects on one line."""
    objects = Counter(row.line for row in rows)
    crowded = next((line for line, count in objects.items() if count > 1), None)
    if crowded is None:
        return []
    message = f"line {crowded} of `{table.label}` holds {objects[crowded]} objects; they are read, "
    return [_warning(table.field, f"{message}but put each on its own line for other programs")]


def _values(line: str) -> Iterator[Any]:
    """The JSON values on one line; the fal documentation prints several on one."""
    decoder = JSONDecoder()
    position = 0
    while position < len(line):
        if line[position].isspace():
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(line, position)
        except JSONDecodeError:
            raise
        except (RecursionError, ValueError) as error:
            is_deep = isinstance(error, RecursionError)
            reason = "nested too deeply" if is_deep else "a number has too many digits"
            raise JSONDecodeError(reason, line, position) from error
        yield value


class _BadRow(Exception):
    """A row without what it must have."""

    def __init__(self, message: str, hint: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.field = field


def _name_and_caption(value: Any, column: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise _BadRow("is not an object", _ONE_PER_LINE)
    keys = _whole(", ".join(sorted(value))) or "no keys"
    if "file_name" not in value:
        raise _BadRow(f"has no `file_name` (it has: {keys})", "name the picture in `file_name`")
    if column not in value:
        raise _BadRow(
            f"has no `{column}` (it has: {keys})",
            "set `caption_column` to the key of the captions",
            field="caption_column",
        )
    name, caption = value["file_name"], value[column]
    if not isinstance(name, str):
        message = f"has the `file_name` {json.dumps(name)}; allowed: text"
        raise _BadRow(message, "name the picture in `file_name`")
    if not isinstance(caption, str | None):
        message = f"has the `{column}` {json.dumps(caption)}; allowed: text or null"
        raise _BadRow(message, f"write the caption as text in `{column}`")
    return name, caption or ""


def _match(rows: Sequence[_Row], names: Sequence[str], table: Table) -> dict[str, _Row]:
    """The row of each picture that has one: by path, else by a base name that fits once.

    Raises:
        InputError: two rows for one picture, or a row that fits several; names every such line.
    """
    problems: list[Problem] = []
    matched: dict[str, _Row] = {}
    seen: dict[str, _Row] = {}
    by_base: dict[str, list[str]] = {}
    for name in names:
        by_base.setdefault(PurePosixPath(name).name, []).append(name)

    def second(row: _Row, first: _Row) -> None:
        message = f"line {row.line} of `{table.label}` gives `{row.name}` a second caption"
        problems.append(table.problem(message, f"keep that or the one on line {first.line}"))

    for row in rows:
        if row.name in seen:
            second(row, seen[row.name])
        seen.setdefault(row.name, row)
    exact = {name: seen[name] for name in names if name in seen}
    for row in seen.values():
        fits = by_base.get(PurePosixPath(row.name).name, [])
        if row.name in exact or not set(fits) - set(exact):
            continue
        if len(fits) > 1:
            message = f"line {row.line} of `{table.label}`: `{row.name}` fits {listed(fits)}"
            problems.append(table.problem(message, "write the path inside the archive"))
        elif fits[0] in matched:
            second(row, matched[fits[0]])
        else:
            matched[fits[0]] = row
    if problems:
        raise InputError(problems[:_SHOWN_PROBLEMS])
    return exact | matched
