"""Command lines in shell files: the one that is read, its options, and what starts it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from trainer.errors import InputError
from trainer.importers.shell_text import PLAIN_DOLLAR, Operator, Shell, lines_of

FIX = "correct the file, then run the same command again"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
# What stands for a value that the file does not set.
UNSET = re.compile(r"\$|%(?:[A-Za-z_]\w*%|~?\w)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_BEFORE_ASSIGNMENT = ("export", "set")
# Of cmd: a variable by name, or an argument of the file with what is to be made of it.
_PERCENT = re.compile(r"%(?:([A-Za-z_]\w*)%|~?\w+)")
# What stands for several words, or for none.
_SEVERAL = re.compile(r"\$(?:[@*]|\{[@*]\}|\{\w+\[[@*]\]\})")
_RELEVANT = re.compile(r"\.py|^[ \t!@]*(?i:(?:export|set)\s+)?[\"']?[A-Za-z_]\w*=")
# Commands that only print their words.
_PRINTS = ("echo", "printf", "write-host", "write-output", "rem")
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
# Dashes and quotation marks that word processors write in place of others.
_WRITTEN = re.compile(r"[\u2010-\u2015\u2212]+[\w-]+(?:=.*)?|[\u2018-\u201f].*|.*[\u2019\u201d]")


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
        outer: programs that start the starter, the first of them first.
        others: further commands in the same text.
    """

    script: str
    options: Mapping[str, Any]
    starter: str
    launcher: Mapping[str, Any]
    outer: tuple[str, ...]
    others: tuple[Other, ...]


class _Call(NamedTuple):
    line: int
    before: list[str]
    script: str
    own: list[str]


def read_command(text: str, name: str, scripts: Collection[str], shell: Shell = "sh") -> Command:
    """One command in a text: the first that runs one of the scripts, else the first with options.

    Args:
        name: what messages call the text.
        shell: that runs it.

    Raises:
        InputError: there is none, quotes in it do not end, or its options are no options.
    """
    calls, unclosed = _calls(text, name, scripts, shell)
    if not calls:
        message = "holds no command that runs a Python file with options"
        hint = "give the whole command, from `accelerate launch` on; a line that goes on ends in \\"
        raise InputError.of(name, message, hint)
    chosen = next((call for call in calls if call.script in scripts), calls[0])
    own = chosen.own
    _refuse_nameless(own, name)
    others = [Other(call.line, call.script) for call in calls if call is not chosen]
    others += [Other(line, "") for line in unclosed]
    starter, launching, outer = _started(chosen.before)
    return Command(
        chosen.script,
        dict(_options(own, name)),
        starter,
        dict(_options(launching, name)),
        outer,
        tuple(sorted(others, key=lambda other: other.line)),
    )


def _calls(
    text: str, name: str, scripts: Collection[str], shell: Shell
) -> tuple[list[_Call], list[int]]:
    """The commands of a text, and the lines after the first in which a quotation does not end."""
    variables: dict[str, str] = {}
    calls: list[_Call] = []
    unclosed: list[int] = []
    for line in lines_of(text, shell, _RELEVANT):
        if line.words is None:
            if not calls:
                message = f"line {line.number}: a quotation does not end"
                raise InputError.of(name, message, FIX)
            unclosed.append(line.number)
            continue
        for part in _parted(line.words):
            filled = [each for word in part for each in _filled(word, variables, shell)]
            assignments = _assignments(filled, shell)
            variables |= assignments
            call = None if assignments else _call(filled, line.number, scripts)
            calls += [call] if call is not None else []
    return calls, unclosed


def _call(words: list[str], line: int, scripts: Collection[str]) -> _Call | None:
    place = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if place is None or words[0].lower().lstrip("@") in _PRINTS:
        return None
    script = PurePosixPath(words[place].replace("\\", "/")).name
    own = words[place + 1 :]
    has_options = any(word.startswith("--") for word in own)
    is_known = script in scripts and bool(own)
    return _Call(line, words[:place], script, own) if has_options or is_known else None


def _started(words: Sequence[str]) -> tuple[str, list[str], tuple[str, ...]]:
    """The program that starts a script, the words between both, and what starts that program."""
    programs = [PurePosixPath(w.replace("\\", "/")).name.removesuffix(".exe") for w in words]
    starters = [place for place, program in enumerate(programs) if program in _STARTERS]
    if starters:
        *before, last = starters
        own = [word for word in words[last + 1 :] if not _SHORT.fullmatch(word)]
        return _STARTERS[programs[last]], own, tuple(_STARTERS[programs[n]] for n in before)
    is_python = (place for place, program in enumerate(programs) if program.startswith("python"))
    return "python", list(words[next(is_python, -1) + 1 :]), ()


def _assignments(words: Sequence[str], shell: Shell) -> dict[str, str]:
    """The variables that a command sets, if it does nothing else."""
    if shell == "cmd" and words and words[0].lower().lstrip("@") == "set":
        # All of the line is the value there, and names are no other in capitals.
        named = " ".join(words[1:])
        match = _ASSIGNMENT.fullmatch(named)
        return {match[1].lower(): match[2].strip()} if match else {}
    named_words = [word for word in words if word not in _BEFORE_ASSIGNMENT]
    found = [_ASSIGNMENT.fullmatch(word) for word in named_words]
    return {match[1]: match[2] for match in found if match} if all(found) else {}


def _parted(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of one line."""
    part: list[str] = []
    for word in words:
        if isinstance(word, Operator):
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
        if is_first or stands_alone or _SEVERAL.fullmatch(word) or _SHORT.fullmatch(word):
            message = f"`{word}` stands for no option by name"
            raise InputError.of(name, message, "write the options themselves in its place")
        if _WRITTEN.fullmatch(word):
            message = f"`{word}` has a dash or a quotation mark of a word processor"
            raise InputError.of(name, message, "write -- and straight quotation marks")


def _filled(word: str, variables: Mapping[str, str], shell: Shell) -> list[str]:
    """A word with the variables that the file sets before; others stay as they are written.

    A variable that stands alone and holds options gives a word for each of its own.
    """
    if shell == "cmd":
        variable = _PERCENT
        filled = _PERCENT.sub(lambda m: variables.get((m[1] or "").lower(), m[0]), word)
    else:
        variable = _VARIABLE
        filled = _VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[0]), word)
        filled = filled.replace(PLAIN_DOLLAR, "$")
    holds_options = variable.fullmatch(word) and filled.lstrip().startswith("--")
    return shlex.split(filled) if holds_options else [filled]


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
