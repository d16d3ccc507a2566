"""The command line: thin commands that import what they need when they run.

Data goes to stdout, talk to stderr; `--json` makes the data JSON. A failure is one line
`error[kind]: …` and the kind's exit code. Hyperparameter flags come from `trainer.flags`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from trainer import __version__
from trainer.errors import InputError, TrainerError
from trainer.flags import HyperparameterCommand, configuration
from trainer.leaves import nearest
from trainer.printing import checked, diagnosis, emit, pairs, paper, prepared, print_json, talk

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.events import Event
    from trainer.job import Result, RunFolder
    from trainer.listeners import Summary
    from trainer.names import KohyaNames
    from trainer.runner import Stop

PROGRAM = "trainer"
INTERRUPTED_AT_ONCE = 130

# Failures that each process of a training meets alike: said by the main one alone.
MET_BY_EVERY_PROCESS = ("input", "interrupted", "checkpoint")

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
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")


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
@json_option
def train(
    request: Path | None,
    overrides: tuple[Path, ...],
    output: Path | None,
    preset: str | None,
    dialect: str | None,
    as_json: bool,
) -> int:
    """Train: photographs in, verified files out.

    REQUEST is a configuration file (.yaml or .json), or with --dialect a request to that
    service; OVERRIDES are configuration files over it. Flags win over files, a later file over an
    earlier one, files over the preset, the preset over the defaults.
    """
    from trainer.job import RunFolder
    from trainer.listeners import Summary, logs_for, progress_for
    from trainer.runner import is_main_process, stop_on_signals, supervise

    with stop_on_signals() as stop:
        config = configuration(request, preset, dialect, overrides)
        folder = RunFolder(output or Path("runs") / config.output.output_name)
        summary = Summary()
        logs = logs_for(config, folder) if is_main_process() else []
        displays = [progress_for(talk(), config.resolved.explicit), summary]
        result = supervise(config, folder, [*logs, *displays], engine=_engine, stop=stop)
    if is_main_process():
        _report(result, folder, summary, dialect=dialect, as_json=as_json)
    elif result.error_kind not in (None, *MET_BY_EVERY_PROCESS):
        _say_error(str(result.error_kind), f"{result.error}", result.hint or "")
    return result.exit_code


@cli.command(cls=HyperparameterCommand)
@request_argument
@overrides_argument
@output_option
@preset_option
@dialect_option
@json_option
def prepare(
    request: Path | None,
    overrides: tuple[Path, ...],
    output: Path | None,
    preset: str | None,
    dialect: str | None,
    as_json: bool,
) -> None:
    """Prepare pictures, masks and captions, to be looked at before training.

    Writes the contact sheet, and what `train` with the same options and run folder goes on from.
    """
    from trainer.job import RunFolder
    from trainer.listeners import progress_for
    from trainer.runner import stop_on_signals, watched

    with stop_on_signals() as stop:
        config = configuration(request, preset, dialect, overrides)
        folder = RunFolder(output or Path("runs") / config.output.output_name)
        _hush_libraries()
        from trainer import preparing

        events = preparing.prepare(config, folder, stop)
        watched(events, folder, [progress_for(talk(), config.resolved.explicit)])
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
    _hush_libraries()
    from trainer.estimate import estimate as estimate_training

    emit(estimate_training(config, hourly=hourly).as_dict(), as_json, pairs)


_family_option = click.option(
    "--family", metavar="NAME", help="Family of the base model, where it is not clear."
)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@_family_option
@json_option
def inspect(file: Path, family: str | None, as_json: bool) -> None:
    """Tell what is in a LoRA file, and what will trouble its readers."""
    candidates = _kohya_names(family)
    from trainer.export.describe import describe

    emit(describe(file, candidates, family).as_dict(), as_json, pairs)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    required=True,
    type=click.Choice(["diffusers", "kohya"]),
    help="Format to write.",
)
@_family_option
@json_option
def convert(source: Path, target: Path, form: Any, family: str | None, as_json: bool) -> None:
    """Convert a LoRA file between diffusers' and kohya's format."""
    candidates = _kohya_names(family)
    from trainer.export import read

    if source.resolve() == target.resolve():
        raise InputError.of("TARGET", f"is the source itself, `{source}`", "give another file")
    state = read.convert(source, target, form, candidates, family=family)
    layers = len(state.layers())
    emit({"file": str(target), "format": form, "layers": layers}, as_json, pairs)


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
    sys.excepthook = _report_bug
    sys.exit(run(sys.argv[1:]))


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


def _engine(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    """The engine; torch takes seconds to import, so a folder in use is refused before."""
    _hush_libraries()
    from trainer import engine

    yield from engine.run(config, folder, stop)


def _hush_libraries() -> None:
    """Leaves only errors of libraries that remark on optional packages when they are loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _kohya_names(family: str | None) -> dict[str, KohyaNames]:
    """The name tables of all families; a family that the user names must be one of them."""
    _hush_libraries()
    from trainer.families import family_names, load_family

    candidates = {name: load_family(name).kohya for name in family_names()}
    if family is not None and family not in candidates:
        message = f"there is no family `{family}`; allowed: {', '.join(candidates)}"
        raise InputError.of("--family", message, nearest(family, candidates))
    return candidates


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
        return InputError.of(error.option_name, "there is no such option", hint)
    if isinstance(error, click.NoSuchCommand):
        hint = nearest(error.command_name, tuple(cli.commands)) or help_hint
        return InputError.of(error.command_name, "there is no such command", hint)
    return InputError.of("command line", message, help_hint)


def _complain(error: TrainerError, as_json: bool) -> int:
    from trainer.job import Result

    click.echo(str(error), err=True)
    if as_json:
        problems = error.problems if isinstance(error, InputError) else ()
        data = Result.of_error(error).model_dump(mode="json")
        print_json(data | {"problems": [asdict(problem) for problem in problems]})
    return error.exit_code


def _say_error(kind: str, message: str, hint: str) -> None:
    lines = [*message.splitlines(), *([f"  hint: {hint}"] if hint else [])]
    for line in lines:
        click.echo(line if line.startswith("  ") else f"error[{kind}]: {line}", err=True)


def _report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.__excepthook__(kind, error, trace)
    click.echo("error[internal]: this is a bug in the trainer; please report the above", err=True)
