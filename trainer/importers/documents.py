"""What other programs are started with: TOML and YAML files, and command lines in shell files."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from trainer.config_files import parse_json, parse_yaml
from trainer.errors import InputError

_FIX = "correct the file, then run the same command again"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_BEFORE_ASSIGNMENT = ("export", "set")
# Where paths have backslashes, which a shell would take away.
_WINDOWS = (".bat", ".cmd", ".ps1")
# What ends a command, and what joins its lines in a shell, in cmd and in PowerShell.
_CONTINUED = re.compile(r"[ \t]*(?:\\|\^|`)[ \t]*\r?\n")
# What stands for several words, or for none.
_SEVERAL = re.compile(r"\$(?:[@*]|\{[@*]\}|\{\w+\[[@*]\]\})")
_SETS = re.compile(r"(?:(?:export|set)\s+)?[\"']?[A-Za-z_]\w*=")
_ENDS = ("&&", "||", ";", "|", "&", ">", ">>", "2>&1")


@dataclass(frozen=True)
class Document:
    """One file, or one command line.

    Args:
        name: what messages call it.
        folder: that its relative paths may start from.
        form: what it is written in.
        content: option to value; of a command line its options, without dashes.
        script: the file that a command line runs, without its folder.
        launcher: options of what launches the script, such as accelerate's.
    """

    name: str
    folder: Path
    form: Literal["toml", "yaml", "json", "command"]
    content: Mapping[str, Any]
    script: str = ""
    launcher: Mapping[str, Any] | None = None


def read_document(source: str) -> Document:
    """Reads a file, or takes a text that is no file but has options for a command line.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = Path(source)
    is_command = len(source.split()) > 1 and "--" in source
    try:
        is_file = path.is_file()
    except OSError:
        is_file = False
    if not is_file:
        if is_command:
            return _command(source, "command line", Path())
        raise InputError.of("FILE", f"there is no file `{source}`", "check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError.of(source, "is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise InputError.of(source, f"cannot be read: {error.strerror}", "check it") from error
    ending = path.suffix.lower()
    if ending == ".toml":
        return Document(source, path.parent, "toml", _toml(text, source))
    if ending in (".yaml", ".yml"):
        return Document(source, path.parent, "yaml", parse_yaml(text, source))
    if ending == ".json":
        return Document(source, path.parent, "json", parse_json(text, source))
    if ending in _WINDOWS:
        text = _CONTINUED.sub(" ", text).replace("\\", "/")
    return _command(text, source, path.parent)


def _toml(text: str, name: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError.of(name, f"is no TOML: {error}", _FIX) from error


def _command(text: str, name: str, folder: Path) -> Document:
    """The first command in a text that runs a Python file with options.

    Raises:
        InputError: there is none, or quotes in it do not end.
    """
    variables: dict[str, str] = {}
    for number, line in _lines(text):
        if ".py" not in line and not _SETS.match(line):
            continue
        words = [part for word in _words(line, name, number) for part in _filled(word, variables)]
        assignments = _assignments(words)
        if assignments:
            variables |= assignments
            continue
        place = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
        if place is not None and any(word.startswith("--") for word in words[place:]):
            own = _until_end(words[place + 1 :])
            _refuse_nameless(own, name)
            return Document(
                name,
                folder,
                "command",
                dict(_options(own, name)),
                PurePosixPath(words[place].replace("\\", "/")).name,
                dict(_options(words[:place], name)),
            )
    message = "holds no command that runs a Python file with options"
    hint = "give the whole command, from `accelerate launch` on; a line that goes on ends in \\"
    raise InputError.of(name, message, hint)


def _assignments(words: Sequence[str]) -> dict[str, str]:
    """The variables that a line sets, if it does nothing else."""
    named = [word for word in words if word not in _BEFORE_ASSIGNMENT]
    found = [_ASSIGNMENT.fullmatch(word) for word in named]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with what goes on from them, and the number of the first in the file."""
    number = 1
    for line in _CONTINUED.sub("\0", text).split("\n"):
        yield number, line.replace("\0", " ").strip().removeprefix("!")
        number += 1 + line.count("\0")


def _refuse_nameless(words: Sequence[str], name: str) -> None:
    """Raises where a word belongs to no option, or a variable may stand for options.

    Raises:
        InputError: with the word.
    """
    before = ["", *words]
    for previous, word in zip(before, words, strict=False):
        is_value = previous.startswith("--") and "=" not in previous
        stands_alone = word.startswith("$") and not is_value
        is_first = word == words[0] and not word.startswith("--")
        if is_first or stands_alone or _SEVERAL.fullmatch(word):
            message = f"`{word}` stands for no option by name"
            raise InputError.of(name, message, "write the options themselves in its place")


def _words(line: str, name: str, number: int) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        raise InputError.of(name, f"line {number}: a quotation does not end", _FIX) from None


def _filled(word: str, variables: Mapping[str, str]) -> list[str]:
    """A word with the variables that the file sets before; others stay as they are written.

    A variable that stands alone and holds options gives a word for each of its own.
    """
    filled = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), word)
    holds_options = _VARIABLE.fullmatch(word) and filled.lstrip().startswith("--")
    return shlex.split(filled) if holds_options else [filled]


def _until_end(words: Sequence[str]) -> Sequence[str]:
    place = next((n for n, word in enumerate(words) if word in _ENDS), len(words))
    return words[:place]


def _options(words: Sequence[str], name: str) -> Iterator[tuple[str, Any]]:
    """Each option with its value: true for a bare flag, a list for several values.

    Raises:
        InputError: an option stands there twice.
    """
    seen: set[str] = set()
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("--"):
            continue
        option, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and place < len(words) and not words[place].startswith("--"):
            values.append(words[place])
            place += 1
        option = option.replace("-", "_")
        if option in seen:
            raise InputError.of(name, f"`--{option}` stands there twice", "keep one of them")
        seen.add(option)
        yield option, True if not values else values[0] if len(values) == 1 else values
