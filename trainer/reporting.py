"""The command `trainer report`: a run as a page."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.errors import InputError
from trainer.job import RunFolder
from trainer.printing import emit, json_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def report(run: Path, as_json: bool) -> None:
    """Make RUN's report.html anew: what it learnt, how it went, how to use it.

    A training writes it at its end; made again, it has the pictures of `trainer sample` too.
    """
    from trainer.report.page import write_report  # noqa: PLC0415 - Pillow is not needed for --help

    folder = RunFolder(run)
    if not folder.config.exists():
        hint = "give a folder that `trainer train` has written to, such as runs/me"
        raise InputError.of("RUN", f"`{run}` is not the folder of a training that began", hint)
    written = write_report(folder, folder.read_result())
    emit({"file": str(written)}, as_json, lambda data: click.echo(data["file"]))
