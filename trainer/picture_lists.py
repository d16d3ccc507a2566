"""A list of pictures in the place of one location: a data: URI of JSON lines, one per picture.

Services that take pictures one by one say so in `images_data_url`. A line has the location of a
picture as `file_name` and may have its caption as `text`. Nothing is read here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from trainer.errors import InputError

FIELD = "images_data_url"

_PREFIX = "data:application/jsonl,"
# Characters that stand for themselves: base64 is not to grow.
_PLAIN = "/+=:;,"


@dataclass(frozen=True)
class ListedPicture:
    """One picture of a list.

    Args:
        location: a path, a web address, a data: URI or bare base64.
        caption: of its own, if it has one.
    """

    location: str
    caption: str | None = None


def is_picture_list(location: str) -> bool:
    """Whether a location is a list of pictures."""
    return location.startswith(_PREFIX)


def picture_list(pictures: Sequence[ListedPicture]) -> str:
    """The location that stands for these pictures, in their order."""
    rows = (
        {"file_name": picture.location}
        | ({} if picture.caption is None else {"text": picture.caption})
        for picture in pictures
    )
    return _PREFIX + quote("\n".join(map(json.dumps, rows)), safe=_PLAIN)


def listed_pictures(location: str) -> tuple[ListedPicture, ...]:
    """The pictures of a list.

    Raises:
        InputError: it is damaged, empty, or a list in a list.
    """
    lines = unquote(location.removeprefix(_PREFIX)).split("\n")
    return tuple(_read(line, number) for number, line in enumerate(lines, start=1))


def locations_in(location: str) -> tuple[str, ...]:
    """Every place that a location leads to: those of a list, or itself.

    Raises:
        InputError: the list is damaged.
    """
    if not is_picture_list(location):
        return (location,)
    return tuple(picture.location for picture in listed_pictures(location))


def _read(line: str, number: int) -> ListedPicture:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _damaged(number, "is no JSON") from error
    name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not name or is_picture_list(name):
        raise _damaged(number, "has no location of a picture as `file_name`")
    if not isinstance(text, str | None):
        raise _damaged(number, "has a `text` that is none")
    return ListedPicture(name, text)


def _damaged(number: int, reason: str) -> InputError:
    message = f"line {number} of the list of pictures {reason}"
    return InputError.of(FIELD, message, 'write {"file_name": "a.jpg", "text": "a caption"}')
