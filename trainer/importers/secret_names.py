"""Keys and passwords among other programs' options: they are never shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(not shown)"
# The words of a name, be they parted by signs or by capital letters.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# What makes a name one of a credential, wherever it stands in it.
_ALWAYS = (
    *("password", "passwd", "passphrase", "pwd", "secret", "credential"),
    *("apikey", "accesskey", "secretkey", "privatekey"),
)
# What does so at the end of a name, and before it where the value is text: a token is also a
# piece of a caption, and then it is counted.
_OFTEN = ("key", "auth", "bearer", "pat")
_TOKEN = "token"
# What such values look like, wherever they stand: those of the hub, of GitHub and of services
# that follow them, and what an address has before its host.
_SHAPES = re.compile(
    r"\b(?:hf_|sk-|gh[opsur]_|github_pat_)[\w-]{8,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def is_secret(name: str, *, is_text: bool = False) -> bool:
    """Whether an option is a key or password by its name.

    Args:
        is_text: whether its value is text other than a number.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if any(word.removesuffix("s").endswith(_ALWAYS) for word in words):
        return True
    often = [word.removesuffix("s") in _OFTEN or word.endswith(_TOKEN) for word in words]
    return any(often if is_text else often[-1:])


def without_secrets(name: str, value: Any) -> Any:
    """The value of an option as it may be shown: keys and passwords in it are hidden."""
    if (
        value is not None
        and not isinstance(value, bool)
        and is_secret(name, is_text=_is_text(value))
    ):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: without_secrets(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets("", inner) for inner in value]
    return _SHAPES.sub(HIDDEN, value) if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    """Whether a value is text other than a number, or may hold such."""
    if not isinstance(value, str):
        return not isinstance(value, bool | int | float)
    try:
        float(value)
    except ValueError:
        return True
    return False
