"""How data is printed: as JSON, as pairs, as tables; talk goes to stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table

from trainer.listeners import deserves_a_line

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")


def hush_libraries() -> None:
    """Leaves only errors of libraries that remark on optional packages when they are loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Unfailing(io.RawIOBase):
    """A file that may be closed at its other end, or full: what is written then is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any) -> int:
        try:
            return os.write(self._descriptor, content)
        except OSError as error:
            self.failure = error
        return memoryview(content).nbytes


class Unfailing(io.TextIOWrapper):
    """A standard stream: nobody's listening is no reason to end a training.

    Ctrl-C ends `tee` too, and a terminal that closes cannot be written to.

    Args:
        descriptor: of the stream.
        encoding: of its text.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        self._file = _Unfailing(descriptor)
        writer = io.BufferedWriter(self._file)
        super().__init__(writer, encoding, "backslashreplace", line_buffering=True)

    @property
    def failure(self) -> OSError | None:
        """Why something could not be written, unless it is that its reader had enough."""
        self.flush()
        return None if isinstance(self._file.failure, BrokenPipeError) else self._file.failure


def open_streams() -> Unfailing:
    """Puts streams that do not fail in the place of stderr and stdout, and gives the latter.

    A stream, stdin too, that was closed when the program began becomes the null device: the next
    file that is opened would have its number, and what libraries say would be written into that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - until the end
    sys.stderr = _instead_of(sys.stderr, 2)
    sys.stdout = data = _instead_of(sys.stdout, 1)
    return data


def _instead_of(stream: TextIO | None, descriptor: int) -> Unfailing:
    if stream is None:
        return Unfailing(os.open(os.devnull, os.O_WRONLY))
    return Unfailing(descriptor, stream.encoding)


def talk() -> Console:
    return Console(stderr=True)


def paper() -> Console:
    """The console of stdout; wide enough for file names where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def emit(data: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]) -> None:
    if as_json:
        print_json(data)
    else:
        show(data)


def print_json(data: Mapping[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def pairs(data: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in data.items():
        table.add_row(name, _in_words(value))
    paper().print(table, markup=False, highlight=False)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return "unknown" if value is None else str(value)


def checked(data: Mapping[str, Any]) -> None:
    report = data["data"]
    table = Table("picture", "size", "caption", "remark")
    for picture in report["pictures"]:
        height, width = picture["size"] or ("?", "?")
        table.add_row(picture["name"], f"{width}x{height}", picture["caption"], picture["problem"])
    paper().print(table, markup=False, highlight=False)
    for advice in report["advice"]:
        print_advice(advice["lines"])
    notes = [*data["notes"], *report["notes"]]
    print_notes(n for n in notes if deserves_a_line(n["kind"], n["field"], data["explicit"]))
    click.echo(f"{report['num_usable']} of {len(report['pictures'])} pictures can be used")


def prepared(data: Mapping[str, Any]) -> None:
    """What was prepared: a row for each picture and piece of advice, notes, and the sheets."""
    for group in data["sets"]:
        table = Table("picture", "size", "trained", "caption", "remarks")
        for picture in group["pictures"]:
            remarks = [r["text"] for r in picture["remarks"] if r["kind"] == "warning"]
            table.add_row(
                picture["name"],
                _size(picture["size"]),
                _size(picture["trained_size"]),
                picture["caption"],
                "; ".join(remarks),
            )
        for picture in group["left_out"]:
            table.add_row(picture["name"], "", "left out", "", picture["reason"])
        paper().print(table, markup=False, highlight=False)
        print_advice(group["advice"]["lines"])
    print_notes(note for group in data["sets"] for note in group["notes"])
    for group in data["sets"]:
        for path in group["contact_sheets"]:
            click.echo(f"Open this contact sheet: {path}")


# How much a line of advice matters.
_MARKS = {"ok": "ok", "look": "look at", "act": "mend"}


def print_advice(lines: Sequence[Mapping[str, str]]) -> None:
    """What a set of pictures is like, one row a topic; nothing where there is no advice."""
    if not lines:
        return
    table = Table("topic", "", "found", "advice")
    for line in lines:
        table.add_row(line["topic"], _MARKS[line["level"]], line["found"], line["advice"])
    paper().print(table, markup=False, highlight=False)


def print_notes(notes: Iterable[Mapping[str, str]]) -> None:
    """Notes as lines of talk, each once."""
    lines = [f"{note['kind']}: `{note['field']}`: {note['message']}" for note in notes]
    for line in dict.fromkeys(lines):
        click.echo(line, err=True)


def _size(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height}"


def diagnosis(data: Mapping[str, Any]) -> None:
    for finding in data["findings"]:
        click.echo(f"{finding['status']:<5} {finding['check']}: {finding['message']}")
        if finding["fix"]:
            click.echo(f"      fix: {finding['fix']}")
