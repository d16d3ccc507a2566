"""Command lines in shell files: the one that is read, its options, and what starts it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from trainer.errors import InputError

FIX = "correct the file, then run the same command again"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_BEFORE_ASSIGNMENT = ("export", "set")
# What joins the lines of a command in a shell, in cmd and in PowerShell, and stands for it here.
_CONTINUED = re.compile(r"[ \t]*(?:\\|\^|`)[ \t]*\r?\n")
_JOINT = "\0"
# What stands for several words, or for none.
_SEVERAL = re.compile(r"\$(?:[@*]|\{[@*]\}|\{\w+\[[@*]\]\})")
_SETS = re.compile(r"(?:(?:export|set)\s+)?[\"']?[A-Za-z_]\w*=")
_BETWEEN_COMMANDS = ("&&", "||", ";", ";;", "|", "&")
# What starts scripts, by each of its names.
_STARTERS: Mapping[str, str] = {
    **dict.fromkeys(
        ("accelerate", "accelerate-launch", "accelerate.commands.launch"), "accelerate"
    ),
    **dict.fromkeys(("torchrun", "torch.distributed.run", "torch.distributed.launch"), "torchrun"),
    **{name: name for name in ("deepspeed", "srun", "mpirun", "mpiexec")},
}
# An option without a name, which could be taken for the value of one before it.
_SHORT = re.compile(r"-[A-Za-z]")
_REDIRECTION = re.compile(r"(?:\d|&)?>{1,2}(?:&\d|[\w./~${}-]+)?")


@dataclass(frozen=True)
class Other:
    """A command of a file that is not read.

    Args:
        line: its number in the file.
        script: what it runs; empty where a quotation in it does not end.
    """

    line: int
    script: str


@dataclass(frozen=True)
class Command:
    """A command line that runs a Python file.

    Args:
        script: that file, without its folder.
        options: of the script, without dashes.
        starter: the program that starts it, such as accelerate.
        launcher: options of that program.
        others: further commands in the same text.
    """

    script: str
    options: Mapping[str, Any]
    starter: str
    launcher: Mapping[str, Any]
    others: tuple[Other, ...]


class _Call(NamedTuple):
    line: int
    before: list[str]
    script: str
    own: list[str]


def joined_lines(text: str) -> str:
    """A text in which a command that goes on in further lines is one, and lines still count."""
    return _CONTINUED.sub(_JOINT, text)


def read_command(text: str, name: str, scripts: Collection[str]) -> Command:
    """One command in a text: the first that runs one of the scripts, else the first with options.

    Args:
        name: what messages call the text.

    Raises:
        InputError: there is none, quotes in it do not end, or its options are no options.
    """
    calls, unclosed = _calls(text, name, scripts)
    if not calls:
        message = "holds no command that runs a Python file with options"
        hint = "give the whole command, from `accelerate launch` on; a line that goes on ends in \\"
        raise InputError.of(name, message, hint)
    chosen = next((call for call in calls if call.script in scripts), calls[0])
    own = _until_redirection(chosen.own)
    _refuse_nameless(own, name)
    others = [Other(call.line, call.script) for call in calls if call is not chosen]
    others += [Other(line, "") for line in unclosed]
    starter, launching = _started(chosen.before)
    return Command(
        chosen.script,
        dict(_options(own, name)),
        starter,
        dict(_options(launching, name)),
        tuple(sorted(others, key=lambda other: other.line)),
    )


def _calls(text: str, name: str, scripts: Collection[str]) -> tuple[list[_Call], list[int]]:
    """The commands of a text, and the lines after the first in which a quotation does not end."""
    variables: dict[str, str] = {}
    calls: list[_Call] = []
    unclosed: list[int] = []
    for number, line in _lines(text):
        if ".py" not in line and not _SETS.match(line):
            continue
        try:
            words = _words(line)
        except ValueError:
            if not calls:
                message = f"line {number}: a quotation does not end"
                raise InputError.of(name, message, FIX) from None
            unclosed.append(number)
            continue
        for part in _parted(words):
            filled = [each for word in part for each in _filled(word, variables)]
            assignments = _assignments(filled)
            variables |= assignments
            call = None if assignments else _call(filled, number, scripts)
            calls += [call] if call is not None else []
    return calls, unclosed


def _call(words: list[str], line: int, scripts: Collection[str]) -> _Call | None:
    place = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        return None
    script = PurePosixPath(words[place].replace("\\", "/")).name
    own = words[place + 1 :]
    has_options = any(word.startswith("--") for word in own)
    is_known = script in scripts and bool(own)
    return _Call(line, words[:place], script, own) if has_options or is_known else None


def _started(words: Sequence[str]) -> tuple[str, list[str]]:
    """The program that starts a script, and the words between both."""
    programs = [PurePosixPath(w.replace("\\", "/")).name.removesuffix(".exe") for w in words]
    for place, program in enumerate(programs):
        if program in _STARTERS:
            own = [word for word in words[place + 1 :] if not _SHORT.fullmatch(word)]
            return _STARTERS[program], own
    is_python = (place for place, program in enumerate(programs) if program.startswith("python"))
    return "python", list(words[next(is_python, -1) + 1 :])


def _assignments(words: Sequence[str]) -> dict[str, str]:
    """The variables that a command sets, if it does nothing else."""
    named = [word for word in words if word not in _BEFORE_ASSIGNMENT]
    found = [_ASSIGNMENT.fullmatch(word) for word in named]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with what goes on from them, and the number of the first in the file."""
    number = 1
    for line in joined_lines(text).split("\n"):
        yield number, line.replace(_JOINT, " ").strip().removeprefix("!")
        number += 1 + line.count(_JOINT)


def _words(line: str) -> list[str]:
    """The words of a line, and the semicolons between them.

    Raises:
        ValueError: a quotation does not end.
    """
    reader = shlex.shlex(line, posix=True, punctuation_chars=";")
    reader.whitespace_split = True
    return list(reader)


def _parted(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of one line."""
    part: list[str] = []
    for word in words:
        if word in _BETWEEN_COMMANDS:
            yield part
            part = []
        else:
            part.append(word)
    yield part


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


def _filled(word: str, variables: Mapping[str, str]) -> list[str]:
    """A word with the variables that the file sets before; others stay as they are written.

    A variable that stands alone and holds options gives a word for each of its own.
    """
    filled = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), word)
    holds_options = _VARIABLE.fullmatch(word) and filled.lstrip().startswith("--")
    return shlex.split(filled) if holds_options else [filled]


def _until_redirection(words: Sequence[str]) -> Sequence[str]:
    place = next((n for n, w in enumerate(words) if _REDIRECTION.fullmatch(w)), len(words))
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
