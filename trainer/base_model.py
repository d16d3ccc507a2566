"""The base model: which family it is, whether it can be had, and loading it.

`locate` reads a few small JSON files and says everything that can be wrong with the request
before any weights are touched; `load` then opens the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging as transformers_logging

from trainer.config import ModelConfig, Note
from trainer.errors import InputError
from trainer.families import family_names, load_family
from trainer.families.base import Family
from trainer.tensorfile import read_header


@dataclass(frozen=True)
class Precision:
    """Number formats that the parts of the base model are kept in.

    Args:
        frozen: of everything that does not learn.
        denoiser: of the denoiser; 32 bits where its own weights learn.
        vae: of the VAE.
    """

    frozen: torch.dtype
    denoiser: torch.dtype
    vae: torch.dtype


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found but not loaded.

    Args:
        family_name: name of the family's module.
        family: its class.
        settings: where the model comes from.
        native_size: side in pixels of the pictures it was made for.
        notes: what was decided about defaults that do not fit this checkpoint.
    """

    family_name: str
    family: type[Family]
    settings: ModelConfig
    native_size: int
    notes: tuple[Note, ...] = ()


def locate(settings: ModelConfig, *, vae_is_explicit: bool = True) -> BaseModel:
    """Finds the base model, its family and its size, and checks what can be checked without it.

    Args:
        settings: the request.
        vae_is_explicit: whether somebody chose `vae_url`; a default VAE of another latent
            space gives way to the checkpoint's own, an explicit one is an error.

    Raises:
        InputError: not found, not reachable, of no known or another family, missing variant,
            unfitting VAE.
    """
    name = _family_of(settings)
    family = load_family(name)
    if settings.model_family not in (None, name):
        raise InputError.of(
            "model_family",
            f"is `{settings.model_family}`, but `{settings.model_url}` is a `{name}` checkpoint",
            f"leave it out or give `{name}`",
        )
    _check_variant(settings, family)
    vae_config = _component_config(settings, family, "vae")
    size = _component_config(settings, family, family.denoiser_name)["sample_size"]
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    settings, notes = _check_vae(settings, vae_config, vae_is_explicit)
    return BaseModel(name, family, settings, size * scale, notes)


def load(base: BaseModel, precision: Precision) -> Family:
    """Opens the pipeline with its weights, on the processor, all parts frozen and in `eval` mode.

    Raises:
        InputError: files are missing or unreadable.
    """
    settings = base.settings
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    skipped: dict[str, None] = dict.fromkeys(base.family.unused_components)
    with _hub_errors("model_url", settings.model_url):
        if _is_single_file(settings):
            pipeline = base.family.pipeline_class.from_single_file(
                settings.model_url,
                config=settings.single_file_config or base.family.single_file.config,
                dtype=precision.denoiser,
                low_cpu_mem_usage=False,
                **skipped,
            )
        else:
            pipeline = base.family.pipeline_class.from_pretrained(
                settings.model_url,
                dtype={
                    "default": precision.frozen,
                    base.family.denoiser_name: precision.denoiser,
                    "vae": precision.vae,
                },
                revision=settings.revision,
                variant=settings.variant,
                use_safetensors=True,
                **skipped,
            )
    if settings.vae_url is not None:
        pipeline.register_modules(vae=_load_vae(settings.vae_url, precision.vae))
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
            dtype = {base.family.denoiser_name: precision.denoiser, "vae": precision.vae}
            wanted = dtype.get(name, precision.frozen)
            if component.dtype != wanted:
                component.to(wanted)
    return base.family(pipeline)


def _is_single_file(settings: ModelConfig) -> bool:
    return settings.model_url.endswith(".safetensors")


def _family_of(settings: ModelConfig) -> str:
    if _is_single_file(settings):
        return _family_of_file(Path(settings.model_url))
    index = _read_json(settings, "model_index.json")
    pipeline = str(index.get("_class_name"))
    for name in family_names():
        if load_family(name).pipeline_class.__name__ == pipeline:
            return name
    raise InputError.of(
        "model_url",
        f"`{settings.model_url}` is a `{pipeline}`, which is not trained here",
        f"give a checkpoint of one of: {', '.join(family_names())}",
    )


def _family_of_file(path: Path) -> str:
    if not path.is_file():
        raise InputError.of("model_url", f"there is no file `{path}`", "check the path")
    try:
        keys = read_header(path)
    except ValueError as error:
        raise InputError.of("model_url", str(error), "give a complete checkpoint") from error
    for name in family_names():
        if load_family(name).single_file.key in keys:
            return name
    raise InputError.of(
        "model_url",
        f"`{path}` holds no complete checkpoint of a known family",
        f"give a checkpoint of one of: {', '.join(family_names())}; a LoRA is no base model",
    )


def _check_variant(settings: ModelConfig, family: type[Family]) -> None:
    folder = Path(settings.model_url) / family.denoiser_name
    if settings.variant is None or not folder.is_dir():
        return
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not any(f".{settings.variant}." in name for name in files):
        raise InputError.of(
            "variant",
            f"`{settings.variant}` is not among the files of `{folder}`: {', '.join(files)}",
            "leave it out to take the plain files",
        )


def _check_vae(
    settings: ModelConfig, own: Mapping[str, Any], is_explicit: bool
) -> tuple[ModelConfig, tuple[Note, ...]]:
    """Refuses a VAE of another latent space, or lets it yield where it is only a default."""
    if settings.vae_url is None:
        return settings, ()
    if settings.vae_url.endswith(".safetensors"):
        return settings, ()
    vae = ModelConfig(model_url=settings.vae_url)
    try:
        other = _read_json(vae, "config.json", field="vae_url")
    except InputError:
        if is_explicit:
            raise
        return _own_vae(settings, "could not be fetched")
    for fact in ("latent_channels", "scaling_factor", "shift_factor"):
        if other.get(fact) == own.get(fact):
            continue
        difference = f"has {fact} {other.get(fact)}, the base model's own has {own.get(fact)}"
        if is_explicit:
            raise InputError.of(
                "vae_url",
                f"`{settings.vae_url}` {difference}: it speaks of another latent space",
                "leave it out to use the base model's own VAE",
            )
        return _own_vae(settings, difference)
    return settings, ()


def _own_vae(settings: ModelConfig, reason: str) -> tuple[ModelConfig, tuple[Note, ...]]:
    message = f"the default `{settings.vae_url}` {reason}; the base model's own VAE is used"
    note = Note(kind="yielded", field="vae_url", message=message)
    return settings.model_copy(update={"vae_url": None}), (note,)


def _load_vae(url: str, dtype: torch.dtype) -> Any:
    with _hub_errors("vae_url", url):
        if url.endswith(".safetensors"):
            return AutoencoderKL.from_single_file(url, dtype=dtype)
        return AutoencoderKL.from_pretrained(url, dtype=dtype, use_safetensors=True)


def _component_config(settings: ModelConfig, family: type[Family], name: str) -> dict[str, Any]:
    if _is_single_file(settings):
        source = settings.single_file_config or family.single_file.config
        complete = ModelConfig(model_url=source)
        return _read_json(complete, f"{name}/config.json", field="single_file_config")
    return _read_json(settings, f"{name}/config.json")


def _read_json(settings: ModelConfig, name: str, *, field: str = "model_url") -> dict[str, Any]:
    folder = Path(settings.model_url)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise InputError.of(
                field,
                f"`{folder}` has no `{name}`, so it is not a model in diffusers' layout",
                "give a diffusers folder, a hub id or a .safetensors file",
            )
    else:
        with _hub_errors(field, settings.model_url):
            path = Path(hf_hub_download(settings.model_url, name, revision=settings.revision))
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@contextmanager
def _hub_errors(field: str, url: str) -> Iterator[None]:
    """Turns what the hub and the loaders say into an `InputError` with the next action."""
    try:
        yield
    except GatedRepoError as error:
        hint = f"accept its licence at https://huggingface.co/{url}, then run `hf auth login`"
        raise InputError.of(field, f"`{url}` is gated", hint) from error
    except RevisionNotFoundError as error:
        message = f"`{url}` has no such revision"
        raise InputError.of("revision", message, "give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private one run `hf auth login` or set HF_TOKEN"
        raise InputError.of(field, f"`{url}` is not on the hub", hint) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        hint = "connect once to download it, or give a local folder or .safetensors file"
        raise InputError.of(
            field,
            f"`{url}` is neither a local path nor in the cache, and the hub is out of reach",
            hint,
        ) from error
    except EntryNotFoundError as error:
        raise InputError.of(
            field, f"`{url}` lacks a file that a model in diffusers' layout has", "check the id"
        ) from error
    except HFValidationError as error:
        hint = "give an existing folder or file, or a hub id such as `owner/name`"
        raise InputError.of(field, f"there is no `{url}`", hint) from error
    except HfHubHTTPError as error:
        hint = "try again later, or give a local folder"
        raise InputError.of(field, f"`{url}`: the hub answered {error}", hint) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError.of(
            field, f"`{url}` could not be loaded: {reason}", "check that its files are complete"
        ) from error
