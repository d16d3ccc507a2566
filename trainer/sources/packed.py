"""Reads zip, tar and tar.gz archives, one member at a time, whatever their makers intended.

Nothing is unpacked under a name from the archive, links are not followed, and no header can ask
for an unreasonable amount of memory. Which members are wanted, and how the user calls the
archive, is not known here.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from trainer.durable import write_all
from trainer.errors import DiskError

MAX_ENTRY_BYTES = 2**30
# Photographs hardly shrink in an archive; deflate can shrink zeros about 1000 times. Members
# below the free size are harmless whatever their ratio.
MAX_RATIO = 200
RATIO_FREE_BYTES = 2**20
# No honest header needs more in one piece; tarfile reads headers whole, zipfile its directory.
MAX_TAR_READ = 16 * 2**20
MAX_ZIP_READ = 4 * 2**20

_CHUNK = 2**20
_AGAIN = "pack or upload it again"
_TYPES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class BadArchive(Exception):
    """An archive that is refused as a whole.

    Args:
        reason: goes on after the archive's name.
        hint: the next action.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class Member:
    """One thing in an archive.

    Args:
        name: as the archive gives it, unchecked.
        size: in bytes, as the archive declares it.
        read: gives the content of a file, at most `MAX_ENTRY_BYTES` and one byte; nothing for a
            folder and for what is left out.
        left_out: why it cannot be read; empty for files and folders.
    """

    name: str
    size: int = 0
    read: Callable[[], bytes] | None = None
    left_out: str = ""


def is_archive(head: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is of a packed kind that is read."""
    return is_zip(head) or is_gzip(head) or is_tar(head)


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a zip archive."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_gzip(head: bytes) -> bool:
    """Whether a file that begins with these bytes is packed with gzip."""
    return head.startswith(b"\x1f\x8b\x08")


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a tar archive."""
    return head[257:262] == b"ustar"


def zip_members(stack: ExitStack, file: BinaryIO) -> Iterator[Member]:
    """The members of a zip archive, readable until the stack is closed.

    Raises:
        BadArchive: damaged, encrypted, or probably a bomb.
    """
    try:
        archive = stack.enter_context(zipfile.ZipFile(_BoundedReader(file, MAX_ZIP_READ)))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        reason = f"starts like a zip archive but is cut off or damaged ({error})"
        raise BadArchive(reason, _AGAIN) from error
    for info in archive.infolist():
        # zipfile's own `is_dir` needs a name.
        if info.filename.endswith("/"):
            yield Member(info.filename)
        elif stat.S_ISLNK(info.external_attr >> 16):
            yield Member(info.filename, left_out="links in archives are not followed")
        elif info.flag_bits & 1:
            reason = f"is password-protected (`{info.filename}`)"
            raise BadArchive(reason, "pack it without a password")
        elif info.compress_type not in _TYPES:
            yield Member(info.filename, left_out="only stored and deflated entries are read")
        else:
            _check_ratio(f"`{info.filename}`", info.file_size, info.compress_size)
            yield Member(info.filename, info.file_size, partial(_read_zipped, archive, info))


def tar_members(stack: ExitStack, file: BinaryIO) -> Iterator[Member]:
    """The members of a tar archive, readable until the stack is closed.

    Raises:
        BadArchive: damaged.
    """
    reader = _BoundedReader(file, MAX_TAR_READ)
    end = reader.seek(0, io.SEEK_END)
    reader.seek(0)
    try:
        archive = stack.enter_context(tarfile.TarFile(fileobj=reader, mode="r"))
        for member in archive:
            if member.isdir():
                yield Member(member.name)
            elif member.issparse():
                # A few bytes stand for as many zeros as they like.
                yield Member(member.name, left_out="sparse files are not read")
            elif member.isreg():
                if not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(f"`{member.name}` is said to be {member.size} bytes")
                yield Member(member.name, member.size, partial(_read_member, archive, member))
            else:
                yield Member(member.name, left_out="links and devices are not followed")
        # tarfile takes a damaged header for the end of the archive.
        reader.seek(archive.offset)
        if reader.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
    except RecursionError as error:
        # tarfile reads what stands in front of a file's header by calling itself.
        reason = "is a tar archive in which headers follow each other without a file"
        raise BadArchive(reason, _AGAIN) from error
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        reason = f"is a tar archive that is cut off or damaged ({error})"
        raise BadArchive(reason, _AGAIN) from error


def unpacked_gzip(stack: ExitStack, file: BinaryIO, *, packed: int, limit: int) -> BinaryIO:
    """The tar archive inside a gzip file, in a nameless temporary file.

    Args:
        stack: closes it.
        file: the gzip file.
        packed: its size in bytes.
        limit: bytes that it may unpack to.

    Raises:
        BadArchive: damaged, too large, probably a bomb, or no tar archive.
        DiskError: there is no room for it.
    """
    try:
        # Unbuffered: a full disk shows when it is written to, not when it is closed.
        unpacked = stack.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
    except OSError as error:
        raise DiskError(
            f"there is no folder for temporary files ({error.strerror})",
            "set TMPDIR to a folder that may be written to",
        ) from error
    declared = _declared_size(file, packed)
    size = 0
    for chunk in _gzip_chunks(file):
        size += len(chunk)
        _check_ratio("it", size, packed)
        if size > limit:
            reason = f"unpacks to more than {limit >> 30} GiB"
            raise BadArchive(reason, "pack fewer or smaller pictures")
        needed = declared if declared >= size else None
        write_all(unpacked, chunk, "the unpacked pictures", needed)
    unpacked.seek(0)
    head = unpacked.read(512)
    unpacked.seek(0)
    if not is_tar(head):
        raise BadArchive("is packed with gzip but holds no tar archive", "give a .zip or .tar.gz")
    return stack.enter_context(io.BufferedReader(unpacked))


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # zipfile gives no more than the declared size, and then compares the checksum.
    with archive.open(info) as stream:
        return _read_in_chunks(stream.read)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return _read_in_chunks(stream.read)


def _read_in_chunks(read: Callable[[int], bytes]) -> bytes:
    content = io.BytesIO()
    while content.tell() <= MAX_ENTRY_BYTES and (chunk := read(_CHUNK)):
        content.write(chunk)
    return content.getvalue()


def _check_ratio(what: str, size: int, packed: int) -> None:
    if size > max(RATIO_FREE_BYTES, MAX_RATIO * packed):
        raise BadArchive(
            f"is refused as a possible decompression bomb: {what} unpacks to more than "
            f"{MAX_RATIO} times its packed size",
            "pack the pictures as they come from the camera",
        )


def _declared_size(file: BinaryIO, packed: int) -> int:
    """What a gzip file says of the size of its content, modulo 2**32; for messages only."""
    file.seek(max(0, packed - 4))
    size = int.from_bytes(file.read(4), "little")
    file.seek(0)
    return size


def _gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        reason = f"is a gzip file that is cut off or damaged ({error})"
        raise BadArchive(reason, _AGAIN) from error


class _BoundedReader(io.RawIOBase):
    """A file of which nobody can ask for an unreasonable amount at once.

    Args:
        file: what is read.
        most: bytes that one read may ask for.
    """

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file = file
        self._most = most

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes.

        Raises:
            OSError: more than is reasonable.
        """
        if size > self._most:
            raise OSError(f"a header asks for {size} bytes")
        content = self._file.read(size if size >= 0 else self._most + 1)
        if len(content) > self._most:
            raise OSError(f"more than {self._most} bytes of headers")
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Goes to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell()

    def seekable(self) -> bool:
        """True: `zipfile` starts at the end."""
        return True
