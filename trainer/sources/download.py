"""Pictures and captions behind a web address, fetched once into the folder of what is prepared.

A run that goes on finds them there, though the address may have expired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.durable import disk_errors, publish_file
from trainer.errors import InputError
from trainer.events import StageEvent
from trainer.fetch import download
from trainer.sources.archive import FIELD, MAX_TOTAL_BYTES
from trainer.sources.caption_files import FIELD as CAPTIONS
from trainer.sources.location import is_web_address

_MEBIBYTE = 2**20
_PREFIX = "download-"


def downloaded(
    location: str | None, folder: Path, *, field: str = FIELD, limit: int = MAX_TOTAL_BYTES
) -> Generator[StageEvent, None, Path | None]:
    """The file that a web address leads to; nothing for any other location.

    Args:
        folder: where it is kept; made when missing.
        field: the option that holds the address.
        limit: bytes.

    Raises:
        InputError: it cannot be had.
        DiskError: the folder cannot be written.
    """
    if location is None or not is_web_address(location):
        return None
    path = folder / f"{_PREFIX}{hashlib.sha256(location.encode()).hexdigest()[:16]}"
    if path.is_file():
        return path
    partial = path.with_name(f".tmp-{path.name}")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Unbuffered: a full disk shows where the bytes are counted, not when the file closes.
            with open(partial, "wb", buffering=0) as file:
                for done, total in download(location, field, file, limit=limit):
                    yield StageEvent("download", *_mebibytes(done, total))
            publish_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


@contextmanager
def removed_if_refused(*, pictures: Path | None, captions: Path | None) -> Iterator[None]:
    """Removes a file that turns out to be of no use: its address may give another next time."""
    files = {FIELD: pictures, CAPTIONS: captions, "caption_column": captions}
    try:
        yield
    except InputError as error:
        for problem in error.problems:
            file = files.get(problem.field)
            if file is not None:
                file.unlink(missing_ok=True)
        raise


def remove_downloads(folder: Path, *, keep: Sequence[Path | None]) -> None:
    """Removes what other addresses gave.

    Raises:
        DiskError: the folder cannot be written.
    """
    with disk_errors(folder):
        for path in folder.glob(f"{_PREFIX}*"):
            if path not in keep:
                path.unlink()


def _mebibytes(done: int, total: int | None) -> tuple[int, int]:
    """Done and total, rounded up; a total that nobody told is what is done."""
    return -(-done // _MEBIBYTE), -(-(total or done) // _MEBIBYTE)
