"""The command `trainer import`: other programs' configurations become ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from trainer.durable import write_text
from trainer.errors import InputError
from trainer.importers import SCRIPTS, Imported, imported
from trainer.importers.documents import read_document
from trainer.leaves import shown
from trainer.printing import json_option, paper, print_json


@click.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--from", "program", metavar="NAME", help="kohya, ai-toolkit or diffusers.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write. [default: to stdout]",
)
@json_option
def import_(
    files: tuple[str, ...], program: str | None, output: Path | None, as_json: bool
) -> None:
    """Make a configuration of another program's, and tell what becomes of each option.

    FILES are a kohya training file with its data set file, a job of ai-toolkit, or a shell file
    with the command line of a diffusers script; a command line can also be given as one text.
    """
    if output is not None and output.exists():
        raise InputError.of("--output", f"`{output}` exists already", "give another file name")
    found = imported([read_document(file, SCRIPTS) for file in files], program)
    if output is not None:
        write_text(output, found.text)
    if as_json:
        print_json(_data(found, output))
        return
    console = paper() if output is not None else Console(stderr=True, width=120)
    _print(found, console)
    if output is None:
        click.echo(found.text, nl=False)
    else:
        click.echo(f"Written: {output}")


def _data(found: Imported, output: Path | None) -> dict[str, Any]:
    return {
        "program": found.program,
        "files": list(found.files),
        "file": None if output is None else str(output),
        "options": dict(found.values),
        "taken": [asdict(entry) for entry in found.taken],
        "without_counterpart": [asdict(entry) for entry in found.left if entry.matters],
        "not_needed": [asdict(entry) for entry in found.left if not entry.matters],
        "written_out_defaults": [asdict(entry) for entry in found.filled],
        "remarks": list(found.remarks),
    }


def _print(found: Imported, console: Console) -> None:
    """Four tables and the remarks: what a user has to read first comes last."""
    _table(
        console,
        ("taken over", "value", "option", "becomes"),
        [(e.name, shown(e.value), e.option, shown(e.becomes)) for e in found.taken],
    )
    _table(
        console,
        ("without effect on what is trained", "value", "why"),
        [(e.name, shown(e.value), e.reason) for e in found.left if not e.matters],
    )
    _table(
        console,
        ("assumed there, written out", "option", "becomes"),
        [(e.name, e.option, shown(e.becomes)) for e in found.filled],
    )
    _table(
        console,
        ("without a counterpart", "value", "why, and what to do"),
        [(e.name, shown(e.value), e.reason) for e in found.left if e.matters],
    )
    for remark in found.remarks:
        console.print(remark, markup=False, highlight=False)


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
