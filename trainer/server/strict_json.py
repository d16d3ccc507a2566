"""JSON from strangers: an object that costs little to read, or a refusal.

The bytes are looked over before they are parsed. Outside of texts there may be only so many
characters and so deep a nesting, so that neither memory nor stack grows far beyond the body; a
text, such as pictures in base64, may have any length. Messages never repeat what came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.server.refusals import Refusal

MOST_NESTED = 64
MOST_OUTSIDE_TEXTS = 2**20

# Never looks twice at a character: a text without an end costs no more than one with it.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
# Half of a pair of UTF-16 may stand in JSON, and in no file or database.
_MAYBE_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def parsed(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object (RFC 8259) in bytes; an array of them is emptied as soon as it is read.

    Raises:
        Refusal: it is none, or is built to be costly.
    """
    _look_over(body)
    try:
        text = body.decode()
        may_have_halves = _MAYBE_HALF.search(body) is not None
        if isinstance(body, bytearray):
            body.clear()
        content = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_once_each,
        )
        if may_have_halves:
            _check_halves(content)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"the body is no JSON: {error.msg} at {where}") from None
    except UnicodeError:
        raise _malformed("the body is no JSON: it is no UTF-8") from None
    except ValueError:
        raise _malformed("the body is no JSON: a number is none, or too large") from None
    if not isinstance(content, dict):
        raise _malformed("the body is no JSON object")
    return content


def _check_halves(value: Any) -> None:
    """Encodes text by text, so that there is no second copy of all of them.

    Raises:
        UnicodeError: one has half of a pair.
    """
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        _check_halves([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            _check_halves(item)


def _look_over(body: bytes | bytearray) -> None:
    outside = _TEXT.sub(b"", body)
    if len(outside) > MOST_OUTSIDE_TEXTS:
        raise _malformed(
            f"the body has more than {MOST_OUTSIDE_TEXTS} characters outside of its texts"
        )
    depth = 0
    for bracket in _BRACKET.finditer(outside):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MOST_NESTED:
            raise _malformed(f"the body is nested more than {MOST_NESTED} deep")


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _malformed("the body names a field twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _no_number(name: str) -> NoReturn:
    raise ValueError


def _malformed(message: str) -> Refusal:
    return Refusal("malformed", message)
