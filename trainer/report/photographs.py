"""The photographs as they were trained: contact sheets, and what was noted about each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.markup import counted, folded, link, paragraph, section, table, words
from trainer.report.record import Record, read_json
from trainer.report.thumbnails import embedded, picture

MOST_SHEETS = 4
_SHEET = re.compile(r"contact_sheet_\d+\.jpg")
_SET = re.compile(r"(concept|class)_(\d+)")
_ROOM = (1200, 6000)
_QUALITY = 68
# How much a line of advice matters, in words.
_LEVELS = {"ok": "good", "look": "look at", "act": "mend"}

_Told = Mapping[str, Any]


def photographs(record: Record) -> str:
    """Every set of pictures that was prepared; nothing where none was."""
    sets = [
        (folder, told) for folder in _folders(record) if (told := read_json(folder / "report.json"))
    ]
    if not sets:
        return ""
    is_one = len(sets) == 1
    content = "".join(
        _set(record, folder, told, "" if is_one else _name(folder)) for folder, told in sets
    )
    return section("photographs", "The photographs", content)


def _folders(record: Record) -> list[Path]:
    """Folders of prepared sets: one of its own, or one for each concept and class."""
    place = record.folder.prepared
    inner = (
        [path for path in place.iterdir() if _SET.fullmatch(path.name)] if place.is_dir() else []
    )
    return [
        place,
        *sorted(inner, key=lambda path: (path.name[:2] != "co", len(path.name), path.name)),
    ]


def _name(folder: Path) -> str:
    found = _SET.fullmatch(folder.name)
    return f"{found[1].capitalize()} {found[2]}" if found else "Pictures"


def _set(record: Record, folder: Path, told: _Told, name: str) -> str:
    parts = [f"<h3>{escape(name)}</h3>" if name else "", _advice(told)]
    sheets = sorted(
        (path for path in folder.iterdir() if _SHEET.fullmatch(path.name)),
        key=lambda path: (len(path.name), path.name),
    )
    parts += _sheets(record, sheets)
    pictures = told.get("pictures", [])
    rows = [*map(_row, pictures), *map(_left_out, told.get("left_out", []))]
    has_remarks = any(each["remarks"] for each in pictures) or bool(told.get("left_out"))
    heads = ["picture", "size", "trained at", "caption", "noted"]
    summary = f"What was noted about {counted(len(rows), 'picture')}"
    listing = table(heads, rows, of="pictures and what was noted")
    parts.append(folded(summary, listing, is_open=has_remarks))
    return "".join(parts)


def _advice(told: _Told) -> str:
    lines = told.get("advice", {}).get("lines", [])
    if not lines:
        return ""
    rows = [
        (
            escape(line["topic"]),
            f'<span class="level {escape(line["level"])}">{_LEVELS.get(line["level"], "")}</span>',
            words(line["found"]),
            words(line["advice"]),
        )
        for line in lines
    ]
    return table(["the set", "", "found", "better is"], rows, of="advice on the pictures")


def _sheets(record: Record, sheets: Sequence[Path]) -> Iterator[str]:
    for number, path in enumerate(sheets[:MOST_SHEETS], start=1):
        address = embedded(path, room=_ROOM, quality=_QUALITY)
        if address is not None:
            alt = (
                f"Contact sheet, page {number} of {len(sheets)}: each picture with its caption, "
                "what of it is trained, and what counts"
            )
            place = path.relative_to(record.folder.root).as_posix()
            label = f"contact sheet, page {number}"
            yield (
                f'<div class="sheet" role="region" tabindex="0" aria-label="{label}">'
                f"{link(place, picture(address, alt))}</div>"
            )
    if len(sheets) > MOST_SHEETS:
        rest = len(sheets) - MOST_SHEETS
        yield paragraph(f"{counted(rest, 'more page')} of the contact sheet: in `prepared`.")


def _row(each: _Told) -> tuple[str, ...]:
    remarks = [words(remark["text"]) for remark in each["remarks"]]
    if each.get("mask"):
        remarks.append(f"mask: {escape(each['mask'])}")
    if each.get("faces"):
        remarks.append(counted(len(each["faces"]), "face"))
    remarks += map(escape, each.get("each_time", ()))
    return (
        escape(each["name"]),
        _size(each["size"]),
        _size(each["trained_size"]),
        escape(each["caption"]),
        "<br>".join(remarks),
    )


def _left_out(each: _Told) -> tuple[str, ...]:
    return escape(each["name"]), "", "left out", "", words(each["reason"])


def _size(size: Sequence[int]) -> str:
    height, width = size
    return f"{width}\N{MULTIPLICATION SIGN}{height}"
