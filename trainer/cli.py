"""The command line: thin commands that import what they need when they run.

Data goes to stdout, talk to stderr; `--json` makes the data JSON. A failure is one line
`error[kind]: …` and the kind's exit code. Hyperparameter flags come from `trainer.flags`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from trainer import __version__
from trainer.collection import importing
from trainer.errors import DiskError, InputError, TrainerError
from trainer.flags import HyperparameterCommand, configuration
from trainer.generating import generate
from trainer.importing import import_
from trainer.launchers import is_main_process, leave_exit_code
from trainer.leaves import SAID_ELSEWHERE, nearest
from trainer.lora_files import convert, inspect
from trainer.picturing import compare, sample
from trainer.printing import (
    checked,
    diagnosis,
    emit,
    hush_libraries,
    json_option,
    open_streams,
    pairs,
    paper,
    prepared,
    print_json,
    talk,
)
from trainer.reporting import report
from trainer.serving import health, serve

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.job import Result, RunFolder
    from trainer.listeners import Summary
    from trainer.runner import Events, Stop

PROGRAM = "trainer"
INTERRUPTED_AT_ONCE = 130

request_argument = click.argument("request", required=False, type=click.Path(path_type=Path))
overrides_argument = click.argument("overrides", nargs=-1, type=click.Path(path_type=Path))
output_option = click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Run folder; one with checkpoints is gone on from. [default: runs/<output_name>]",
)
preset_option = click.option("--preset", metavar="NAME", help="Start from a preset.")
dialect_option = click.option(
    "--dialect", metavar="NAME", help="REQUEST is a JSON request to this service, such as fal."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Trains image models on a handful of photographs, on your own machine."""


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@output_option
@preset_option
@dialect_option
@click.option(
    "--seal-network",
    is_flag=True,
    help="Refuse network connections once pictures and base model are there.",
)
@json_option
def train(
    request: Path | None,
    overrides: tuple[Path, ...],
    output: Path | None,
    preset: str | None,
    dialect: str | None,
    seal_network: bool,
    as_json: bool,
) -> int:
    """Train: photographs in, verified files out.

    REQUEST is a configuration file (.yaml or .json), or with --dialect a request to that
    service; OVERRIDES are configuration files over it. Flags win over files, a later file over an
    earlier one, files over the preset, the preset over the defaults.
    """
    from trainer.job import RunFolder
    from trainer.listeners import Summary, progress_for
    from trainer.publishing import published
    from trainer.runner import stop_on_signals, supervise
    from trainer.seal import sealed
    from trainer.trackers import logs_for

    with stop_on_signals() as stop:
        config = configuration(request, preset, dialect, overrides)
        engine = sealed(_engine, config) if seal_network else _engine
        engine = published(engine, config, stop)
        folder = RunFolder(output or Path("runs") / config.output.output_name)
        summary = Summary()
        logs = logs_for(config, folder) if is_main_process() else []
        displays = [progress_for(talk(), config.resolved.explicit), summary]
        result = supervise(config, folder, [*logs, *displays], engine=engine, stop=stop)
        if is_main_process():
            _report(result, folder, summary, dialect=dialect, as_json=as_json)
    return result.exit_code


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@output_option
@preset_option
@dialect_option
@click.option("--with-result", is_flag=True, help="Leave events.jsonl and result.json, as train.")
@json_option
def prepare(
    request: Path | None,
    overrides: tuple[Path, ...],
    output: Path | None,
    preset: str | None,
    dialect: str | None,
    with_result: bool,
    as_json: bool,
) -> None:
    """Prepare pictures, masks and captions, to be looked at before training.

    Writes the contact sheet, and what `train` with the same options and run folder goes on from.
    """
    from trainer.job import RunFolder
    from trainer.listeners import EventLog, Listener, progress_for
    from trainer.runner import result_left, stop_on_signals, watched

    with ExitStack() as stack, stop_on_signals() as stop:
        config = configuration(request, preset, dialect, overrides)
        folder = RunFolder(output or Path("runs") / config.output.output_name)
        listeners: list[Listener] = [progress_for(talk(), config.resolved.explicit)]
        if with_result:
            stack.enter_context(result_left(folder))
            listeners.append(EventLog(folder))
        hush_libraries()
        from trainer import preparing

        watched(preparing.prepare(config, folder, stop), folder, listeners)
    emit(preparing.report(config, folder), as_json, prepared)


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@preset_option
@dialect_option
@json_option
def validate(
    request: Path | None,
    overrides: tuple[Path, ...],
    preset: str | None,
    dialect: str | None,
    as_json: bool,
) -> None:
    """Check configuration and pictures, without loading a model."""
    config = configuration(request, preset, dialect, overrides)
    from trainer.inspection import inspect_pictures

    report = inspect_pictures(config)
    notes = [note.model_dump() for note in config.resolved.notes]
    emit(
        {
            "config": config.values(),
            "notes": notes,
            "explicit": list(config.resolved.explicit),
            "data": report.as_dict(),
        },
        as_json,
        checked,
    )


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@preset_option
@dialect_option
@click.option(
    "--hourly",
    type=click.FloatRange(min=0),
    help="Price of this machine per hour, in any currency.",
)
@json_option
def estimate(
    request: Path | None,
    overrides: tuple[Path, ...],
    preset: str | None,
    dialect: str | None,
    hourly: float | None,
    as_json: bool,
) -> None:
    """Tell steps, memory, time and cost of a training before it runs."""
    config = configuration(request, preset, dialect, overrides)
    hush_libraries()
    from trainer.estimate import estimate as estimate_training

    emit(estimate_training(config, hourly=hourly).as_dict(), as_json, pairs)


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@preset_option
@click.option("--dialect", metavar="NAME", required=True, help="Service that is asked.")
@json_option
def request(
    request: Path | None,
    overrides: tuple[Path, ...],
    preset: str | None,
    dialect: str,
    as_json: bool,
) -> None:
    """Print the request that asks a service for a configuration's training.

    REQUEST is a configuration file, OVERRIDES are configuration files over it.
    """
    from trainer.dialects import request_of

    del as_json  # the request is JSON either way
    print_json(request_of(dialect, configuration(request, preset, None, overrides)))


for command in (import_, inspect, convert, generate, sample, compare, report, serve, health):
    cli.add_command(command)


@cli.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of configuration files."""
    from trainer.leaves import json_schema

    del as_json  # the schema is JSON either way
    print_json(json_schema())


@cli.group()
def presets() -> None:
    """List, show and copy ready-made configurations."""


@presets.command("list")
@json_option
def list_presets(as_json: bool) -> None:
    """Name every preset with what it is for."""
    from trainer import presets as shelf

    emit({preset.name: preset.description for preset in shelf.list_presets()}, as_json, pairs)


@presets.command("show")
@click.argument("name")
@json_option
def show_preset(name: str, as_json: bool) -> None:
    """Print a preset."""
    from trainer import presets as shelf
    from trainer.config_files import parse_yaml

    text = shelf.preset_text(name)
    emit(parse_yaml(text, name), as_json, lambda _: click.echo(text, nl=False))


@presets.command("copy")
@click.argument("name")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@json_option
def copy_preset(name: str, target: Path | None, as_json: bool) -> None:
    """Copy a preset into a file of your own, by default NAME.yaml here."""
    from trainer import presets as shelf
    from trainer.durable import write_text

    text = shelf.preset_text(name)
    target = target or Path(f"{name}.yaml")
    if target.exists():
        raise InputError.of("TARGET", f"`{target}` exists already", "give another file name")
    write_text(target, text)
    emit({"file": str(target)}, as_json, pairs)


@cli.command()
@json_option
def doctor(as_json: bool) -> int:
    """Look for faults of this installation, with the line that fixes each."""
    hush_libraries()
    from trainer.doctor import examine

    findings = [asdict(finding) for finding in examine()]
    failed = any(finding["status"] == "fail" for finding in findings)
    emit({"healthy": not failed, "findings": findings}, as_json, diagnosis)
    return int(failed)


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    emit({"version": __version__}, as_json, lambda data: click.echo(data["version"]))


def main() -> None:
    """The console script."""
    from trainer.runner import hurry_on_signals

    sys.excepthook = _report_bug
    data = open_streams()
    code = run(sys.argv[1:])
    if (failure := data.failure) is not None and code == 0:
        code = _complain(_unwritten(failure), as_json=False)
    leave_exit_code(code)
    hurry_on_signals(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code; what users do wrong becomes a message."""
    as_json = "--json" in arguments
    try:
        code = cli.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.UsageError as error:
        return _complain(_usage_problem(error), as_json)
    except TrainerError as error:
        return _complain(error, as_json)
    except click.Abort:
        click.echo("stopped at once; what was published before is kept", err=True)
        return INTERRUPTED_AT_ONCE
    return code or 0


def _engine(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Events:
    """The engine; torch takes seconds to import, so a folder in use is refused before."""
    hush_libraries()
    with importing():
        from trainer import engine

    yield from engine.run(config, folder, stop)


def _report(
    result: Result, folder: RunFolder, summary: Summary, *, dialect: str | None, as_json: bool
) -> None:
    """Says how a training ended: to people, or as JSON in our own or a service's shape."""
    from trainer.runner import way_on

    data = result.model_dump(mode="json") | {"folder": str(folder.root.resolve())}
    if dialect is not None and result.status == "done":
        data = _answer(result, folder, dialect)
    if result.error_kind is not None:
        _say_error(result.error_kind, f"{result.error}", result.hint or "")
    if result.status == "interrupted":
        sentence, command = way_on()
        click.echo(f"{sentence}\n  {command}", err=True)
    if as_json:
        print_json(data)
    elif result.status == "done":
        paper().print(summary.table(result))
        click.echo(f"Files are in {folder.outputs.resolve()}")
    if not as_json and result.total_steps and folder.report.exists():
        click.echo(f"Open this report: {folder.report.resolve()}")


def _answer(result: Result, folder: RunFolder, dialect: str) -> dict[str, Any]:
    """What the service would answer, written beside the result."""
    from trainer.dialects import load_dialect
    from trainer.durable import write_text

    root = folder.root.resolve()
    output = load_dialect(dialect).to_output(result, lambda file: (root / file.path).as_uri())
    data: dict[str, Any] = output.model_dump(mode="json", exclude_none=True)
    write_text(folder.answer(dialect), json.dumps(data, indent=2) + "\n")
    return data


def _usage_problem(error: click.UsageError) -> InputError:
    """What click found wrong with a command line, in our own words' shape."""
    help_hint = f"see `{error.ctx.command_path} --help`" if error.ctx else ""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        near = " or ".join(f"`{name}`" for name in error.possibilities or [])
        hint = f"did you mean {near}?" if near else help_hint
        hint = SAID_ELSEWHERE.get(error.option_name.lstrip("-").replace("-", "_"), hint)
        return InputError.of(error.option_name, "there is no such option", hint)
    if isinstance(error, click.NoSuchCommand):
        hint = nearest(error.command_name, tuple(cli.commands)) or help_hint
        return InputError.of(error.command_name, "there is no such command", hint)
    return InputError.of("command line", message, help_hint)


def _complain(error: TrainerError, as_json: bool) -> int:
    from trainer.job import Result

    # Of the processes of one machine, all find the same wrong with what they all are given.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        click.echo(str(error), err=True)
    if as_json and is_main_process():
        print_json(Result.of_error(error).model_dump(mode="json"))
    return error.exit_code


def _unwritten(failure: OSError) -> DiskError:
    """What a command says that did its work but could not print its data."""
    hint = "make room where it goes, then run the same command again"
    return DiskError(f"stdout could not be written: {failure.strerror}", hint)


def _say_error(kind: str, message: str, hint: str) -> None:
    lines = [*message.splitlines(), *([f"  hint: {hint}"] if hint else [])]
    for line in lines:
        click.echo(line if line.startswith("  ") else f"error[{kind}]: {line}", err=True)


def _report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    leave_exit_code(TrainerError.exit_code)
    sys.__excepthook__(kind, error, trace)
    click.echo("error[internal]: this is a bug in the trainer; please report the above", err=True)
