"""Command-line flags for the hyperparameters, made from their declarations.

`--snr-gamma 5` and `--snr_gamma 5` both mean the leaf `snr_gamma`; nothing is listed by hand.
Together with files, a preset or a service's request they are one configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from trainer.config import LEAVES, SECTIONS, Leaf, TrainingConfig
from trainer.config_files import read_config_file, read_mapping
from trainer.dialects import layers_of
from trainer.errors import InputError
from trainer.leaves import allowed, flag_value, leaf_schema, shown
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve

_GIVEN = "trainer.flags.given"


def flag_of(leaf: str) -> str:
    """The flag of a leaf: `snr_gamma` becomes `--snr-gamma`."""
    return f"--{leaf.replace('_', '-')}"


def given_flags() -> Mapping[str, Any]:
    """Leaf to raw value, for every hyperparameter flag of the running command."""
    values: Mapping[str, Any] = click.get_current_context().meta.get(_GIVEN, {})
    return values


def configuration(
    request: Path | None,
    preset: str | None,
    dialect: str | None,
    overrides: Sequence[Path] = (),
) -> TrainingConfig:
    """The configuration that files, preset, dialect and flags mean together.

    Args:
        overrides: configuration files over the request; a later one wins.

    Raises:
        InputError: with everything that is wrong.
    """
    if dialect is not None and request is None:
        message = f"`{dialect}` needs a request, and no file is given"
        raise InputError.of("--dialect", message, "trainer train request.json --dialect fal")
    layers: list[Layer] = []
    if request is not None and dialect is not None:
        layers += layers_of(dialect, read_mapping(request))
    elif request is not None:
        layers += read_config_file(request)
    if preset is not None:
        defaults = [layer for layer in layers if not layer.explicit]
        layers = [*defaults, load_preset(preset), *layers[len(defaults) :]]
    for file in overrides:
        layers += read_config_file(file)
    layers.append(Layer("command line", given_flags(), explicit=True))
    return resolve(layers)


class HyperparameterCommand(click.Command):
    """A command that takes every hyperparameter as a flag, grouped by section in its help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {**self.context_settings, "token_normalize_func": _with_dashes}
        self.params = [*self.params, *(_option(leaf) for leaf in LEAVES.values())]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the command's own options, then one group of flags per section."""
        own = [
            option.get_help_record(ctx)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and option.name not in LEAVES
        ]
        with formatter.section("Options"):
            formatter.write_dl([line for line in own if line is not None])
        for section in SECTIONS:
            leaves = [leaf for leaf in LEAVES.values() if leaf.section == section]
            with formatter.section(_title(section)):
                formatter.write_dl([(_usage(leaf), _help(leaf)) for leaf in leaves])


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")


def _option(leaf: Leaf) -> click.Option:
    """The flag of one leaf; a boolean one may stand without a value, which means true."""
    names = [flag_of(leaf.name), leaf.name]
    if _is_boolean(leaf):
        return click.Option(
            names, is_flag=False, flag_value="true", expose_value=False, callback=_remember
        )
    return click.Option(names, expose_value=False, callback=_remember)


def _remember(ctx: click.Context, option: click.Parameter, text: str | None) -> None:
    if text is not None and option.name is not None:
        ctx.meta.setdefault(_GIVEN, {})[option.name] = flag_value(option.name, text)


def _is_boolean(leaf: Leaf) -> bool:
    return leaf_schema(leaf.name).get("type") == "boolean"


def _usage(leaf: Leaf) -> str:
    return f"{flag_of(leaf.name)} {'[true|false]' if _is_boolean(leaf) else 'VALUE'}"


def _help(leaf: Leaf) -> str:
    default = shown(leaf.info.default).replace('"', "")
    return f"{leaf.info.description} [{allowed(leaf.name)}; default: {default}]"


def _title(section: str) -> str:
    annotation = TrainingConfig.model_fields[section].annotation
    assert isinstance(annotation, type)
    summary = str(annotation.__doc__).splitlines()[0].rstrip(".")
    return f"{section}: {summary[0].lower()}{summary[1:]}"
