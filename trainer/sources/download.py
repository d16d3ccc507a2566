"""Pictures and captions behind a web address, fetched once into the folder of what is prepared.

A run that goes on finds them there, though the address may have expired. The pictures of a list
come together in one archive there.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trainer.durable import disk_errors, publish_file
from trainer.errors import InputError
from trainer.events import StageEvent
from trainer.fetch import download
from trainer.images.pictures import is_picture
from trainer.locations import content_of, is_gathered, is_web_address, shown_location
from trainer.picture_lists import ListedPicture, is_picture_list, listed_pictures
from trainer.sources.archive import FIELD, MAX_TOTAL_BYTES, name_in_address, name_of_one
from trainer.sources.caption_files import FIELD as CAPTIONS
from trainer.sources.location import local_path, open_file

_MEBIBYTE = 2**20
_PREFIX = "download-"
# Enough of a file to know whether it is a picture.
_HEAD = 64
# The oldest that a zip archive can say: equal pictures give equal archives.
_LONG_AGO = (1980, 1, 1, 0, 0, 0)


def downloaded(
    location: str | None, folder: Path, *, field: str = FIELD, limit: int = MAX_TOTAL_BYTES
) -> Generator[StageEvent, None, Path | None]:
    """The file that a web address or a list of pictures leads to; nothing for other locations.

    Args:
        folder: where it is kept; made when missing.
        field: the option that holds the address.
        limit: bytes.

    Raises:
        InputError: it cannot be had.
        DiskError: the folder cannot be written.
    """
    if location is None or not is_gathered(location):
        return None
    path = folder / f"{_PREFIX}{hashlib.sha256(location.encode()).hexdigest()[:16]}"
    pictures = listed_pictures(location) if is_picture_list(location) else ()
    # Files of the user's own may have changed since they were packed.
    if path.is_file() and all(is_web_address(picture.location) for picture in pictures):
        return path
    partial = path.with_name(f".tmp-{path.name}")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if pictures:
                with open(partial, "w+b") as archive:
                    yield from _packed(pictures, field, archive, limit=limit)
            else:
                # Unbuffered: a full disk shows where bytes are counted, not when the file closes.
                with open(partial, "wb", buffering=0) as file:
                    yield from _fetched(location, field, file, limit=limit)
            publish_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _fetched(
    address: str, field: str, file: BinaryIO, *, limit: int
) -> Generator[StageEvent, None, None]:
    for done, total in download(address, field, file, limit=limit):
        yield StageEvent("download", *_mebibytes(done, total))


def _packed(
    pictures: Sequence[ListedPicture], field: str, file: BinaryIO, *, limit: int
) -> Generator[StageEvent, None, None]:
    """Packs the pictures of a list with their captions, each under its number and name.

    Raises:
        InputError: one cannot be had or is no picture, or they are too large together.
    """
    left = limit
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number, picture in enumerate(pictures):
            content = _content(picture.location, field, limit=left)
            if not is_picture(content[:_HEAD]):
                message = f"number {number + 1} of the list, `{shown_location(picture.location)}`, "
                hint = "give the addresses, paths or base64 of pictures"
                raise InputError.of(field, message + "is not a picture that can be read", hint)
            left -= len(content)
            name = f"{number:03}-{name_of_one(_name_of(picture.location))}"
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), content)
            if picture.caption:
                caption = zipfile.ZipInfo(Path(name).with_suffix(".txt").name, _LONG_AGO)
                archive.writestr(caption, picture.caption)
            yield StageEvent("gather pictures", number + 1, len(pictures))


def _content(location: str, field: str, *, limit: int) -> bytes:
    """What a location of one picture holds."""
    if is_web_address(location):
        with tempfile.TemporaryFile(buffering=0) as file:
            for _ in download(location, field, file, limit=limit):
                pass
            file.seek(0)
            return file.read()
    path = local_path(location, field)
    if path is None:
        content = content_of(location, field)
    else:
        with open_file(path, field) as file:
            content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError.of(field, f"the pictures hold more than {limit >> 20} MiB", "give fewer")
    return content


def _name_of(location: str) -> str:
    """The name of the file that a location gives; empty for one that holds the picture itself."""
    if is_web_address(location):
        return name_in_address(location)
    return "" if local_path(location, FIELD) is None else location


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
