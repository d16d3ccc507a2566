"""`trainer generate`: for people one request, for programs one after the other from stdin.

Whoever makes the pictures of a folder holds its lock and writes its `result.json` last.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from pydantic import ValidationError

from trainer.collection import importing
from trainer.config_files import read_config_file
from trainer.errors import InputError, Interrupted, TrainerError
from trainer.events import Event, FileEvent, NoteEvent
from trainer.generation import (
    GenerationFolder,
    GenerationRequest,
    PictureFormat,
    Trained,
    problems_of,
)
from trainer.job import Result, RunFolder
from trainer.listeners import EventLog, Listener, progress_for
from trainer.printing import hush_libraries, print_json, talk
from trainer.resolve import resolve
from trainer.runner import Stop, stop_on_signals

if TYPE_CHECKING:
    from trainer.inference import Worker

# Seconds between two looks at whether the worker is to end while it has nothing to do.
_IDLE = 0.5
_CHUNK = 65536


@click.command()
@click.argument("runs", nargs=-1, type=click.Path())
@click.option("--prompt", help="What to show. [default: the first run's instance prompt]")
@click.option("--negative-prompt", help="What guidance leads away from.")
@click.option(
    "--strength", type=float, default=1.0, help="Of every run: 0 is the base model. [default: 1]"
)
@click.option("--seed", type=int, help="Picture n is made from (seed, n). [default: 0]")
@click.option("--num-images", type=int, help="How many. [default: 1]")
@click.option("--width", type=int, help="In pixels. [default: the base model's own]")
@click.option("--height", type=int, help="In pixels. [default: the base model's own]")
@click.option("--steps", "num_inference_steps", type=int, help="Of denoising.")
@click.option("--guidance-scale", type=float, help="How closely to follow the prompt.")
@click.option("--scheduler", help="Sampler: a class of diffusers. [default: the base model's own]")
@click.option("--karras", is_flag=True, help="Space the sampler's noise levels as Karras et al.")
@click.option("--clip-skip", type=int, help="CLIP's layer for the prompt: 1 is the last.")
@click.option("--format", "output_format", type=click.Choice(get_args(PictureFormat)))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the pictures. [default: pictures/<name of the first run>]",
)
@click.option("--stdin", "from_stdin", is_flag=True, help="Serve folders with generation.json.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")
def generate(
    runs: tuple[str, ...],
    prompt: str | None,
    strength: float,
    output: Path | None,
    from_stdin: bool,
    as_json: bool,
    **asked: Any,
) -> int:
    """Make pictures with what RUNS, folders of finished runs, have learnt.

    With --stdin every line of stdin names a folder with a request in `generation.json`; a line of
    JSON on stdout says when its pictures and `result.json` are there.
    """
    hush_libraries()
    if from_stdin:
        with stop_on_signals() as stop:
            serve(_lines(stop), stop, lambda data: click.echo(json.dumps(data)))
        return 0
    if not runs:
        raise InputError.of("RUNS", "no run is given", "trainer generate runs/me")
    given = {name: value for name, value in asked.items() if value is not None}
    prompt = prompt or _instance_prompt(runs[0])
    try:
        trained = tuple(Trained(run=run, strength=strength) for run in runs)
        request = GenerationRequest(prompt=prompt, trained=trained, **given)
    except ValidationError as error:
        raise InputError(problems_of(error, "command line")) from error
    folder = GenerationFolder(output or Path("pictures") / Path(runs[0]).resolve().name)
    return _for_people(request, folder, as_json=as_json)


def serve(lines: Iterator[str], stop: Stop, say: Callable[[dict[str, Any]], None]) -> None:
    """Makes the pictures of one folder after the other; no failed request ends it.

    Args:
        lines: folders.
        stop: asked after every picture; true ends it, without a result for that folder.
        say: told of every finished request.
    """
    maker = worker()
    for line in lines:
        folder = GenerationFolder(Path(line))
        try:
            status = answered(maker, folder, folder.read_request, stop, []).status
        except Interrupted:
            return
        except TrainerError as error:
            click.echo(str(error), err=True)
            status = "failed"
        say({"folder": line, "status": status})


def answered(
    worker: Worker,
    folder: GenerationFolder,
    read: Callable[[], GenerationRequest],
    stop: Stop,
    listeners: Sequence[Listener],
) -> Result:
    """Makes a folder's pictures, and writes the result as the last act.

    Raises:
        Interrupted: it was stopped; there is no result then.
        InputError: the folder is in use, or is that of a training.
        DiskError: the folder is not there, or cannot be written.
    """
    run = folder.run
    if run.config.exists() or run.checkpoints.exists():
        message = f"`{run.root}` is the folder of a training"
        raise InputError.of("--output", message, "give another folder")
    with run.lock(), ExitStack() as stack:
        for listener in (heard := [EventLog(run), *listeners]):
            stack.enter_context(listener)
        run.forget_result()
        _remove_pictures(run)
        told = _Told()
        try:
            request = read()
            _tell(worker.generate(request, run, stop), heard, told)
            files = [run.describe("picture", run.root / path) for path in told.files]
            result = Result(
                status="done",
                exit_code=0,
                step=len(files),
                total_steps=request.num_images,
                files=tuple(files),
            )
        except Interrupted:
            raise
        except TrainerError as error:
            result = Result.of_error(error, step=len(told.files))
        result = result.model_copy(update={"ignored_options": told.ignored})
        run.write_result(result)
    return result


@dataclass
class _Told:
    """What a result keeps of what was said: pictures, and options without an effect."""

    files: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)


def _tell(events: Iterator[Event], listeners: Sequence[Listener], told: _Told) -> None:
    for event in events:
        for listener in listeners:
            listener.hear(event)
        if isinstance(event, FileEvent):
            told.files.append(event.path)
        elif isinstance(event, NoteEvent) and event.note == "ignored":
            told.ignored[event.field] = event.message


def _remove_pictures(run: RunFolder) -> None:
    """Pictures of an earlier request; anything else in the folder stays."""
    for kind in get_args(PictureFormat):
        for path in run.outputs.glob(f"*.{kind}"):
            if path.stem.isdecimal():
                path.unlink()


def _for_people(request: GenerationRequest, folder: GenerationFolder, *, as_json: bool) -> int:
    made = folder.run.create()
    with stop_on_signals() as stop:
        try:
            result = answered(worker(), folder, lambda: request, stop, [progress_for(talk())])
        except InputError:
            if made:
                folder.run.take_back(made)
            raise
    if result.error_kind is not None:
        lines = [f"error[{result.error_kind}]: {result.error}"]
        click.echo(
            "\n".join([*lines, *([f"  hint: {result.hint}"] if result.hint else [])]), err=True
        )
    if as_json:
        print_json(result.model_dump(mode="json") | {"folder": str(folder.root.resolve())})
    else:
        for file in result.files:
            click.echo(folder.root / file.path)
    return result.exit_code


def worker() -> Worker:
    """What makes pictures; it keeps the base model."""
    with importing():
        from trainer.inference import Worker  # noqa: PLC0415 - torch takes seconds to import

    return Worker()


def _instance_prompt(run: str) -> str:
    """What the run's pictures are called.

    Raises:
        InputError: the run is not there, or has no such prompt.
    """
    config = resolve(read_config_file(RunFolder(Path(run)).config))
    prompts = [subject.instance_prompt for subject in config.subjects() if subject.instance_prompt]
    if not prompts:
        raise InputError.of("--prompt", f"is missing, and run `{run}` has no instance_prompt")
    return prompts[0]


def _lines(stop: Stop) -> Iterator[str]:
    """Lines of stdin as they come, until it ends or a wish to stop comes.

    Looks at stdin with a limit, for a signal does not end a read.
    """
    source, rest = sys.stdin.fileno(), b""
    while not stop():
        if not select.select([source], [], [], _IDLE)[0]:
            continue
        chunk = os.read(source, _CHUNK)
        *whole, rest = (rest + chunk).split(b"\n")
        if not chunk:
            whole = [rest]
        for line in whole:
            if line.strip() and not stop():
                yield os.fsdecode(line.strip())
        if not chunk:
            return
