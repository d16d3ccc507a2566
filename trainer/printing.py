"""How data is printed: as JSON, as pairs, as tables; talk goes to stderr."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from trainer.listeners import deserves_a_line

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")


def hush_libraries() -> None:
    """Leaves only errors of libraries that remark on optional packages when they are loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
