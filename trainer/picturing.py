"""`trainer sample` and `trainer compare`: pictures of many prompts, in one grid to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from trainer.collection import importing
from trainer.errors import InputError
from trainer.events import Event
from trainer.generating import worker
from trainer.generation import STRONGEST, column_text
from trainer.job import RunFolder
from trainer.listeners import progress_for
from trainer.picture_folder import GRID, PictureFolder
from trainer.printing import emit, hush_libraries, json_option, paper, talk
from trainer.runner import stop_on_signals, watched

_ALLOWED = f"numbers from -{STRONGEST:g} to {STRONGEST:g}, each once, such as 0,0.5,1"

prompts_option = click.option(
    "--prompts",
    metavar="FILE",
    help="Prompt library in YAML, or one that ships: default, person, product, style.",
)
subject_option = click.option(
    "--subject",
    help="What {subject} in prompts stands for. [default: what the run's captions call it]",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    help="Of the noise of every prompt. [default: the prompt's own, or 0]",
)
steps_option = click.option(
    "--steps",
    type=click.IntRange(1),
    help="Of denoising. [default: the prompt's own, or the base model's]",
)
width_option = click.option(
    "--width", type=click.IntRange(32), help="In pixels. [default: the base model's own]"
)
height_option = click.option(
    "--height", type=click.IntRange(32), help="In pixels. [default: the base model's own]"
)

likeness_option = click.option(
    "--likeness",
    "likeness_model",
    metavar="MODEL",
    help="Measure likeness to the training pictures by this CLIP: a folder or hub id.",
)


def _strengths(_: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    """Strengths as they are typed.

    Raises:
        InputError: one is no number, out of range, or there twice.
    """
    try:
        # Zero has no sign.
        values = tuple(float(part) + 0.0 for part in text.split(","))
    except ValueError:
        values = ()
    is_right = all(-STRONGEST <= value <= STRONGEST for value in values)
    if not values or not is_right or len(set(values)) < len(values):
        raise InputError.of(option.opts[0], f"got `{text}`; allowed: {_ALLOWED}")
    return values


@click.command()
@click.argument("run", type=click.Path())
@prompts_option
@click.option(
    "--strengths",
    default="0,0.5,1",
    callback=_strengths,
    help="Of the run, each a column: 0 is the base model, 1 the trained one. [default: 0,0.5,1]",
)
@subject_option
@seed_option
@steps_option
@width_option
@height_option
@likeness_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the pictures. [default: pictures in the run]",
)
@json_option
def sample(
    run: str,
    strengths: tuple[float, ...],
    prompts: str | None,
    subject: str | None,
    likeness_model: str | None,
    output: Path | None,
    as_json: bool,
    **look: Any,
) -> None:
    """Make a picture of each prompt of a library at several strengths of RUN, a finished run.

    Rows of the grid are prompts, columns strengths; a prompt has the same noise in all of them.
    Pictures of an earlier sampling in the folder are replaced; the run's report.html shows them,
    unless they go to another folder.
    """
    hush_libraries()
    _refuse_no_run([run])
    with stop_on_signals() as stop:
        with importing():
            from trainer import sampled_runs  # noqa: PLC0415 - torch takes seconds to import
            from trainer.lineup import Look  # noqa: PLC0415 - likewise

        asked = sampled_runs.Sampling(
            run, strengths, prompts, subject, Look(**look), likeness_model, output
        )
        _make(sampled_runs.sample(asked, worker(), stop), asked.folder)
        if output is None:
            _tell_in_report(RunFolder(Path(run)))
    names = [column_text(strength) for strength in strengths]
    emit(_index_in(asked.folder), as_json, lambda data: _show(names, data, asked.folder))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@prompts_option
@click.option(
    "--strength",
    type=click.FloatRange(-STRONGEST, STRONGEST),
    default=1.0,
    help="Of every run: 0 is the base model. [default: 1]",
)
@subject_option
@seed_option
@steps_option
@width_option
@height_option
@likeness_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("compare"),
    help="Folder for the pictures. [default: compare]",
)
@json_option
def compare(
    runs: tuple[str, ...],
    prompts: str | None,
    strength: float,
    subject: str | None,
    likeness_model: str | None,
    output: Path,
    as_json: bool,
    **look: Any,
) -> None:
    """Make the same pictures with each of RUNS, finished runs, and with their base model.

    Rows of the grid are prompts, columns the base model and the runs; all have the same noise and
    size. {subject} in a prompt is what each run calls its own.
    """
    hush_libraries()
    _refuse_no_run(runs)
    with stop_on_signals() as stop:
        with importing():
            from trainer import compared_runs  # noqa: PLC0415 - torch takes seconds to import
            from trainer.lineup import Look  # noqa: PLC0415 - likewise

        asked = compared_runs.Comparison(
            runs, strength, output, prompts, subject, Look(**look), likeness_model
        )
        _make(compared_runs.compare(asked, worker(), stop), asked.folder)
    found = _index_in(asked.folder)
    names = [column["name"] for column in found["columns"]]
    emit(found, as_json, lambda data: _show(names, data, asked.folder))


def _tell_in_report(run: RunFolder) -> None:
    from trainer.report.page import write_report  # noqa: PLC0415 - Pillow is not needed for --help

    write_report(run, run.read_result())


def _refuse_no_run(runs: Sequence[str]) -> None:
    """Refuses what is no folder before anything large is imported, or any folder made.

    Raises:
        InputError: there is such a one.
    """
    missing = [run for run in runs if not Path(run).is_dir()]
    if missing:
        hint = "give the folder of a finished run, such as runs/me"
        raise InputError.of("RUN", f"there is no folder `{missing[0]}`", hint)


def _make(events: Iterator[Event], folder: PictureFolder) -> None:
    watched(events, RunFolder(folder.root), [progress_for(talk())])


def _index_in(folder: PictureFolder) -> dict[str, Any]:
    index: dict[str, Any] = json.loads(folder.index.read_bytes())
    return index


def _show(columns: Sequence[str], data: Mapping[str, Any], folder: PictureFolder) -> None:
    """The likeness of all pictures where it was measured, and where the grid is."""
    if data["likeness_model"] is not None:
        paper().print(likeness_table(columns, data))
    click.echo(f"Open this grid: {folder.root / GRID}")


def likeness_table(columns: Sequence[str], data: Mapping[str, Any]) -> Table:
    """Likeness of pictures: a row for each prompt, and their mean.

    Args:
        columns: what stands above them.
        data: the index of the pictures, row by row.
    """
    values = [picture["likeness"] for picture in data["pictures"]]
    table = Table(title="likeness to the training pictures")
    table.add_column("prompt", overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right")
    for row, prompt in enumerate(data["prompts"]):
        of_row = values[row * len(columns) : (row + 1) * len(columns)]
        table.add_row(Text(prompt["name"]), *(f"{value:.3f}" for value in of_row))
    table.add_section()
    means = [fmean(values[column :: len(columns)]) for column in range(len(columns))]
    table.add_row("mean", *(f"{mean:.3f}" for mean in means))
    return table
