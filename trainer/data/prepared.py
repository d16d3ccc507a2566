"""What a folder of prepared pictures holds: `prepared.json`, the files that it names, examples.

How pictures and masks are made is not known here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data.captions import Origin
from trainer.data.crop import Size
from trainer.data.masks import MaskOrigin
from trainer.durable import disk_errors, write_text

INDEX = "prepared.json"
FORMAT_VERSION = 2

_OWN_FILES = re.compile(r"\d+(\.mask)?\.(png|npy)")


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
        mask_path: a .npy file of float32 (h, w) in [0, 1], as large as the prepared file; nothing
            where the whole picture counts.
        mask_sha256: of that file.
        is_class: whether it is a picture of the class, not of the subject.
    """

    number: int
    name: str
    caption: str
    caption_origin: Origin
    path: Path
    sha256: str
    original_size: Size
    size: Size
    mask_path: Path | None = None
    mask_sha256: str = ""
    is_class: bool = False


class PreparedMask(BaseModel):
    """A mask in `prepared.json`.

    Args:
        origin: what it is made of.
        file: its name; empty where every weight is 1.
        sha256: of that file.
        view: name of a picture of it, to look at; nothing reads it.
        remarks: what the user should know of it.
    """

    model_config = ConfigDict(frozen=True)
    origin: MaskOrigin
    file: str = ""
    sha256: str = ""
    view: str = ""
    remarks: tuple[str, ...] = ()

    def is_intact(self, folder: Path) -> bool:
        """Whether its file, if it has one, is there with the content it had."""
        return not self.file or _is_intact(folder / self.file, self.sha256)


class Prepared(BaseModel):
    """One line of `prepared.json`: an example, and how to know its files again.

    Args:
        file: name of the prepared file.
        sha256: of the source bytes.
        file_sha256: of the prepared file.
        has_alpha: whether a pixel of the source is not opaque.
        remarks: what the user should know of this picture.
        mask: nothing where the whole picture counts.
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
    has_alpha: bool
    remarks: tuple[str, ...]
    mask: PreparedMask | None = None

    def all_remarks(self) -> tuple[str, ...]:
        """What the user should know of the picture and its mask."""
        return (*self.remarks, *(self.mask.remarks if self.mask else ()))

    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        return (self.file, *((self.mask.file, self.mask.view) if self.mask else ()))

    def example(self, folder: Path, *, is_class: bool) -> Example:
        """The example as the data set takes it."""
        mask = self.mask
        return Example(
            number=self.number,
            name=self.name,
            caption=self.caption,
            caption_origin=self.caption_origin,
            path=folder / self.file,
            sha256=self.sha256,
            original_size=self.original_size,
            size=self.size,
            mask_path=folder / mask.file if mask and mask.file else None,
            mask_sha256=mask.sha256 if mask else "",
            is_class=is_class,
        )


class Index(BaseModel):
    """`prepared.json`; `target` is the trained (height, width)."""

    model_config = ConfigDict(frozen=True)
    version: int = FORMAT_VERSION
    target: Size
    pictures: tuple[Prepared, ...] = ()

    def known(self, number: int, sha256: str, folder: Path) -> Prepared | None:
        """The picture of this number, if it was made of the same bytes and lies there whole."""
        if number >= len(self.pictures):
            return None
        picture = self.pictures[number]
        same = picture.sha256 == sha256 and _is_intact(folder / picture.file, picture.file_sha256)
        return picture if same else None


def earlier_index(folder: Path, target: Size) -> Index:
    """What an earlier call left in the folder for the same trained size, or an empty index."""
    empty = Index(target=target)
    try:
        index = Index.model_validate_json((folder / INDEX).read_bytes())
    except (OSError, ValidationError):
        return empty
    return index if (index.version, index.target) == (FORMAT_VERSION, target) else empty


def publish_index(index: Index, folder: Path) -> None:
    """Writes `prepared.json` last, and removes prepared files that no longer belong to the set."""
    content = index.model_dump_json(indent=2) + "\n"
    path = folder / INDEX
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)
    current = {file for picture in index.pictures for file in picture.files()}
    with disk_errors(folder):
        for file in folder.iterdir():
            if _OWN_FILES.fullmatch(file.name) and file.name not in current:
                file.unlink()


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path.read_bytes()) == sha256


def sha256_of(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
