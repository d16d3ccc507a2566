"""The commands on LoRA files: `trainer inspect` and `trainer convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.errors import InputError
from trainer.leaves import nearest
from trainer.printing import emit, hush_libraries, json_option, pairs

if TYPE_CHECKING:
    from trainer.names import KohyaNames

_family_option = click.option(
    "--family", metavar="NAME", help="Family of the base model, where it is not clear."
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@_family_option
@json_option
def inspect(file: Path, family: str | None, as_json: bool) -> None:
    """Tell what is in a LoRA file, and what will trouble its readers."""
    candidates = _kohya_names(family)
    from trainer.export.describe import describe

    emit(describe(file, candidates, family).as_dict(), as_json, pairs)


@click.command()
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


def _kohya_names(family: str | None) -> dict[str, KohyaNames]:
    """The name tables of all families; a family that the user names must be one of them."""
    hush_libraries()
    from trainer.families import family_names, load_family

    candidates = {name: load_family(name).kohya for name in family_names()}
    if family is not None and family not in candidates:
        message = f"there is no family `{family}`; allowed: {', '.join(candidates)}"
        raise InputError.of("--family", message, nearest(family, candidates))
    return candidates
