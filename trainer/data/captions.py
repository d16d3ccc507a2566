"""Finds the caption of every picture: a captions file, a .txt beside it, or the instance prompt.

Captions are matched by path, and by base name only where that is unique; never by order. A
caption that the user wrote is never changed.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import PurePosixPath
from typing import Any, Literal

from trainer.config import DataConfig, Note
from trainer.data.archive import BadEntry, Source
from trainer.data.location import read_captions_file, shown_location
from trainer.errors import InputError, Problem

FIELD = "captions_file_url"

Origin = Literal["file", "txt", "instance_prompt"]

_EXAMPLE = '{"file_name": "a.jpg", "text": "a photograph of a TOK"}'
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SHOWN_NAMES = 10
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Caption:
    """A picture's caption and where it comes from."""

    text: str
    origin: Origin


@dataclass(frozen=True)
class _Row:
    """One caption of a captions file.

    Args:
        number: its place among the rows.
        line: the line it stands on, from 1.
        name: the picture's name as archives write it.
    """

    number: int
    line: int
    name: str
    text: str


def find_captions(
    source: Source, names: Sequence[str], data: DataConfig
) -> tuple[dict[str, Caption], list[Note]]:
    """The caption of every picture, and what the user should know of them.

    A captions file goes before a .txt file, and that before the instance prompt. An empty
    caption counts as none.

    Args:
        source: where .txt files are looked for.
        names: the pictures' names in the source.
        data: the section that names the captions file, its column and the instance prompt.

    Raises:
        InputError: the captions file is unusable, or a picture has no caption of its own and
            captions should be generated.
    """
    notes: list[Note] = []
    found: dict[str, Caption] = {}
    for name, text in _from_txt(source, names, notes).items():
        found[name] = Caption(text, "txt")
    if data.captions_file_url is not None:
        for name, text in _from_file(data, names, notes).items():
            found[name] = Caption(text, "file")
    without = [name for name in names if name not in found]
    if without and not data.skip_caption_generation:
        raise InputError.of(
            "skip_caption_generation",
            f"got false, and {len(without)} of {len(names)} pictures have no caption "
            f"({listed(without)}), but captioning is not available yet",
            "set `skip_caption_generation: true` or give captions",
        )
    if without and found:
        message = f"{len(without)} of {len(names)} pictures have no caption of their own and get "
        notes.append(_warning("instance_prompt", f"{message}this one: {listed(without)}"))
    prompt = Caption(data.instance_prompt, "instance_prompt")
    return {name: found.get(name, prompt) for name in names}, notes


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of them where there are many."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _warning(field: str, message: str) -> Note:
    return Note(kind="warning", field=field, message=message)


def _from_txt(source: Source, names: Sequence[str], notes: list[Note]) -> dict[str, str]:
    """Captions in `a.txt` or `a.jpg.txt` beside `a.jpg`, without surrounding white space."""
    texts = {
        PurePosixPath(entry.name).with_suffix("").as_posix(): entry.name
        for entry in source.entries()
        if entry.name.lower().endswith(".txt")
    }
    captions: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        stem = PurePosixPath(name).with_suffix("").as_posix()
        beside = texts.get(name) or texts.get(stem)
        if beside is None:
            continue
        used.add(beside)
        try:
            text = _decode(source.read(beside), beside, notes).strip()
        except BadEntry as error:
            notes.append(
                _warning("images_data_url", f"the caption `{beside}` is left out: {error}")
            )
            continue
        if text:
            captions[name] = text
        else:
            notes.append(_warning("images_data_url", f"the caption file `{beside}` is empty"))
    unused = sorted(set(texts.values()) - used)
    if unused:
        message = (
            f"no picture has the name of these text files, which are not used: {listed(unused)}"
        )
        notes.append(_warning("images_data_url", message))
    return captions


def _decode(content: bytes, name: str, notes: list[Note]) -> str:
    """UTF-8 or marked UTF-16 text; anything else is read as Windows-1252 and said."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, "replace")
    try:
        return content.decode()
    except UnicodeDecodeError:
        message = f"`{name}` is not UTF-8 and was read as Windows-1252; save it as UTF-8"
        notes.append(_warning("images_data_url", message))
        return content.decode("cp1252", "replace")


def _from_file(data: DataConfig, names: Sequence[str], notes: list[Note]) -> dict[str, str]:
    """Captions in the captions file by the names of the pictures they belong to."""
    assert data.captions_file_url is not None
    label = shown_location(data.captions_file_url)
    content = read_captions_file(data.captions_file_url)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError.of(
            FIELD, f"`{label}` is not UTF-8 (byte {error.start})", "save it as UTF-8"
        ) from error
    rows = _parse(text, data.caption_column, label)
    matched = _match(rows, names, label)
    used = {row.number for row in matched.values()}
    lost = [row.name for row in rows if row.number not in used]
    if not matched:
        raise InputError.of(
            FIELD,
            f"none of the {len(rows)} captions in `{label}` belongs to a picture; it names "
            f"{listed(lost)}, the pictures are {listed(names)}",
            "write the pictures' paths or file names as `file_name`",
        )
    if lost:
        message = f"{len(lost)} captions in `{label}` have no picture: {listed(lost)}"
        notes.append(_warning(FIELD, message))
    return {name: row.text for name, row in matched.items() if row.text.strip()}


def _parse(text: str, column: str, label: str) -> list[_Row]:
    """The rows of a captions file.

    Raises:
        InputError: not JSON lines, or a key is missing; names every such line.
    """
    if text.lstrip().startswith("["):
        raise InputError.of(
            FIELD, f"`{label}` is one JSON list", f"write one object per line: {_EXAMPLE}"
        )
    rows: list[_Row] = []
    problems: list[Problem] = []
    for line, content in enumerate(text.split("\n"), start=1):
        try:
            for value in _values(content):
                name, caption = _name_and_caption(value, column)
                rows.append(_Row(len(rows), line, name, caption))
        except JSONDecodeError as error:
            where = f"line {line}, column {error.colno} of `{label}`"
            message = f"{where} is not valid JSON ({error.msg})"
            problems.append(Problem(FIELD, message, f"write one object per line: {_EXAMPLE}"))
        except _BadRow as error:
            message = f"line {line} of `{label}` {error}"
            problems.append(Problem(error.field, message, error.hint))
    if problems:
        raise InputError(problems[:_SHOWN_PROBLEMS])
    if not rows:
        raise InputError.of(FIELD, f"`{label}` is empty", f"write one object per line: {_EXAMPLE}")
    return rows


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
        except RecursionError as error:
            raise JSONDecodeError("nested too deeply", line, position) from error
        yield value


class _BadRow(Exception):
    """A row without what it must have."""

    def __init__(self, message: str, *, field: str = FIELD, hint: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.hint = hint


def _name_and_caption(value: Any, column: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise _BadRow("is not an object", hint=f"write one object per line: {_EXAMPLE}")
    keys = ", ".join(sorted(value)) or "no keys"
    if "file_name" not in value:
        hint = "name the picture in `file_name`"
        raise _BadRow(f"has no `file_name` (it has: {keys})", hint=hint)
    if column not in value:
        raise _BadRow(
            f"has no `{column}` (it has: {keys})",
            field="caption_column",
            hint="set `caption_column` to the key of the captions",
        )
    name, caption = value["file_name"], value[column]
    if not isinstance(name, str):
        raise _BadRow(f"has the `file_name` {json.dumps(name)}; allowed: text")
    if not isinstance(caption, str | None):
        raise _BadRow(f"has the `{column}` {json.dumps(caption)}; allowed: text or null")
    path = PurePosixPath(name.replace("\\", "/")).as_posix()
    return unicodedata.normalize("NFC", path), caption or ""


def _match(rows: Sequence[_Row], names: Sequence[str], label: str) -> dict[str, _Row]:
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
        message = f"line {row.line} of `{label}` gives `{row.name}` a second caption"
        hint = f"keep that or the one on line {first.line}"
        problems.append(Problem(FIELD, message, hint))

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
            message = f"line {row.line} of `{label}`: `{row.name}` fits {listed(fits)}"
            problems.append(Problem(FIELD, message, "write the path inside the archive"))
        elif fits[0] in matched:
            second(row, matched[fits[0]])
        else:
            matched[fits[0]] = row
    if problems:
        raise InputError(problems[:_SHOWN_PROBLEMS])
    return exact | matched
