"""Another VAE than the base model's own: whether it speaks of the same latents, and loading it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from trainer.config import ModelConfig, Note
from trainer.errors import InputError
from trainer.families import family_names, load_family
from trainer.families.base import Family
from trainer.model_files import Source, hub_errors, read_shapes

# What two VAEs must agree in so that a denoiser understands the latents of both.
_LATENT_SPACE = (
    "latent_channels",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "batch_norm_eps",
)
_COUNTER = ".num_batches_tracked"
# Prefix of the VAE's tensors in a whole checkpoint in the original layout.
_ORIGINAL_PREFIX = "first_stage_model."
_OWN = "set `vae_url: null` to use the base model's own VAE"


def settled(
    settings: ModelConfig, family: type[Family], own: Mapping[str, Any], *, is_explicit: bool
) -> tuple[ModelConfig, tuple[Note, ...]]:
    """The settings with a VAE that fits, or with none where the base model's own is used.

    Args:
        settings: the request.
        family: of the base model.
        own: configuration of the base model's VAE.
        is_explicit: whether somebody chose `vae_url`; a default of another latent space gives
            way, an explicit one is an error.

    Raises:
        InputError: `vae_url` cannot be had, is no VAE, or somebody chose an unfitting one.
    """
    url = settings.vae_url
    if url is None:
        return settings, ()
    if not is_explicit and _is_of_another_family(url, family):
        return _without(settings, "is made for another family of models")
    if _is_file(url):
        _check_file(Path(url), own)
        return settings, ()
    difference = _difference(_read_config(url, is_explicit=is_explicit), own)
    if difference is None:
        return settings, ()
    if is_explicit:
        message = f"`{url}` {difference}: it speaks of another latent space"
        raise InputError.of("vae_url", message, _OWN)
    return _without(settings, difference)


def load_vae(url: str, own: Source, dtype: torch.dtype) -> Any:
    """A VAE from a hub id, a folder or one file.

    Args:
        url: as in `vae_url`.
        own: the base model's configurations: one file carries none and takes theirs.
        dtype: of its weights.

    Raises:
        InputError: files are missing or unreadable.
    """
    vae_class = _class_of(own.read_json("vae/config.json"))
    with hub_errors("vae_url", url):
        if not _is_file(url):
            return vae_class.from_pretrained(url, dtype=dtype, use_safetensors=True)
        return vae_class.from_single_file(
            url,
            config=own.url,
            subfolder="vae",
            config_revision=own.revision,
            dtype=dtype,
            low_cpu_mem_usage=False,
        )


def _class_of(config: Mapping[str, Any]) -> Any:
    """The diffusers class that a VAE's configuration names."""
    return getattr(diffusers, config["_class_name"])


def _is_file(url: str) -> bool:
    return url.endswith(".safetensors")


def _is_of_another_family(url: str, family: type[Family]) -> bool:
    known = [load_family(name) for name in family_names()]
    return url not in family.checkpoints.vaes and any(
        url in other.checkpoints.vaes for other in known
    )


def _without(settings: ModelConfig, reason: str) -> tuple[ModelConfig, tuple[Note, ...]]:
    message = f"the default `{settings.vae_url}` {reason}; the base model's own VAE is used"
    note = Note(kind="yielded", field="vae_url", message=message)
    return settings.model_copy(update={"vae_url": None}), (note,)


def _read_config(url: str, *, is_explicit: bool) -> dict[str, Any]:
    try:
        return Source(url, field="vae_url").read_json("config.json")
    except InputError as error:
        (problem,) = error.problems
        message = problem.message if is_explicit else f"the default {problem.message}"
        raise InputError.of("vae_url", message, f"{problem.hint}; or {_OWN}") from error


def _difference(other: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    defaults = inspect.signature(_class_of(own)).parameters
    for fact in ("_class_name", *_LATENT_SPACE):
        default = defaults[fact].default if fact in defaults else None
        theirs, ours = other.get(fact, default), own.get(fact, default)
        if theirs != ours:
            return f"has {fact} {theirs}, the base model's own has {ours}"
    return None


def _check_file(path: Path, own: Mapping[str, Any]) -> None:
    """Refuses a file whose tensors are not those of a VAE like the base model's own."""
    shapes = {
        name.removeprefix(_ORIGINAL_PREFIX): shape
        for name, shape in read_shapes(path, field="vae_url").items()
    }
    entrance = shapes.get("decoder.conv_in.weight")
    if entrance is None:
        raise InputError.of("vae_url", f"`{path}` holds no VAE", f"give one, or {_OWN}")
    with torch.device("meta"):
        expected = _class_of(own).from_config(dict(own)).state_dict()
    wanted = expected["decoder.conv_in.weight"].shape[1]
    if entrance[1] != wanted:
        raise InputError.of(
            "vae_url",
            f"`{path}` has {entrance[1]} latent channels, the base model's own VAE has {wanted}",
            _OWN,
        )
    # How often statistics were taken is no weight, and not in every file.
    expected = {name: t for name, t in expected.items() if not name.endswith(_COUNTER)}
    parts = tuple({f"{name.partition('.')[0]}." for name in expected})
    found = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith(parts) and not name.endswith(_COUNTER)
    }
    numbers = sum(tensor.numel() for tensor in expected.values())
    in_diffusers_layout = any(name.startswith("encoder.down_blocks.") for name in found)
    if sum(found.values()) != numbers or (in_diffusers_layout and found.keys() != expected.keys()):
        raise InputError.of(
            "vae_url",
            f"the layers in `{path}` are not those of the base model's own VAE",
            f"give its diffusers folder or hub id; or {_OWN}",
        )
