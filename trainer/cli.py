"""The command line: thin commands that import what they need when they run.

Data goes to stdout, talk to stderr; `--json` makes the data JSON. A failure is one line
`error[kind]: …` and the kind's exit code. Hyperparameter flags come from `trainer.flags`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from trainer import __version__
from trainer.errors import InputError, TrainerError
from trainer.flags import HyperparameterCommand, configuration
from trainer.leaves import nearest

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
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Run folder; one with checkpoints is gone on from. [default: runs/<output_name>]",
)
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
        displays = [progress_for(_talk(), config.resolved.explicit), summary]
        result = supervise(config, folder, [*logs, *displays], engine=_engine, stop=stop)
    if is_main_process():
        _report(result, folder, summary, dialect=dialect, as_json=as_json)
    elif result.error_kind not in (None, *MET_BY_EVERY_PROCESS):
        _say_error(str(result.error_kind), f"{result.error}", result.hint or "")
    return result.exit_code


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
    _emit(
        {
            "config": config.values(),
            "notes": notes,
            "explicit": list(config.resolved.explicit),
            "data": report.as_dict(),
        },
        as_json,
        _checked,
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

    _emit(estimate_training(config, hourly=hourly).as_dict(), as_json, _pairs)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Tell what is in a LoRA file, and what will trouble its readers."""
    candidates = _kohya_names()
    from trainer.export.describe import describe

    _emit(describe(file, candidates).as_dict(), as_json, _pairs)


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
@click.option("--family", metavar="NAME", help="Family of the base model, where it is not clear.")
@json_option
def convert(source: Path, target: Path, form: Any, family: str | None, as_json: bool) -> None:
    """Convert a LoRA file between diffusers' and kohya's format."""
    candidates = _kohya_names()
    from trainer.export import read

    if family is not None and family not in candidates:
        message = f"there is no family `{family}`; allowed: {', '.join(candidates)}"
        raise InputError.of("--family", message, nearest(family, candidates))
    if source.resolve() == target.resolve():
        raise InputError.of("TARGET", f"is the source itself, `{source}`", "give another file")
    state = read.convert(source, target, form, candidates, family=family)
    layers = len(state.layers())
    _emit({"file": str(target), "format": form, "layers": layers}, as_json, _pairs)


@cli.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of configuration files."""
    from trainer.leaves import json_schema

    del as_json  # the schema is JSON either way
    _print_json(json_schema())


@cli.group()
def presets() -> None:
    """List, show and copy ready-made configurations."""


@presets.command("list")
@json_option
def list_presets(as_json: bool) -> None:
    """Name every preset with what it is for."""
    from trainer import presets as shelf

    _emit({preset.name: preset.description for preset in shelf.list_presets()}, as_json, _pairs)


@presets.command("show")
@click.argument("name")
@json_option
def show_preset(name: str, as_json: bool) -> None:
    """Print a preset."""
    from trainer import presets as shelf
    from trainer.config_files import parse_yaml

    text = shelf.preset_text(name)
    _emit(parse_yaml(text, name), as_json, lambda _: click.echo(text, nl=False))


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
    _emit({"file": str(target)}, as_json, _pairs)


@cli.command()
@json_option
def doctor(as_json: bool) -> int:
    """Look for faults of this installation, with the line that fixes each."""
    from trainer.doctor import examine

    findings = [asdict(finding) for finding in examine()]
    failed = any(finding["status"] == "fail" for finding in findings)
    _emit({"healthy": not failed, "findings": findings}, as_json, _diagnosis)
    return int(failed)


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    _emit({"version": __version__}, as_json, lambda data: click.echo(data["version"]))


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


def _kohya_names() -> dict[str, KohyaNames]:
    _hush_libraries()
    from trainer.families import family_names, load_family

    return {name: load_family(name).kohya for name in family_names()}


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
        _print_json(data)
    elif result.status == "done":
        _paper().print(summary.table(result))
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
        _print_json(data | {"problems": [asdict(problem) for problem in problems]})
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


def _talk() -> Console:
    return Console(stderr=True)


def _paper() -> Console:
    """The console of stdout; wide enough for file names where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _emit(
    data: Mapping[str, Any], as_json: bool, show: Callable[[Mapping[str, Any]], None]
) -> None:
    if as_json:
        _print_json(data)
    else:
        show(data)


def _print_json(data: Mapping[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def _pairs(data: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in data.items():
        table.add_row(name, _in_words(value))
    _paper().print(table, markup=False, highlight=False)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {inner}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return "unknown" if value is None else str(value)


def _checked(data: Mapping[str, Any]) -> None:
    from trainer.listeners import deserves_a_line

    report = data["data"]
    table = Table("picture", "size", "caption", "remark")
    for picture in report["pictures"]:
        height, width = picture["size"] or ("?", "?")
        table.add_row(picture["name"], f"{width}x{height}", picture["caption"], picture["problem"])
    _paper().print(table, markup=False, highlight=False)
    for note in [*data["notes"], *report["notes"]]:
        kind, field, message = note["kind"], note["field"], note["message"]
        if deserves_a_line(kind, field, data["explicit"]):
            click.echo(f"{kind}: `{field}`: {message}", err=True)
    click.echo(f"{report['num_usable']} of {len(report['pictures'])} pictures can be used")


def _diagnosis(data: Mapping[str, Any]) -> None:
    for finding in data["findings"]:
        click.echo(f"{finding['status']:<5} {finding['check']}: {finding['message']}")
        if finding["fix"]:
            click.echo(f"      fix: {finding['fix']}")
