"""What a run folder shows: events as they come, prepared pictures, previews, the report.

Reads files that a job wrote, which may be cut short or of another version: what does not have the
expected shape is left out. A path of a request leads to pictures inside the run folder alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.job import RunFolder
from trainer.server.own.messages import Note, Prepared, PreparedPicture, PreparedSet

_MOST_EVENT_BYTES = 2**18
_PLACE = re.compile(r"(\d{1,20})-(\d{1,20})")
_PICTURE = re.compile(r"(?:prepared|samples|pictures)(?:/[A-Za-z0-9][A-Za-z0-9._ -]*)+")
_CONTENT_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
# Of the preparation, see `trainer.data`, which this room does not look into.
_REPORT, _INDEX, _SHEET = "report.json", "prepared.json", re.compile(r"contact_sheet_\d+\.jpg")


@dataclass(frozen=True)
class Said:
    """What a log says from a place on.

    Args:
        next: the place after it.
        restarted: whether it begins anew, since the log was written anew.
        more: whether there is more already.
    """

    events: list[dict[str, Any]]
    next: str
    restarted: bool
    more: bool


def said_since(log: Path, place: str) -> Said:
    """The events in a log from a place on, some at a time.

    Args:
        log: which need not be there yet.
        place: `next` of an earlier answer; anything else is the beginning.
    """
    found = _PLACE.fullmatch(place)
    try:
        with open(log, "rb") as file:
            state = log.stat()
            goes_on = found is not None and int(found[1]) == state.st_ino
            start = int(found[2]) if found is not None and goes_on else 0
            if start > state.st_size:
                goes_on, start = False, 0
            file.seek(start)
            whole = file.read(_MOST_EVENT_BYTES).rpartition(b"\n")[0]
    except FileNotFoundError:
        return Said([], "", restarted=True, more=False)
    end = start + len(whole) + 1 if whole else start
    more = bool(whole) and end < state.st_size
    return Said(list(_events(whole)), f"{state.st_ino}-{end}", not goes_on, more)


def picture_in(run: RunFolder, path: str) -> tuple[Path, str] | None:
    """A picture of a run folder and its MIME type; nothing where the path leads to none."""
    kind = _CONTENT_TYPES.get(Path(path).suffix.lower())
    if kind is None or _PICTURE.fullmatch(path) is None:
        return None
    root, file = run.root.resolve(), (run.root / path).resolve()
    return (file, kind) if file.is_relative_to(root) and file.is_file() else None


def sampled(run: RunFolder) -> dict[str, Any] | None:
    """What `trainer sample` says of the pictures that it left."""
    return _mapping(run.pictures / "pictures.json")


def has_prepared(run: RunFolder) -> bool:
    """Whether pictures were prepared."""
    return next(_reports(run), None) is not None


def prepared(run: RunFolder) -> Prepared:
    """What the preparation left, each set with where its small pictures lie."""
    return Prepared(sets=[found for folder in _reports(run) if (found := _set(folder, run))])


class _Report(BaseModel):
    """`report.json`, as far as it is shown."""

    model_config = ConfigDict(extra="ignore")
    advice: dict[str, Any]
    notes: list[Note] = []
    pictures: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []


def _events(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def _reports(run: RunFolder) -> Iterator[Path]:
    """The folders of all sets that have a report."""
    folders = [run.prepared, *sorted(path for path in run.prepared.glob("*") if path.is_dir())]
    yield from (folder for folder in folders if (folder / _REPORT).is_file())


def _set(folder: Path, run: RunFolder) -> PreparedSet | None:
    files = {
        picture.get("name"): picture
        for picture in (_mapping(folder / _INDEX) or {}).get("pictures", ())
        if isinstance(picture, dict)
    }
    place = folder.relative_to(run.root).as_posix()
    try:
        report = _Report.model_validate(_mapping(folder / _REPORT))
        return PreparedSet(
            name="" if folder == run.prepared else folder.name,
            level=report.advice.get("level", "ok"),
            advice=report.advice.get("lines", []),
            notes=report.notes,
            pictures=[
                _picture(picture, files.get(picture.get("name"), {}), place)
                for picture in report.pictures
            ],
            left_out=report.left_out,
            sheets=[
                f"{place}/{path.name}"
                for path in sorted(folder.iterdir(), key=lambda p: (len(p.name), p.name))
                if _SHEET.fullmatch(path.name)
            ],
        )
    except ValidationError:
        return None


def _picture(told: Mapping[str, Any], files: Mapping[str, Any], place: str) -> PreparedPicture:
    mask = files.get("mask") or {}
    return PreparedPicture.model_validate(
        {
            **{n: told[n] for n in PreparedPicture.model_fields if n in told},
            "thumbnail": _below(place, files.get("thumbnail")),
            "mask_view": _below(place, mask.get("view")),
        }
    )


def _below(place: str, name: str | None) -> str | None:
    return f"{place}/{name}" if name else None


def _mapping(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
