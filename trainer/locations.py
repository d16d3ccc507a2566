"""Locations as texts: what kind each is, how messages show it, and the content that it holds.

Nothing outside of the text is looked at.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from trainer.errors import InputError
from trainer.network import shown_url
from trainer.picture_lists import is_picture_list


def shown_location(location: str) -> str:
    """A location as messages show it: a path as it is, an address without its query, data cut."""
    if is_picture_list(location):
        return "the list of pictures"
    if is_web_address(location):
        return shown_url(location)
    return location if len(location) <= 200 else f"{location[:40]}…"


def is_web_address(location: str) -> bool:
    """Whether the location is an http(s) address, to be downloaded before it can be read."""
    return location[:8].lower().startswith(("http://", "https://"))


def is_gathered(location: str) -> bool:
    """Whether what is there becomes a file first: a web address, or a list of pictures."""
    return is_web_address(location) or is_picture_list(location)


def content_of(location: str, field: str) -> bytes:
    """The bytes in a data: URI (RFC 2397) or bare base64 text.

    Raises:
        InputError: it is damaged.
    """
    if not is_data_uri(location):
        return _decoded(location, field, "the base64 text")
    header, comma, payload = location.partition(",")
    if not comma:
        raise InputError.of(
            field,
            f"`{shown_location(location)}` has no comma before its content",
            "write data:application/zip;base64,…",
        )
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    return _decoded(payload, field, "the base64 text of the data: URI")


def is_data_uri(location: str) -> bool:
    """Whether the location is a data: URI."""
    return location[:5].lower() == "data:"


def _decoded(text: str, field: str, what: str) -> bytes:
    # Encoders break lines; the place is told in the text as the user has it.
    damage = re.search(r"[^A-Za-z0-9+/=\s]", text)
    if damage:
        raise InputError.of(
            field,
            f"{what} is damaged at character {damage.start()}",
            "encode the file again with the standard alphabet",
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise InputError.of(
            field, f"{what} is cut off or damaged ({error})", "encode the file again"
        ) from error
