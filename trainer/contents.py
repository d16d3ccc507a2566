"""What the models of a base model hold, in digests, and opening it without those not yet needed.

Encoders are of no use to a training for which all that they would make is kept, and what is kept
goes by digests of what they hold: each is remembered by the places, sizes and times of a model's
files. What encoders are used for is not known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from transformers import PreTrainedTokenizerBase

from trainer import base_model
from trainer.base_model import BaseModel, Precision
from trainer.cache import cache_folder
from trainer.data.store import Store, key_of
from trainer.families.base import Family
from trainer.model_files import Source

# Numbers of a tensor that enter the digest of a checkpoint.
_SAMPLES = 64
# Part of every key: raised when the same files come to another digest by other code here.
_VERSION = 1
# A digest takes 96 bytes.
_MAX_BYTES = 2**20


def contents_digest(family: Family, only: Collection[str] | None = None) -> str:
    """sha256 over configurations, vocabularies and samples of all weights, in a moment.

    Args:
        family: just loaded, with all its components, or some of them unread.
        only: the components that count. None: all.
    """
    digest = hashlib.sha256()
    for part, component in sorted(family.pipeline.components.items()):
        if only is None or part in only:
            unread = family.unread.models.get(part)
            digest.update(f"{part} {unread.contents if unread else _digest(component)}".encode())
    return digest.hexdigest()


def opened(
    base: BaseModel, precision: Precision, spared: Collection[str], *, remember: bool = True
) -> Family:
    """Opens the pipeline as `base_model.load` does, without models that may not be needed.

    Args:
        base: as found.
        precision: number formats of its parts.
        spared: these models; those that were never seen with the files they have now are read.
        remember: what these hold, for later trainings; of several processes one writes it down.

    Raises:
        InputError: files are missing or unreadable.
    """
    store = Store(cache_folder() / "models", _MAX_BYTES)
    keys = {part: _key(base, precision, part) for part in sorted(spared)}
    remembered = {part: store.get(key) for part, key in keys.items()}
    known = {part: digest.decode() for part, digest in remembered.items() if digest is not None}
    family = base_model.load(base, precision, later=known)
    # Under the keys of before: files that changed meanwhile may not be those that were read.
    for part in keys.keys() - known if remember else ():
        store.put(keys[part], _digest(family.pipeline.components[part]).encode())
    return family


def files_of(base: BaseModel, part: str) -> list[Path]:
    """The files on this machine that a model is read from, and what lies beside them."""
    settings = base.settings
    vae_url = settings.vae_url if part == "vae" else None
    if vae_url is not None and Path(vae_url).is_file():
        return [Path(vae_url)]
    if vae_url is not None:
        return _files(Source(vae_url, field="vae_url").folder_of("config.json"))
    folder = base.configurations.folder_of(f"{part}/config.json")
    if settings.is_single_file:
        return [Path(settings.model_url), folder / "config.json"]
    return _files(folder)


def weights_of(base: BaseModel, part: str) -> list[Path]:
    """The files of a model's weights, of the variant that is read."""
    variant = base.settings.variant
    found = [path for path in files_of(base, part) if path.suffix == ".safetensors"]
    if base.settings.is_single_file:
        return found
    wanted = "" if variant is None else f".{variant}"
    return [path for path in found if _variant_of(path) == wanted]


def _variant_of(path: Path) -> str:
    """`.fp16` of `model.fp16.safetensors`, wherever the number of a shard stands."""
    return Path(re.sub(r"-\d+-of-\d+", "", path.stem)).suffix


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _key(base: BaseModel, precision: Precision, part: str) -> str:
    """The key of what a model holds: none of its files can change without it."""
    states = [(path, path.stat()) for path in files_of(base, part)]
    facts: dict[str, Any] = {
        "version": _VERSION,
        "family": base.family_name,
        "part": part,
        "settings": base.settings.model_dump(mode="json"),
        "number format": str(precision.of(base.family)[part]),
        # Unlike the time of its content, that of a file's last change is nobody's to set.
        "files": [
            (str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            for path, state in states
        ],
        "libraries": [library.__version__ for library in (torch, diffusers, transformers)],
    }
    return key_of("contents of a model", facts)


def _digest(component: Any) -> str:
    """sha256 of what one component of a pipeline holds."""
    digest = hashlib.sha256()
    if isinstance(component, ConfigMixin):
        facts = {k: v for k, v in component.config.items() if not k.startswith("_")}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    if isinstance(component, PreTrainedTokenizerBase):
        digest.update(json.dumps(component.get_vocab(), sort_keys=True).encode())
    if isinstance(component, torch.nn.Module):
        for name, tensor in component.state_dict().items():
            flat = tensor.flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLES)].float()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
