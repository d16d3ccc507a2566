"""Turns the user's pictures into `prepared/`: upright RGB files that cover the trained size.

Cropping and mirroring are drawn later, each time a picture is used. `prepared/prepared.json`
says what each file is; a second call with the same pictures decodes nothing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.config import DataConfig, Note
from trainer.data.archive import BadEntry, Source, open_source
from trainer.data.captions import Caption, Origin, find_captions, listed
from trainer.data.crop import Size, enlargement, resize_to_cover
from trainer.data.pictures import ACCEPTED, BadPicture, Picture, decode
from trainer.durable import disk_errors, write_bytes, write_text
from trainer.errors import InputError
from trainer.events import Event, NoteEvent, StageEvent

FIELD = "images_data_url"
INDEX = "prepared.json"
FORMAT_VERSION = 1
# The fal documentation asks for at least ten pictures.
FEW_PICTURES = 10
# A picture enlarged more than this teaches blur.
LARGEST_ENLARGEMENT = 2.0

# A file without a suffix may be a picture; HEIC is refused by name, not overlooked.
_PICTURE_SUFFIXES = frozenset(("", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"))
_PICTURE_SUFFIXES |= {".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
_TABLE_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".parquet"))
_TEXT_SUFFIXES = _TABLE_SUFFIXES | {".txt", ".md"}
_SHOWN_REASONS = 10


@dataclass(frozen=True)
class Example:
    """One training picture as it stands in the run folder.

    Args:
        number: from 0, in the order of the names.
        name: path inside the user's source.
        path: of the prepared file.
        sha256: of the source bytes.
        original_size: (height, width) upright, before resizing.
        size: (height, width) of the prepared file.
    """

    number: int
    name: str
    caption: str
    caption_origin: Origin
    path: Path
    sha256: str
    original_size: Size
    size: Size


@dataclass(frozen=True)
class PictureReport:
    """What `validate` says of one picture.

    Args:
        size: (height, width) upright, or nothing if it cannot be used.
        problem: why it cannot be used, or what is odd about it; empty if all is well.
    """

    name: str
    size: Size | None
    caption: str
    caption_origin: Origin
    problem: str


@dataclass(frozen=True)
class DataReport:
    """What `validate` says of the pictures and captions."""

    pictures: tuple[PictureReport, ...]
    notes: tuple[Note, ...]

    @property
    def num_usable(self) -> int:
        """Pictures that would be trained."""
        return sum(picture.size is not None for picture in self.pictures)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "num_usable": self.num_usable,
            "pictures": [asdict(picture) for picture in self.pictures],
            "notes": [note.model_dump() for note in self.notes],
        }


class _Prepared(BaseModel):
    """One line of `prepared.json`: an example, and how to know its file again.

    Args:
        file: name of the prepared file.
        sha256: of the source bytes.
        file_sha256: of the prepared file.
        remarks: what the user should know of this picture.
    """

    model_config = ConfigDict(frozen=True)
    number: int
    name: str
    caption: str
    caption_origin: Origin
    file: str
    sha256: str
    file_sha256: str
    original_size: Size
    size: Size
    remarks: tuple[str, ...]

    def example(self, folder: Path) -> Example:
        """The example as the data set takes it."""
        return Example(
            number=self.number,
            name=self.name,
            caption=self.caption,
            caption_origin=self.caption_origin,
            path=folder / self.file,
            sha256=self.sha256,
            original_size=self.original_size,
            size=self.size,
        )


class _Index(BaseModel):
    """`prepared.json`; `target` is the trained (height, width)."""

    model_config = ConfigDict(frozen=True)
    version: int = FORMAT_VERSION
    target: Size
    pictures: tuple[_Prepared, ...] = ()


def prepare(
    data: DataConfig, folder: Path, *, width: int, height: int
) -> Generator[Event, None, tuple[Example, ...]]:
    """Writes every usable picture into the folder and says what was left out and why.

    Args:
        data: where pictures and captions are.
        folder: made when missing; belongs to this function.
        width: trained width in pixels.
        height: trained height in pixels.

    Raises:
        InputError: pictures or captions cannot be used, or no picture is left.
        DiskError: the folder cannot be written.
    """
    earlier = _earlier_index(folder, (height, width))
    pictures: list[_Prepared] = []
    reasons: list[str] = []
    with open_source(data.images_data_url) as source:
        names, captions, notes = _names_and_captions(source, data)
        yield from _events(notes)
        for done, name in enumerate(names, start=1):
            try:
                content = source.read(name)
                picture = _prepare_one(content, len(pictures), earlier, folder)
            except (BadEntry, BadPicture) as error:
                reasons.append(f"`{name}`: {error}")
                yield from _events([_warning(f"`{name}` is left out: {error}")])
            else:
                caption = captions[name]
                update = {"name": name, "caption": caption.text, "caption_origin": caption.origin}
                pictures.append(picture.model_copy(update=update))
                yield from _events([_warning(f"`{name}` {remark}") for remark in picture.remarks])
            yield StageEvent("prepare", done, len(names))
    if not pictures:
        raise _none_left(reasons)
    yield from _events(_notes_on_the_set([(p.name, p.sha256) for p in pictures]))
    _publish_index(_Index(target=(height, width), pictures=tuple(pictures)), folder)
    return tuple(picture.example(folder) for picture in pictures)


def inspect(data: DataConfig) -> DataReport:
    """What `prepare` would find, without writing anything.

    Raises:
        InputError: pictures or captions cannot be used, or no picture is usable.
    """
    pictures: list[PictureReport] = []
    digests: list[tuple[str, str]] = []
    target = None
    if data.resolution_height is not None and data.resolution_width is not None:
        target = data.resolution_height, data.resolution_width
    with open_source(data.images_data_url) as source:
        names, captions, notes = _names_and_captions(source, data)
        for name in names:
            caption = captions[name]
            try:
                content = source.read(name)
                picture = decode(content)
            except (BadEntry, BadPicture) as error:
                report = PictureReport(name, None, caption.text, caption.origin, str(error))
            else:
                digests.append((name, _sha256(content)))
                problem = "; ".join(_remarks(picture, target))
                report = PictureReport(name, picture.size, caption.text, caption.origin, problem)
            pictures.append(report)
    if not digests:
        raise _none_left([f"`{picture.name}`: {picture.problem}" for picture in pictures])
    return DataReport(tuple(pictures), (*notes, *_notes_on_the_set(digests)))


def _names_and_captions(
    source: Source, data: DataConfig
) -> tuple[list[str], dict[str, Caption], list[Note]]:
    """The files that should be pictures, their captions, and what is left out of the source."""
    suffixes = {entry.name: PurePosixPath(entry.name).suffix.lower() for entry in source.entries()}
    names = [name for name, suffix in suffixes.items() if suffix in _PICTURE_SUFFIXES]
    notes = list(source.notes)
    if not names:
        raise InputError.of(
            FIELD,
            f"`{source.label}` holds {len(suffixes)} files but no picture",
            f"put pictures into it; accepted: {ACCEPTED}",
        )
    others = _PICTURE_SUFFIXES | _TEXT_SUFFIXES
    ignored = [name for name, suffix in suffixes.items() if suffix not in others]
    if ignored:
        notes.append(_warning(f"these files are not pictures and are left out: {listed(ignored)}"))
    tables = [name for name, suffix in suffixes.items() if suffix in _TABLE_SUFFIXES]
    if tables and data.captions_file_url is None:
        notes.append(
            Note(
                kind="warning",
                field="captions_file_url",
                message=f"{listed(tables)} among the pictures is not read; give the path of a "
                "JSON lines file here if it holds captions",
            )
        )
    captions, caption_notes = find_captions(source, names, data)
    return names, captions, [*notes, *caption_notes]


def _prepare_one(content: bytes, number: int, earlier: _Index, folder: Path) -> _Prepared:
    """The prepared file of one picture, written unless it is there already; not yet named.

    Raises:
        BadPicture: the picture cannot be used.
    """
    digest = _sha256(content)
    if number < len(earlier.pictures):
        known = earlier.pictures[number]
        if known.sha256 == digest and _is_intact(folder / known.file, known.file_sha256):
            return known
    picture = decode(content)
    resized = resize_to_cover(picture.image, earlier.target)
    encoded = BytesIO()
    # Level 1 is several times faster than the default and a tenth larger.
    resized.save(encoded, format="PNG", compress_level=1)
    file = f"{number:03d}.png"
    write_bytes(folder / file, encoded.getvalue())
    return _Prepared(
        number=number,
        name="",
        caption="",
        caption_origin="instance_prompt",
        file=file,
        sha256=digest,
        file_sha256=_sha256(encoded.getvalue()),
        original_size=picture.size,
        size=(resized.height, resized.width),
        remarks=_remarks(picture, earlier.target),
    )


def _remarks(picture: Picture, target: Size | None) -> tuple[str, ...]:
    if target is None or enlargement(picture.size, target) <= LARGEST_ENLARGEMENT:
        return picture.remarks
    height, width = picture.size
    times = enlargement(picture.size, target)
    small = f"({width}x{height}) is enlarged {times:.1f} times and teaches blur; use a larger one"
    return (*picture.remarks, small)


def _earlier_index(folder: Path, target: Size) -> _Index:
    """What an earlier call left in the folder for the same trained size, or an empty index."""
    empty = _Index(target=target)
    try:
        index = _Index.model_validate_json((folder / INDEX).read_bytes())
    except (OSError, ValidationError):
        return empty
    return index if (index.version, index.target) == (FORMAT_VERSION, target) else empty


def _publish_index(index: _Index, folder: Path) -> None:
    """Writes `prepared.json` last, and removes prepared files that no longer belong to the set."""
    content = index.model_dump_json(indent=2) + "\n"
    path = folder / INDEX
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)
    current = {picture.file for picture in index.pictures}
    with disk_errors(folder):
        for file in folder.glob("*.png"):
            if file.stem.isdecimal() and file.name not in current:
                file.unlink()


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path.read_bytes()) == sha256


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _notes_on_the_set(digests: Sequence[tuple[str, str]]) -> list[Note]:
    """Remarks on all usable pictures together, given as names and sha256."""
    notes = []
    if len(digests) < FEW_PICTURES:
        message = f"only {len(digests)} pictures; at least {FEW_PICTURES} are recommended"
        notes.append(_warning(message))
    first_with: dict[str, str] = {}
    for name, digest in digests:
        first = first_with.setdefault(digest, name)
        if first != name:
            notes.append(_warning(f"`{name}` is the same picture as `{first}` and counts twice"))
    return notes


def _none_left(reasons: Sequence[str]) -> InputError:
    shown = "; ".join(reasons[:_SHOWN_REASONS])
    more = len(reasons) - _SHOWN_REASONS
    return InputError.of(
        FIELD,
        f"no picture can be used: {shown}" + (f"; and {more} more" if more > 0 else ""),
        f"give pictures that open in an image viewer; accepted: {ACCEPTED}",
    )


def _warning(message: str) -> Note:
    return Note(kind="warning", field=FIELD, message=message)


def _events(notes: Sequence[Note]) -> Iterator[NoteEvent]:
    for note in notes:
        yield NoteEvent(note.kind, note.field, note.message)
