"""Where the user's data is: an existing local path, or a data: URI that holds the data itself.

Knows neither archives nor pictures.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from trainer.errors import InputError

MAX_CAPTIONS_BYTES = 64 * 2**20


def read_captions_file(captions_file_url: str) -> bytes:
    """The content of a captions file given as a local path or data: URI.

    Raises:
        InputError: missing, unreadable, a folder, or larger than `MAX_CAPTIONS_BYTES`.
    """
    field = "captions_file_url"
    path = local_path(captions_file_url, field)
    if path is None:
        return data_uri_content(captions_file_url, field)
    with open_file(path, field) as file:
        content = file.read(MAX_CAPTIONS_BYTES + 1)
    if len(content) > MAX_CAPTIONS_BYTES:
        raise InputError.of(
            field,
            f"`{path}` is larger than {MAX_CAPTIONS_BYTES >> 20} MiB",
            "give a JSON lines file, not the pictures",
        )
    return content


def shown_location(location: str) -> str:
    """A path as it is, a data: URI cut to what a message can hold."""
    return location if len(location) <= 200 else f"{location[:40]}…"


def local_path(location: str, field: str) -> Path | None:
    """The existing path that is meant, or nothing for a data: URI.

    Raises:
        InputError: there is no such path, or it is an address of another kind.
    """
    shown = shown_location(location)
    if location[:5].lower() == "data:":
        return None
    if location.lower().startswith(("http://", "https://")):
        raise InputError.of(
            field, f"got `{shown}`; URLs are not available yet", "download it and give the file"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location):
        raise InputError.of(
            field, f"got `{shown}`; only local paths and data: URIs are read", "give a local path"
        )
    path = Path(os.path.expanduser(location))
    try:
        path.stat()
    except FileNotFoundError as error:
        raise InputError.of(field, f"`{shown}` does not exist", "check the path") from error
    except (OSError, ValueError) as error:
        raise InputError.of(
            field, f"`{shown}` cannot be read: {error}", "check the path"
        ) from error
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


def data_uri_content(location: str, field: str) -> bytes:
    """The bytes in a data: URI (RFC 2397).

    Raises:
        InputError: it is damaged.
    """
    header, comma, payload = location.partition(",")
    if not comma:
        raise InputError.of(
            field,
            f"`{shown_location(location)}` has no comma before its content",
            "write data:application/zip;base64,…",
        )
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    payload = "".join(payload.split())
    damage = re.search(r"[^A-Za-z0-9+/=]", payload)
    if damage:
        raise InputError.of(
            field,
            f"the base64 text of the data: URI is damaged at character {damage.start()}",
            "encode the file again with the standard alphabet",
        )
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise InputError.of(
            field,
            f"the base64 text of the data: URI is cut off or damaged ({error})",
            "encode the file again",
        ) from error
