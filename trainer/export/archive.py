"""Several files in one: archives with the same bytes for the same content.

Times, owners and modes are fixed, entries stand in the order in which they are given, and one
entry at a time is held in memory.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from trainer.durable import write_chunks

Container = Literal["zip", "tar", "tar.gz"]
Entry = tuple[str, bytes]

_MODE = 0o644
# The first moment that a zip file can tell.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
# The one number that says Unix in a zip entry: its mode is read then.
_UNIX = 3


def write_archive(path_without_suffix: Path, files: Iterable[Entry], container: Container) -> Path:
    """Writes an archive durably and gives its path, which ends in the container's name.

    Args:
        path_without_suffix: where to.
        files: names with forward slashes, each once, and contents; taken one by one.
        container: what to write; `tar.gz` and `zip` are compressed.

    Raises:
        ValueError: a name occurs twice.
    """
    path = path_without_suffix.with_name(f"{path_without_suffix.name}.{container}")
    write_chunks(path, _WRITERS[container](_each_once(files)))
    return path


class _Buffer(io.RawIOBase):
    """Takes what an archive writer writes, until it is taken on."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        content = memoryview(data)  # type: ignore[arg-type]
        self._written += content
        return content.nbytes

    def taken(self) -> bytes:
        content = bytes(self._written)
        self._written.clear()
        return content


def _zip(files: Iterable[Entry]) -> Iterator[bytes]:
    buffer = _Buffer()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            # Deflated even where that saves nothing: stored entries of unknown size cannot be
            # read from a stream.
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = _UNIX, _MODE << 16
            archive.writestr(entry, content)
            yield buffer.taken()
    yield buffer.taken()


def _tar(files: Iterable[Entry]) -> Iterator[bytes]:
    buffer = _Buffer()
    with tarfile.open(fileobj=buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), _MODE
            archive.addfile(entry, io.BytesIO(content))
            yield buffer.taken()
    yield buffer.taken()


def _tar_gz(files: Iterable[Entry]) -> Iterator[bytes]:
    buffer = _Buffer()
    # Not tarfile's own compression, which writes the time of day into the file.
    with gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as compressed:
        for chunk in _tar(files):
            compressed.write(chunk)
            yield buffer.taken()
    yield buffer.taken()


_WRITERS: Mapping[Container, Callable[[Iterable[Entry]], Iterator[bytes]]] = {
    "zip": _zip,
    "tar": _tar,
    "tar.gz": _tar_gz,
}


def _each_once(files: Iterable[Entry]) -> Iterator[Entry]:
    seen: set[str] = set()
    for name, content in files:
        if name in seen:
            raise ValueError(f"two files of an archive are called `{name}`")
        seen.add(name)
        yield name, content
