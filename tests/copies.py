"""Copies in the place of making the same again and again: base models, contact sheets, faces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from trainer import base_model, fitting
from trainer.base_model import BaseModel, Precision
from trainer.config import DataConfig
from trainer.data import overview
from trainer.data.prepared import Index
from trainer.families.base import Family
from trainer.images import detectors

LOAD = base_model.load
_SKELETON = base_model.skeleton
WRITE_SHEETS = overview._write_sheets
_KEPT: dict[tuple[object, ...], Family] = {}
_SKELETONS: dict[tuple[object, ...], torch.nn.Module] = {}
_SHEETS: dict[str, dict[str, bytes]] = {}
_CASCADE = detectors._cascade
_FACES: dict[tuple[object, ...], Any] = {}
# Kinds of values that nothing changes.
_PLAIN = frozenset((bool, float, int, str, type, type(None), torch.dtype))
# Base models that are kept: those that were asked for last.
_MOST = 8
# Bytes that a processor fetches together.
_LINE = 64


@contextmanager
def instead_of_making_again() -> Iterator[None]:
    """While this lasts, what was made before of the same files and settings is copied.

    Base models and their skeletons are not read again, contact sheets not drawn again, and pictures
    not searched for faces again. A test that watches or replaces one of these replaces the copying
    too.
    """
    with (
        patch.multiple(base_model, load=_loaded, skeleton=_emptied),
        patch.object(fitting, "skeleton", _emptied),
        patch.object(overview, "_write_sheets", _drawn),
        patch.object(detectors, "_cascade", _Cascade),
    ):
        yield


def _loaded(base: BaseModel, precision: Precision, **named: Any) -> Family:
    states = _states(base)
    if not states:
        return LOAD(base, precision, **named)
    settings = base.settings.model_dump_json()
    left = sorted(named.get("without", ())), sorted((named.get("later") or {}).items())
    key = settings, precision, repr(left), states
    family = _KEPT.pop(key, None) or LOAD(base, precision, **named)
    _KEPT[key] = family
    if len(_KEPT) > _MOST:
        del _KEPT[next(iter(_KEPT))]
    return copied_family(family)


def _emptied(base: BaseModel, component: str) -> Any:
    states = _states(base)
    if not states:
        return _SKELETON(base, component)
    key = base.settings.model_dump_json(), component, states
    if key not in _SKELETONS:
        _SKELETONS[key] = _SKELETON(base, component)
    return copied_module(_SKELETONS[key])


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
        WRITE_SHEETS(index, folder, of_class=of_class, data=data)
        _SHEETS[key] = {page.name: page.read_bytes() for page in overview.sheets(folder)}
    for page in overview.sheets(folder):
        page.unlink()
    for name, content in _SHEETS[key].items():
        (folder / name).write_bytes(content)


class _Cascade:
    """A cascade that is asked about a picture once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._cascade = _CASCADE(name)

    def detectMultiScale2(self, pixels: Any, **settings: Any) -> Any:
        content = hashlib.sha256(pixels.tobytes()).digest()
        key = self._name, pixels.shape, content, repr(settings)
        if key not in _FACES:
            _FACES[key] = self._cascade.detectMultiScale2(pixels, **settings)
        return _FACES[key]


def copied_family(family: Family) -> Family:
    """A base model of its own, all its tensors and modules included."""
    known: dict[int, Any] = {}
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            copied_module(component, known)
        if isinstance(component, PreTrainedTokenizerBase):
            known[id(component)] = _copied_tokenizer(component)
    return deepcopy(family, known)


def _copied_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    twin = deepcopy(tokenizer)
    if isinstance(twin, CLIPTokenizer):
        # Where words end is told in an object that is not copied.
        twin._wrap_decode_method_backend_tokenizer()
    return twin


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
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        copied_tensor(tensor, known)
    twin.__dict__ = {name: _copied_value(value, known) for name, value in vars(module).items()}
    return twin


def _copied_value(value: Any, known: dict[int, Any]) -> Any:
    if type(value) in _PLAIN:
        return value
    if id(value) in known:
        return known[id(value)]
    if type(value) is not dict:
        return type(value)() if isinstance(value, dict) and not value else deepcopy(value, known)
    twin = known[id(value)] = {}
    twin |= {name: _copied_value(part, known) for name, part in value.items()}
    return twin


def copied_tensor(tensor: torch.Tensor, known: dict[int, Any]) -> None:
    """Copies to a place as much beyond a multiple of 64 bytes as that of the tensor.

    Weights stand in a file wherever its header ends, and a processor adds in another order what
    begins elsewhere: a copy that begins evenly learns the last digit otherwise.
    """
    if id(tensor) in known or not tensor.is_contiguous() or tensor.is_meta:
        return
    room = torch.empty(tensor.nbytes + _LINE, dtype=torch.uint8)
    first = (tensor.data_ptr() - room.data_ptr()) % _LINE
    twin = room[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    twin.copy_(tensor.detach())
    if isinstance(tensor, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, tensor.requires_grad)
    known[id(tensor)] = twin
