"""Copies in the place of making the same again and again: base models, and contact sheets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from trainer import base_model, fitting
from trainer.base_model import BaseModel, Precision
from trainer.config import DataConfig
from trainer.data import overview
from trainer.data.prepared import Index
from trainer.families.base import Family

_LOAD = base_model.load
_SKELETON = base_model.skeleton
_WRITE_SHEETS = overview._write_sheets
_KEPT: dict[tuple[object, ...], Family] = {}
_SKELETONS: dict[tuple[object, ...], torch.nn.Module] = {}
_SHEETS: dict[str, dict[str, bytes]] = {}


@contextmanager
def loading_once() -> Iterator[None]:
    """While this lasts, a folder that was loaded as it is before is copied, not read again.

    A test that watches or replaces the loading itself meets no copies.
    """
    if base_model.load is not _LOAD:
        yield
        return
    with (
        patch.object(base_model, "load", _loaded),
        patch.object(fitting, "skeleton", _emptied),
        drawing_once(),
    ):
        yield


@contextmanager
def drawing_once() -> Iterator[None]:
    """While this lasts, the contact sheet of pictures that were prepared before is not drawn anew.

    A test that watches or replaces the drawing itself meets no copies.
    """
    if overview._write_sheets is not _WRITE_SHEETS:
        yield
        return
    with patch.object(overview, "_write_sheets", _drawn):
        yield


def _loaded(base: BaseModel, precision: Precision, **named: Any) -> Family:
    states = _states(base)
    if not states:
        return _LOAD(base, precision, **named)
    settings = base.settings.model_dump_json()
    key = settings, precision, repr(sorted(named.get("without", ()))), states
    if key not in _KEPT:
        _KEPT[key] = _LOAD(base, precision, **named)
    return copied_family(_KEPT[key])


def _emptied(base: BaseModel, component: str) -> torch.nn.Module:
    """Layers that are only looked at."""
    states = _states(base)
    if not states:
        return _SKELETON(base, component)
    key = base.settings.model_dump_json(), component, states
    if key not in _SKELETONS:
        _SKELETONS[key] = _SKELETON(base, component)
    return _SKELETONS[key]


def _states(base: BaseModel) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file of a base model; none where it is not all here."""
    settings = base.settings
    places = [Path(place) for place in (settings.model_url, settings.vae_url) if place]
    if not all(place.exists() for place in places):
        return ()
    files = [found for place in places for found in (place, *sorted(place.rglob("*")))]
    return tuple((str(f), s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()])


def _drawn(index: Index, folder: Path, *, of_class: bool, data: DataConfig) -> None:
    key = f"{of_class} {data.model_dump_json()} {index.model_dump_json()}"
    if key not in _SHEETS:
        _WRITE_SHEETS(index, folder, of_class=of_class, data=data)
        _SHEETS[key] = {page.name: page.read_bytes() for page in overview.sheets(folder)}
    for page in overview.sheets(folder):
        page.unlink()
    for name, content in _SHEETS[key].items():
        (folder / name).write_bytes(content)


def copied_family(family: Family) -> Family:
    """A base model of its own, all its tensors and modules included."""
    known: dict[int, Any] = {}
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            copied_module(component, known)
    return copy.deepcopy(family, known)


def copied_module(module: torch.nn.Module, known: dict[int, Any] | None = None) -> Any:
    """As `copy.deepcopy` copies it, which takes most of its time for the empty tables of modules.

    Args:
        known: copies of what was met before, by identity, as `copy.deepcopy` keeps them.
    """
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = module.__new__(type(module))
    for part in module.children():
        copied_module(part, known)
    twin.__dict__ = {
        name: type(value)()
        if isinstance(value, dict) and not value
        else copy.deepcopy(value, known)
        for name, value in vars(module).items()
    }
    return twin
