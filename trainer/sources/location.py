"""Where the user's data is: a local path, a web address, or a text that holds the data itself.

Such a text is a data: URI or bare base64. What lies there is not known here, but for the first
bytes by which base64 is told from a mistyped path.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import BinaryIO

from trainer.config_files import stands_for_content
from trainer.errors import InputError
from trainer.images.pictures import is_picture
from trainer.locations import content_of, is_data_uri, is_web_address, shown_location
from trainer.sources.packed import is_archive

MAX_CAPTIONS_BYTES = 64 * 2**20

# No system has longer paths.
_LONGEST_PATH = 4096
# Base64 as long as this may hold anything; shorter texts must begin as a known kind of file.
_LONG_BASE64 = 200
# As long as the smallest of those files; a shorter text is a path, whatever it decodes to.
_SHORTEST_BASE64 = 32
# Enough of a file to know its kind: tar has its mark at byte 257. Four characters hold 3 bytes.
_HEAD_CHARACTERS = 512
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")


def read_captions_file(captions_file_url: str, downloaded: Path | None = None) -> bytes:
    """The content of a captions file, wherever it is.

    Args:
        captions_file_url: see the option.
        downloaded: where the content of a web address was written; required for one.

    Raises:
        InputError: missing, unreadable, a folder, or larger than `MAX_CAPTIONS_BYTES`.
    """
    field = "captions_file_url"
    if is_web_address(captions_file_url):
        assert downloaded is not None, "a web address is downloaded before it is read"
        return downloaded.read_bytes()
    path = local_path(captions_file_url, field)
    if path is None:
        return content_of(captions_file_url, field)
    with open_file(path, field) as file:
        content = file.read(MAX_CAPTIONS_BYTES + 1)
    if len(content) > MAX_CAPTIONS_BYTES:
        raise InputError.of(
            field,
            f"`{path}` is larger than {MAX_CAPTIONS_BYTES >> 20} MiB",
            "give a JSON lines file, not the pictures",
        )
    return content


def local_path(location: str, field: str) -> Path | None:
    """The existing path that is meant, or nothing for a web address, data: URI or base64.

    Raises:
        InputError: there is no such path, it is an address of another kind, or the digest of
            what is not there any more.
    """
    if stands_for_content(location):
        raise InputError.of(
            field,
            "the content stood in the request and is not in this file, which has its digest alone",
            "give it again: a path, an http(s) URL, or the run folder's own `config.yaml`",
        )
    if is_web_address(location) or is_data_uri(location):
        return None
    shown = shown_location(location)
    if location[:7].lower() == "file://":
        raise InputError.of(field, f"got `{shown}`; file:// is not read", "give the path alone")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        raise InputError.of(
            field,
            f"got `{shown}`; only local paths, http(s) URLs and data: URIs are read",
            "give a local path or an http(s) URL",
        )
    if len(location) > _LONGEST_PATH:
        if _is_base64(location):
            return None
        raise InputError.of(
            field,
            f"`{shown}` is {len(location)} characters long and no base64 text",
            "give a path, an http(s) URL or a data: URI",
        )
    return _existing(location, field)


def _existing(location: str, field: str) -> Path | None:
    shown = shown_location(location)
    path = Path(os.path.expanduser(location))
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if _is_base64(location):
            return None
        # The text of a system's error repeats the whole path.
        cause = error.strerror if isinstance(error, OSError) else str(error)
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"cannot be read: {cause}"
        raise InputError.of(field, f"`{shown}` {reason}", "check the path") from error
    return path


def open_file(path: Path, field: str) -> BinaryIO:
    """A plain file opened for reading.

    Raises:
        InputError: it is none, or may not be read.
    """
    # Opening a pipe or device would wait for ever.
    if not path.is_file():
        raise InputError.of(field, f"`{path}` is not a file", "give the path of a file")
    try:
        return open(path, "rb")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError.of(
            field, f"`{path}` cannot be read: {reason}", "check the path"
        ) from error


def _is_base64(location: str) -> bool:
    """Whether a text that is no existing path is base64, perhaps damaged, and no mistyped path."""
    if len(location) < _SHORTEST_BASE64:
        return False
    # Encoders break lines; a blank is a part of a path or sentence.
    text = "".join(location.splitlines())
    sound = len(text) % 4 == 0 and not _NOT_BASE64.search(text)
    known = _has_known_start(text)
    if len(text) <= _LONG_BASE64:
        return known and sound
    # A path begins with / or ~ where it is not relative; base64 of a JPEG does, too.
    return known or (sound and not text.startswith(("/", "~")))


def _has_known_start(text: str) -> bool:
    """Whether base64 text begins as an archive or picture does."""
    head = re.split("[^A-Za-z0-9+/]", text[:_HEAD_CHARACTERS], maxsplit=1)[0]
    start = base64.b64decode(head[: len(head) // 4 * 4])
    return is_archive(start) or is_picture(start)
