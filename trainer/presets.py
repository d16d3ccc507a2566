"""Named starting points: the files of `configs/presets`, which ship with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from trainer.config_files import as_layers, parse_yaml
from trainer.errors import InputError
from trainer.leaves import nearest
from trainer.resolve import Layer

_ENDING = ".yaml"


@dataclass(frozen=True)
class Preset:
    """A preset's name and what it is for."""

    name: str
    description: str


def folder() -> Traversable:
    """The `configs` folder: inside an installed package, or beside it in a checkout."""
    installed = files("trainer").joinpath("configs")
    return installed if installed.is_dir() else files("trainer").joinpath("..", "configs")


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return [
        Preset(name, str(parse_yaml(preset_text(name), name)["description"])) for name in _names()
    ]


def preset_text(name: str) -> str:
    """A preset's file as it stands.

    Raises:
        InputError: there is no such preset.
    """
    known = _names()
    if name not in known:
        message = f"got `{name}`; allowed: one of {', '.join(known)}"
        raise InputError.of("preset", message, nearest(name, tuple(known)))
    return _presets().joinpath(name + _ENDING).read_text(encoding="utf-8")


def load_preset(name: str) -> Layer:
    """A preset's options; they do not count as set on purpose.

    Raises:
        InputError: there is no such preset.
    """
    (layer,) = as_layers(parse_yaml(preset_text(name), name), f"preset {name}")
    return Layer(layer.name, layer.values, explicit=False, problems=layer.problems)


def _presets() -> Traversable:
    return folder().joinpath("presets")


def _names() -> list[str]:
    entries = [entry.name for entry in _presets().iterdir()]
    return sorted(name.removesuffix(_ENDING) for name in entries if name.endswith(_ENDING))
