"""Reads pictures out of a folder, zip, tar, tar.gz or data: URI, one entry at a time.

Nothing is ever unpacked to disk under a name from the archive and nothing is written to the
user's folder. Names are checked, bytes are counted, links are not followed. What an entry means
is not known here.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from trainer.config import Note
from trainer.data.location import data_uri_content, local_path, open_file, shown_location
from trainer.data.pictures import is_picture
from trainer.errors import DiskError, InputError

FIELD = "images_data_url"

MAX_ENTRIES = 5000
MAX_TOTAL_BYTES = 4 * 2**30
MAX_ENTRY_BYTES = 2**30
# Photographs hardly shrink in an archive; deflate can shrink zeros about 1000 times. Entries
# below the free size are harmless whatever their ratio.
MAX_RATIO = 200
RATIO_FREE_BYTES = 2**20
# No honest tar header needs more in one piece; tarfile reads headers whole.
MAX_TAR_READ = 16 * 2**20

_CHUNK = 2**20
_JUNK = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
_ACCEPTED = "give a folder, .zip, .tar, .tar.gz or a data: URI"

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


class Source:
    """The files of one folder, archive or data: URI; collects them safely, reads them one by one.

    Args:
        label: what the user gave, short enough for a message.
        limit: bytes of all entries together.
    """

    def __init__(self, label: str, limit: int | None = MAX_TOTAL_BYTES) -> None:
        self.label = label
        self._limit = limit
        self._total = 0
        self._sizes: dict[str, int] = {}
        self._readers: dict[str, Callable[[], bytes]] = {}
        self._skipped: list[tuple[str, str]] = []

    def entries(self) -> tuple[Entry, ...]:
        """All files by name, in the order of their names, whatever their order in the source."""
        return tuple(Entry(name, self._sizes[name]) for name in sorted(self._sizes))

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
        read = self._readers[name]
        try:
            content = read()
        except _READ_ERRORS as error:
            raise BadEntry(f"the file is damaged or cannot be read ({error})") from error
        if len(content) > MAX_ENTRY_BYTES:
            raise BadEntry(f"the file is larger than {MAX_ENTRY_BYTES >> 20} MiB")
        return content

    def add(self, raw_name: str, size: int, read: Callable[[], bytes]) -> None:
        """Takes a file in, unless it is one of the files that systems leave in archives.

        Raises:
            InputError: its name leads out of the source, or the source is too large.
        """
        name = self.check_name(raw_name)
        if _is_junk(name):
            return
        if name in self._sizes:
            self.skip(name, "is in the archive twice; the first one is used")
            return
        self._total += size
        if len(self._sizes) >= MAX_ENTRIES:
            raise InputError.of(
                FIELD,
                f"`{self.label}` holds more than {MAX_ENTRIES} files",
                "give the folder or archive of the training pictures only",
            )
        if self._limit is not None and self._total > self._limit:
            raise self.too_large()
        self._sizes[name] = size
        self._readers[name] = read

    def too_large(self) -> InputError:
        """The refusal of a source that holds more bytes than anybody trains on."""
        return InputError.of(
            FIELD,
            f"`{self.label}` unpacks to more than {MAX_TOTAL_BYTES >> 30} GiB",
            "pack fewer or smaller pictures",
        )

    def skip(self, raw_name: str, reason: str) -> None:
        """Records that an entry is left out.

        Raises:
            InputError: its name leads out of the source.
        """
        name = self.check_name(raw_name)
        if not _is_junk(name):
            self._skipped.append((name, reason))

    def check_ratio(self, name: str, size: int, packed: int) -> None:
        """Refuses what unpacks to an unreasonable size.

        Raises:
            InputError: the size is more than `MAX_RATIO` times the packed size.
        """
        if size > max(RATIO_FREE_BYTES, MAX_RATIO * packed):
            raise InputError.of(
                FIELD,
                f"`{name}` unpacks to more than {MAX_RATIO} times its packed size; "
                f"`{self.label}` is refused as a possible decompression bomb",
                "pack the pictures as they come from the camera",
            )

    def check_name(self, raw_name: str) -> str:
        """The name of an entry as the project writes it.

        Raises:
            InputError: it leads out of the source.
        """
        name = raw_name.replace("\\", "/")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:/", name):
            raise InputError.of(
                FIELD,
                f"`{self.label}` contains the unsafe path `{raw_name}` and is refused as a whole",
                "pack the pictures with plain relative names",
            )
        return _printable(str(path))


@contextmanager
def open_source(images_data_url: str | None) -> Iterator[Source]:
    """The files behind `images_data_url`, readable until the block ends.

    Raises:
        InputError: missing, empty, damaged, encrypted, unsafe or of an unsupported type.
    """
    if not images_data_url:
        raise InputError.of(FIELD, "is required and has no default", _ACCEPTED)
    label = shown_location(images_data_url)
    with ExitStack() as stack:
        path = local_path(images_data_url, FIELD)
        if path is not None and path.is_dir():
            source = _read_folder(path, label)
        else:
            file: BinaryIO
            if path is None:
                content = data_uri_content(images_data_url, FIELD)
                file, size = stack.enter_context(io.BytesIO(content)), len(content)
            else:
                file, size = stack.enter_context(open_file(path, FIELD)), path.stat().st_size
            source = _read_file(stack, file, size, Source(label), path.name if path else "image")
        if not source.entries():
            raise InputError.of(
                FIELD,
                f"`{label}` holds no files",
                "put the training pictures into it; `__MACOSX` and hidden files do not count",
            )
        yield source


def _read_folder(root: Path, label: str) -> Source:
    source = Source(label, limit=None)

    def unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        if name == ".":
            raise InputError.of(FIELD, f"`{label}` cannot be read: {error.strerror}") from error
        source.skip(name, f"is left out, it cannot be read: {error.strerror}")

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        for name in subfolders:
            if (here / name).is_symlink():
                relative = (here / name).relative_to(root).as_posix()
                source.skip(relative, "is left out, links to folders are not followed")
        subfolders[:] = sorted(name for name in subfolders if not _is_junk(name))
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if path.is_file():
                source.add(relative, path.stat().st_size, partial(_read_path, path))
            else:
                source.skip(relative, "is left out, it is a broken link or not a plain file")
    return source


def _read_path(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_ENTRY_BYTES + 1)


def _read_whole(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(MAX_ENTRY_BYTES + 1)


def _read_file(stack: ExitStack, file: BinaryIO, size: int, source: Source, name: str) -> Source:
    """The source in an opened file; its first bytes tell what it is, not its name."""
    if size == 0:
        raise InputError.of(
            FIELD,
            f"`{source.label}` is empty (0 bytes)",
            "check whether its upload was interrupted",
        )
    head = file.read(512)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        _add_zip(stack, file, source)
    elif head.startswith(b"\x1f\x8b"):
        _add_tar(stack, _unpack_gzip(stack, file, size, source), source)
    elif _is_tar(head):
        _add_tar(stack, file, source)
    elif is_picture(head):
        source.add(name, size, partial(_read_whole, file))
    else:
        _refuse_type(head, source.label)
    return source


def _refuse_type(head: bytes, label: str) -> None:
    start = head.lstrip()
    for signature, what, hint in _FOREIGN:
        if start[: len(signature)].lower() == signature.lower():
            raise InputError.of(FIELD, f"`{label}` is {what}", hint)
    raise InputError.of(
        FIELD, f"`{label}` is neither an archive nor a picture that can be read", _ACCEPTED
    )


def _add_zip(stack: ExitStack, file: BinaryIO, source: Source) -> None:
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError.of(
            FIELD,
            f"`{source.label}` starts like a zip archive but is cut off or damaged ({error})",
            "pack or upload it again",
        ) from error
    for info in archive.infolist():
        if info.is_dir():
            source.check_name(info.filename)
        elif stat.S_ISLNK(info.external_attr >> 16):
            source.skip(info.filename, "is left out, links in archives are not followed")
        elif info.flag_bits & 1:
            raise InputError.of(
                FIELD,
                f"`{source.label}` is password-protected (`{info.filename}`)",
                "pack it without a password",
            )
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            source.skip(info.filename, "is left out, only stored and deflated entries are read")
        else:
            source.check_ratio(info.filename, info.file_size, info.compress_size)
            source.add(info.filename, info.file_size, partial(_read_zipped, archive, info))


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # zipfile gives no more than the declared size, and then compares the checksum.
    with archive.open(info) as stream:
        return stream.read(MAX_ENTRY_BYTES + 1)


class _BoundedReader(io.RawIOBase):
    """A file of which nobody can ask for an unreasonable amount at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes.

        Raises:
            tarfile.ReadError: more than `MAX_TAR_READ`.
        """
        if not 0 <= size <= MAX_TAR_READ:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Goes to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell()


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _add_tar(stack: ExitStack, file: BinaryIO, source: Source) -> None:
    reader = _BoundedReader(file)
    try:
        archive = stack.enter_context(tarfile.TarFile(fileobj=reader, mode="r"))
        for member in archive:
            if member.isdir():
                source.check_name(member.name)
            elif member.isreg():
                source.add(member.name, member.size, partial(_read_member, archive, member))
            else:
                source.skip(member.name, "is left out, links and devices are not followed")
        # tarfile takes a damaged header for the end of the archive.
        reader.seek(archive.offset)
        if reader.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError.of(
            FIELD,
            f"`{source.label}` is a tar archive that is cut off or damaged ({error})",
            "pack or upload it again",
        ) from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    content = io.BytesIO()
    while content.tell() <= MAX_ENTRY_BYTES and (chunk := stream.read(_CHUNK)):
        content.write(chunk)
    return content.getvalue()


def _unpack_gzip(stack: ExitStack, file: BinaryIO, packed: int, source: Source) -> BinaryIO:
    """The tar archive inside a gzip file, in a nameless temporary file."""
    unpacked = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
    size = 0
    for chunk in _gzip_chunks(file, source):
        size += len(chunk)
        source.check_ratio(source.label, size, packed)
        if size > MAX_TOTAL_BYTES:
            raise source.too_large()
        try:
            unpacked.write(chunk)
        except OSError as error:
            raise DiskError(
                f"`{source.label}` could not be unpacked in `{tempfile.gettempdir()}`: "
                f"{error.strerror}",
                "make room there or set TMPDIR to another folder",
            ) from error
    unpacked.seek(0)
    head = unpacked.read(512)
    unpacked.seek(0)
    if not _is_tar(head):
        raise InputError.of(
            FIELD, f"`{source.label}` is packed with gzip but holds no tar archive", _ACCEPTED
        )
    return unpacked


def _gzip_chunks(file: BinaryIO, source: Source) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise InputError.of(
            FIELD,
            f"`{source.label}` is a gzip file that is cut off or damaged ({error})",
            "pack or upload it again",
        ) from error


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _JUNK for part in PurePosixPath(name).parts)


def _printable(name: str) -> str:
    """A name that can be printed and compared: NFC; other bytes and control characters escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    text = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)
    return unicodedata.normalize("NFC", text)
