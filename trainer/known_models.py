"""Names of base models with the options that say where each is: the owner's own before ours.

Ours are `configs/base_models.yaml`. The owner's files are those in `TRAINER_BASE_MODELS`, or
`trainer/base_models.yaml` in the user's configuration folder. A name may be what a service calls
a model, or a hub id that is somewhere else on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer import presets
from trainer.config_files import parse_yaml, read_mapping
from trainer.errors import InputError, Problem
from trainer.leaves import allowed, nearest, shown

VARIABLE = "TRAINER_BASE_MODELS"

_FILE = "base_models.yaml"
_PLACES = ("model_url", "vae_url", "single_file_config")
_OPTIONS = (*_PLACES, "model_family", "revision", "variant")
_NOTE = "note"
# What cannot be null; any other option may be, which is not the same as leaving it out.
_NEEDED = ("model_url", _NOTE)
# How a place begins that no hub id begins with.
_PATHS = ("./", "../", "~", "/")


@dataclass(frozen=True)
class KnownModel:
    """What a name stands for.

    Args:
        options: leaf to value, of the model section. Without `model_url`: nothing that could be
            fetched has this name.
        note: what the model is, and where its file can be had.
    """

    name: str
    options: Mapping[str, Any]
    note: str = ""

    def problem(self, field: str) -> Problem:
        """Why a request for a model without a place is refused, and how to give it one."""
        message = f"got `{self.name}`, which is on no hub under this name: {self.note}"
        entry = f"{self.name}: {{model_url: /path/to/model.safetensors}}"
        return Problem(field, message, f"write `{entry}` into `{own_files()[-1]}`")


def known_model(name: str) -> KnownModel | None:
    """What a name stands for, or nothing.

    Raises:
        InputError: a list of the owner's cannot be used.
    """
    return known_models().get(name)


def place_of(name: str) -> str:
    """Where the base model with this name is; the name itself where no list has a place for it.

    Raises:
        InputError: a list of the owner's cannot be used.
    """
    known = known_model(name)
    place: str = name if known is None else known.options.get("model_url", name)
    return place


def known_models() -> Mapping[str, KnownModel]:
    """Every name; the owner's go before ours, and a later file's before an earlier one's.

    Raises:
        InputError: a list of the owner's cannot be used.
    """
    found = dict(_shipped())
    for path in own_files():
        if path.is_file() or VARIABLE in os.environ:
            found |= _read(path, _state_of(path))
    return found


def own_files() -> tuple[Path, ...]:
    """The owner's lists, there or not."""
    named = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    if named:
        return tuple(Path(part).expanduser() for part in named)
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return (Path(home).expanduser() / "trainer" / _FILE,)


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, KnownModel]:
    text = presets.folder().joinpath(_FILE).read_text(encoding="utf-8")
    return _entries(parse_yaml(text, _FILE), _FILE, None)


def _state_of(path: Path) -> tuple[int, int]:
    """What tells whether a file is as it was; of a missing one, which reading tells of, nothing."""
    if not path.is_file():
        return 0, 0
    state = path.stat()
    return state.st_mtime_ns, state.st_size


@lru_cache(maxsize=8)
def _read(path: Path, state: tuple[int, int]) -> Mapping[str, KnownModel]:
    """The entries of a file, read again where `state` is another one."""
    del state
    return _entries(read_mapping(path), str(path), path.parent)


def _entries(
    content: Mapping[str, Any], file: str, folder: Path | None
) -> Mapping[str, KnownModel]:
    problems = [
        problem for name, entry in content.items() for problem in _problems(name, entry, file)
    ]
    if problems:
        raise InputError(problems)
    return {
        name: KnownModel(
            name,
            {key: _placed(key, text, folder) for key, text in entry.items() if key != _NOTE},
            entry.get(_NOTE, ""),
        )
        for name, entry in content.items()
    }


def _problems(name: str, entry: object, file: str) -> Iterator[Problem]:
    options = ", ".join((*_OPTIONS, _NOTE))
    if not isinstance(entry, dict) or not {"model_url", _NOTE} & entry.keys():
        message = f"got {shown(entry)} (in {file}); allowed: model_url or note, also: {options}"
        yield Problem(name, message, f"write `{name}: {{model_url: …}}`")
        return
    for key, value in entry.items():
        field = f"{name}.{key}"
        if key not in (*_OPTIONS, _NOTE):
            message = f"there is no such option (in {file}); allowed: {options}"
            yield Problem(field, message, nearest(str(key), _OPTIONS))
        elif not (isinstance(value, str) and value) and (value is not None or key in _NEEDED):
            words = "text" if key == _NOTE else allowed(key)
            yield Problem(field, f"got {shown(value)} (in {file}); allowed: {words}")


def _placed(key: str, text: str | None, folder: Path | None) -> str | None:
    """A value as it is, but for a path: that starts from the folder of the file."""
    if text is None or folder is None or key not in _PLACES:
        return text
    path = folder / Path(text).expanduser()
    is_path = text.startswith(_PATHS) or text.endswith(".safetensors") or path.exists()
    return str(path) if is_path else text
