"""Writing files so that a crash, a full disk or a power cut leaves the old state or the new one.

Everything in a run folder that a later run or a reader relies on is written here; logs are
appended to where they are. A failed write becomes a `DiskError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainer.errors import DiskError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the folder may not be written to",
    errno.EPERM: "the folder may not be written to",
}
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


@contextmanager
def disk_errors(path: Path, option: str = "--output") -> Iterator[None]:
    """Turns a failed file operation into a `DiskError` that names the path and the reason.

    Args:
        option: by which another place is given.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(
            f"`{path}` could not be written: {reason}",
            f"make room or give another {option}, then run the same command again",
        ) from error


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside its place, makes it durable, then moves it there in one step.

    The file's mode follows the umask; its folder is made when missing.
    """

    def write(file: BinaryIO) -> None:
        for chunk in chunks:
            file.write(chunk)

    write_with(path, write)


def write_with(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """`write_chunks` for content that a function puts into a file piece by piece."""
    temporary = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        _make(path.parent)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """`write_chunks` for content that is at hand as a whole."""
    write_chunks(path, [content])


def write_text(path: Path, content: str) -> None:
    """`write_chunks` for UTF-8 text."""
    write_chunks(path, [content.encode()])


def publish_file(temporary: Path, final: Path) -> None:
    """Gives a finished file its name, in the same folder: made durable, then named, then that."""
    with disk_errors(final):
        _sync(temporary)
        os.replace(temporary, final)
        _sync(final.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Gives a finished folder its name: its files made durable, then the name, then the parent."""
    with disk_errors(final):
        _sync_all(temporary)
        os.rename(temporary, final)
        _sync(final.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Gives a finished folder the name of an earlier one, which goes only then.

    A crash between their two renames leaves both, and no folder of that name: see `put_back`.
    """
    earlier = _hidden(final)
    with disk_errors(final):
        _sync_all(temporary)
        discard(earlier)
        if os.path.lexists(final):
            os.rename(final, earlier)
        try:
            os.rename(temporary, final)
        except OSError:
            put_back(final)
            raise
        _sync(final.parent)
    discard(earlier)


def put_back(final: Path) -> None:
    """Gives an earlier folder its name again where a crash cut `replace_folder` off."""
    earlier = _hidden(final)
    if os.path.lexists(earlier) and not os.path.lexists(final):
        with disk_errors(final):
            os.rename(earlier, final)
            _sync(final.parent)


def fresh_folder(path: Path) -> Path:
    """An empty folder at this path, whatever stood there before."""
    with disk_errors(path):
        discard(path)
        _make(path.parent)
        path.mkdir()
    return path


def make_folder(path: Path) -> None:
    """Makes a folder where it is missing, its parents too, with names that outlast a power cut."""
    with disk_errors(path):
        _make(path)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a crash leaves it whole or under a `.tmp-` name, never in part."""
    hidden = _hidden(path)
    with disk_errors(path):
        discard(hidden)
        os.rename(path, hidden)
        discard(hidden)


def discard(path: Path) -> None:
    """Removes what nobody relies on as far as it can be removed; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_all(target: BinaryIO, content: bytes, what: str, needed: int | None = None) -> None:
    """Writes all of the content to a file that may be unbuffered.

    Args:
        target: the file.
        content: to be written next.
        what: that is written, for the message.
        needed: bytes of the whole file, where they are known.

    Raises:
        DiskError: the disk is full, or the file cannot be written for another reason.
    """
    view = memoryview(content)
    try:
        while view:
            view = view[target.write(view) :]
    except OSError as error:
        nameless = not isinstance(target.name, str)
        folder = tempfile.gettempdir() if nameless else str(Path(target.name).parent)
        hint = "make room there"
        if Path(folder) == Path(tempfile.gettempdir()):
            hint = "make room there or set TMPDIR to another folder"
        if error.errno != errno.ENOSPC:
            message = f"{what} could not be written in `{folder}`: {error.strerror}"
            raise DiskError(message, hint) from error
        disk = os.fstatvfs(target.fileno())
        free = f"{shown_size(disk.f_bavail * disk.f_frsize)} free"
        room = free if needed is None else f"needs {shown_size(needed)}, {free}"
        raise DiskError(f"no room in `{folder}` for {what} ({room})", hint) from error


def shown_size(size: int) -> str:
    """A number of bytes as messages show it."""
    unit, name = unit_of(size)
    return f"{round(size / unit, 1):g} {name}"


def unit_of(size: int) -> tuple[int, str]:
    """The unit that so many bytes are told in, and its name."""
    return next((unit, name) for unit, name in _UNITS if size >= unit or unit == 1)


def sync_file(path: Path) -> None:
    """Makes what was written to a file so far durable, whoever wrote it."""
    with disk_errors(path):
        _sync(path)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    with disk_errors(path):
        _sync(path)


def _hidden(path: Path) -> Path:
    """Where a folder waits for its end."""
    return path.with_name(f".tmp-old-{path.name}")


def _make(path: Path) -> None:
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        # A folder may be one to write to and not to read; then the system syncs its names in time.
        with contextlib.suppress(PermissionError):
            _sync(folder.parent)


def _sync_all(folder: Path) -> None:
    """Makes all that is in a folder durable, folders after what is in them."""
    found = sorted(folder.rglob("*"))
    for path in [path for path in found if path.is_file()]:
        _sync(path)
    for path in [path for path in found if path.is_dir()]:
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
