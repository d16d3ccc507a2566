"""What other programs are started with: TOML and YAML files, and command lines in shell files."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config_files import parse_json, parse_yaml
from trainer.errors import InputError
from trainer.importers.command_lines import FIX, Other, read_command
from trainer.importers.shell_text import Shell, shell_of


@dataclass(frozen=True)
class Document:
    """One file, or one command line.

    Args:
        name: what messages call it.
        folder: that its relative paths may start from.
        form: what it is written in.
        content: option to value; of a command line its options, without dashes.
        script: the file that a command line runs, without its folder.
        starter: the program that starts the script, such as accelerate.
        launcher: options of that program.
        outer: programs that start the starter.
        others: further commands in the same file, which are not read.
    """

    name: str
    folder: Path
    form: Literal["toml", "yaml", "json", "command"]
    content: Mapping[str, Any]
    script: str = ""
    starter: str = ""
    launcher: Mapping[str, Any] | None = None
    outer: tuple[str, ...] = ()
    others: tuple[Other, ...] = ()


def read_document(source: str, scripts: Collection[str] = ()) -> Document:
    """Reads a file, or takes a text that is no file but has options for a command line.

    Args:
        scripts: of several commands in it, the first that runs one of these is read.

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
            return _command(source, "command line", Path(), scripts)
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
    shell = shell_of(ending)
    # Where paths have backslashes.
    text = text if shell == "sh" else text.replace("\\", "/")
    return _command(text, source, path.parent, scripts, shell)


def _toml(text: str, name: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError.of(name, f"is no TOML: {error}", FIX) from error


def refuse_several(document: Document, known: Collection[str], lists: Collection[str]) -> None:
    """Raises where an option of a command line that has one value is given several words.

    Args:
        known: options of the script.
        lists: those of them that may have several values.

    Raises:
        InputError: with the words.
    """
    if document.form != "command":
        return
    for option, value in document.content.items():
        if isinstance(value, list) and option in set(known) - set(lists):
            words = ", ".join(f"`{word}`" for word in value)
            message = f"`--{option}` has one value, and got several words: {words}"
            raise InputError.of(document.name, message, "put the value in double quotes")


def _command(
    text: str, name: str, folder: Path, scripts: Collection[str], shell: Shell = "sh"
) -> Document:
    found = read_command(text, name, scripts, shell)
    return Document(
        name,
        folder,
        "command",
        found.options,
        script=found.script,
        starter=found.starter,
        launcher=found.launcher,
        outer=found.outer,
        others=found.others,
    )
