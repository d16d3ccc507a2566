"""The files that the user gave, by name: in a folder, an archive, or alone, wherever they lie.

Names are checked, files and bytes are counted, and nothing is written to the user's folder. What
an entry means, and how archives are packed, is not known here.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from trainer.config import Note
from trainer.errors import InputError
from trainer.folder_names import PICTURE_SUFFIXES
from trainer.images.pictures import is_picture
from trainer.locations import content_of, is_gathered, is_web_address, shown_location
from trainer.sources.location import local_path, open_file
from trainer.sources.packed import (
    MAX_ENTRY_BYTES,
    BadArchive,
    Member,
    is_gzip,
    is_tar,
    is_zip,
    tar_members,
    unpacked_gzip,
    zip_members,
)

FIELD = "images_data_url"

MAX_ENTRIES = 5000
# Folders, links and files that systems leave behind; they cost time, too.
MAX_MEMBERS = 10 * MAX_ENTRIES
MAX_TOTAL_BYTES = 4 * 2**30

_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
_ACCEPTED = "give a folder, .zip, .tar, .tar.gz, http(s) URL or a data: URI"

# First bytes of what users take for an archive of pictures, and what it really is.
_FOREIGN = (
    (b"Rar!", "a RAR archive", "pack the pictures as .zip or .tar instead"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "pack the pictures as .zip or .tar instead"),
    (b"\xfd7zXZ", "packed with xz", "pack the pictures as .zip or .tar.gz instead"),
    (b"BZh", "packed with bzip2", "pack the pictures as .zip or .tar.gz instead"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "pack the pictures as .zip or .tar.gz instead"),
    (b"<!doctype html", "a web page", "download the file itself and check the link"),
    (b"<html", "a web page", "download the file itself and check the link"),
)
_READ_ERRORS = (
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    tarfile.TarError,
    NotImplementedError,
    RuntimeError,
    # Of names that are no UTF-8, and of places before the beginning of a file.
    ValueError,
)


class BadEntry(Exception):
    """One entry cannot be read; the others may be fine."""


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Args:
        name: path inside the source, with forward slashes.
        size: in bytes, as the source declares it.
    """

    name: str
    size: int


class _File(NamedTuple):
    """One file that was taken in.

    Args:
        raw_name: as its maker wrote it.
    """

    raw_name: str
    size: int
    read: Callable[[], bytes]


class Source:
    """The files of one folder or archive; collects them safely, reads them one by one.

    Args:
        label: what the user gave, short enough for a message.
        is_folder: of the user's own disk, which may be of any size.
    """

    def __init__(self, label: str, *, is_folder: bool = False) -> None:
        self.label = label
        self._is_folder = is_folder
        self._num_members = 0
        self._total = 0
        self._files: dict[str, _File] = {}
        self._skipped: list[tuple[str, str]] = []

    def entries(self) -> tuple[Entry, ...]:
        """All files by name, in the order of their names, whatever their order in the source."""
        return tuple(Entry(name, self._files[name].size) for name in sorted(self._files))

    @property
    def notes(self) -> tuple[Note, ...]:
        """What was left out of the source, by name."""
        return tuple(
            Note(kind="warning", field=FIELD, message=f"`{name}` {reason}")
            for name, reason in self._skipped
        )

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            BadEntry: it is damaged, or longer than it said.
            KeyError: there is no such file.
        """
        read = self._files[name].read
        try:
            content = read()
        except _READ_ERRORS as error:
            reason = f"the file is damaged or cannot be read ({error}); copy or pack it again"
            raise BadEntry(reason) from error
        if len(content) > MAX_ENTRY_BYTES:
            raise BadEntry(f"the file is larger than {MAX_ENTRY_BYTES >> 20} MiB")
        return content

    def take(self, member: Member) -> None:
        """Takes a file in, unless it is one of the files that systems leave in archives.

        Raises:
            InputError: its name leads out of an archive, or the source is too large.
        """
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise self._too_many(MAX_MEMBERS)
        name = _printable(str(PurePosixPath(member.name.replace("\\", "/"))))
        if _leads_out(member.name):
            self._skip_or_refuse(member)
        elif _is_junk(name):
            return
        elif member.left_out:
            self._skipped.append((name, f"is left out, {member.left_out}"))
        elif member.read is not None:
            self._add(name, _File(member.name, member.size, member.read))

    def _skip_or_refuse(self, member: Member) -> None:
        """Only in an archive somebody means such a name: folders have it from other systems."""
        if not self._is_folder:
            raise InputError.of(
                FIELD,
                f"`{self.label}` contains the unsafe path `{member.name}` and is refused as a "
                "whole",
                "pack the pictures with plain relative names",
            )
        reason = "is left out, its name would be a path out of the folder elsewhere; rename it"
        self._skipped.append((_printable(member.name), reason))

    def _add(self, name: str, file: _File) -> None:
        if not PurePosixPath(name).name:
            self._skipped.append((name, "is left out, it has no name"))
            return
        if name in self._files:
            is_same = file.raw_name == self._files[name].raw_name
            how = "in the archive twice" if is_same else "there twice, its name spelled in two ways"
            self._skipped.append((name, f"is {how}; the first one is used"))
            return
        self._total += file.size
        if len(self._files) >= MAX_ENTRIES:
            raise self._too_many(MAX_ENTRIES)
        if not self._is_folder and self._total > MAX_TOTAL_BYTES:
            raise InputError.of(
                FIELD,
                f"`{self.label}` unpacks to more than {MAX_TOTAL_BYTES >> 30} GiB",
                "pack fewer or smaller pictures",
            )
        self._files[name] = file

    def _too_many(self, most: int) -> InputError:
        return InputError.of(
            FIELD,
            f"`{self.label}` holds more than {most} files",
            "give the folder or archive of the training pictures only",
        )


@contextmanager
def open_source(images_data_url: str | None, downloaded: Path | None = None) -> Iterator[Source]:
    """The files behind `images_data_url`, readable until the block ends.

    Args:
        images_data_url: see the option.
        downloaded: where the content of a web address or a list was written; required for one.

    Raises:
        InputError: missing, empty, damaged, encrypted, unsafe or of an unsupported type.
        DiskError: there is no room to unpack it.
    """
    if not images_data_url:
        raise InputError.of(FIELD, "is required and has no default", _ACCEPTED)
    label = shown_location(images_data_url)
    path = local_path(images_data_url, FIELD)
    name = path.name if path else ""
    if is_gathered(images_data_url):
        assert downloaded is not None, "it becomes a file before it is opened"
        path, name = downloaded, name_in_address(images_data_url)
    with ExitStack() as stack:
        if path is not None and path.is_dir():
            source = _read_folder(path, label)
        else:
            source = Source(label)
            file: BinaryIO
            if path is None:
                content = content_of(images_data_url, FIELD)
                file, size = stack.enter_context(io.BytesIO(content)), len(content)
            else:
                file, size = stack.enter_context(open_file(path, FIELD)), path.stat().st_size
            _read_file(stack, file, size, source, name)
        if not source.entries():
            reason = f"; {source.notes[0].message}" if source.notes else ""
            raise InputError.of(
                FIELD,
                f"`{label}` holds no files{reason}",
                "put the training pictures into it; `__MACOSX` and hidden files do not count",
            )
        yield source


def name_in_address(address: str) -> str:
    """The path in a web address, which ends with the name of a file; empty for other locations."""
    return unquote(urlsplit(address).path) if is_web_address(address) else ""


def name_of_one(name: str) -> str:
    """The name of a picture that is given by itself, which is never hidden or overlooked."""
    path = PurePosixPath(PurePosixPath(name.replace("\\", "/")).name.lstrip(".") or "image")
    # `download.php` may give a photograph; with such an ending it would be overlooked.
    return path.name if path.suffix.lower() in PICTURE_SUFFIXES else path.stem


def _read_folder(root: Path, label: str) -> Source:
    source = Source(label, is_folder=True)
    errors: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=errors.append):
        here = Path(folder)
        for name in subfolders:
            if os.path.islink(here / name):
                reason = "links to folders are not followed"
                source.take(Member((here / name).relative_to(root).as_posix(), left_out=reason))
        subfolders[:] = sorted(name for name in subfolders if not _is_junk(name))
        for name in sorted(files):
            source.take(_member_of_folder(here / name, root))
    for error in errors:
        name = os.path.relpath(error.filename, root)
        if name == ".":
            raise InputError.of(FIELD, f"`{label}` cannot be read: {error.strerror}") from error
        source.take(Member(name, left_out=f"it cannot be read: {error.strerror}"))
    return source


def _member_of_folder(path: Path, root: Path) -> Member:
    name = path.relative_to(root).as_posix()
    try:
        state = path.stat()
    except FileNotFoundError:
        return Member(name, left_out="it is a broken link")
    except OSError as error:
        return Member(name, left_out=f"it cannot be read: {error.strerror}")
    if not stat.S_ISREG(state.st_mode):
        return Member(name, left_out="it is not a plain file")
    return Member(name, state.st_size, partial(_read_path, path))


def _read_path(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_ENTRY_BYTES + 1)


def _read_whole(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(MAX_ENTRY_BYTES + 1)


def _read_file(stack: ExitStack, file: BinaryIO, size: int, source: Source, name: str) -> None:
    """Takes in what an opened file holds; its first bytes tell what it is, not its name."""
    if size == 0:
        raise InputError.of(
            FIELD,
            f"`{source.label}` is empty (0 bytes)",
            "check whether its upload was interrupted",
        )
    head = file.read(512)
    file.seek(0)
    # A tar archive begins with the name of its first file, which may begin like a picture (`BMW`).
    if is_picture(head) and not is_tar(head):
        source.take(Member(name_of_one(name), size, partial(_read_whole, file)))
        return
    try:
        for member in _members(stack, file, size, head):
            source.take(member)
    except BadArchive as refusal:
        message = f"`{source.label}` {refusal.reason}"
        raise InputError.of(FIELD, message, refusal.hint) from refusal


def _members(stack: ExitStack, file: BinaryIO, size: int, head: bytes) -> Iterator[Member]:
    """What is in an archive that begins with these 512 bytes."""
    if is_zip(head):
        return zip_members(stack, file)
    if is_gzip(head):
        return tar_members(stack, unpacked_gzip(stack, file, packed=size, limit=MAX_TOTAL_BYTES))
    if is_tar(head):
        return tar_members(stack, file)
    start = head.lstrip()
    for signature, what, hint in _FOREIGN:
        if start[: len(signature)].lower() == signature.lower():
            raise BadArchive(f"is {what}", hint)
    raise BadArchive("is neither an archive nor a picture that can be read", _ACCEPTED)


def _leads_out(name: str) -> bool:
    """Whether a name is a path out of where it stands, on this system or another."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:/", str(path)))


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _JUNK for part in PurePosixPath(name).parts)


def _printable(name: str) -> str:
    """A name that can be printed and compared: NFC; other bytes and control characters escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)
    return unicodedata.normalize("NFC", text)
