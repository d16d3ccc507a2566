"""The base model: which family it is, whether it can be had, and loading it.

`locate` reads a few small JSON files and says everything that can be wrong with the request
before any weights are touched; `load` then opens the pipeline.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from trainer import vae
from trainer.config import LossConfig, ModelConfig, Note
from trainer.errors import InputError
from trainer.families import family_names, load_family
from trainer.families.base import Family, Unread, UnreadModel, adapted_encoders, guided_by
from trainer.model_files import Source, hub_errors, read_shapes
from trainer.objectives import Objective

# Tensors in a one-file checkpoint that say how it was trained, as ComfyUI reads them.
_V_PREDICTION, _ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
_MARKERS_OF_EDM = ("edm_mean", "edm_vpred.sigma_max")


@dataclass(frozen=True)
class Precision:
    """Number formats that the parts of the base model are kept in.

    Args:
        frozen: of everything that does not learn.
        denoiser: of the denoiser; where its own weights learn, as `weights_dtype` says.
        vae: of the VAE.
        text_encoders: of the text encoders that may learn; where their own weights do, likewise.
    """

    frozen: torch.dtype
    denoiser: torch.dtype
    vae: torch.dtype
    text_encoders: torch.dtype

    def of(self, family: type[Family]) -> dict[str, torch.dtype]:
        """Model of a pipeline to its number format."""
        own = {family.denoiser_name: self.denoiser, "vae": self.vae}
        return own | self.of_text_encoders(family)

    def of_text_encoders(self, family: type[Family]) -> dict[str, torch.dtype]:
        """Text encoder to its number format."""
        able = adapted_encoders(family)
        return {
            name: self.text_encoders if name in able else self.frozen
            for name in family.text_encoder_names
        }


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found but not loaded.

    Args:
        family_name: name of the family's module.
        family: its class.
        settings: where the model comes from.
        native_size: side in pixels of the pictures it was made for.
        configurations: where its configurations and tokenizers come from.
        denoiser_config: the denoiser's configuration.
        scheduler_config: the noise schedule's configuration.
        notes: what was decided about defaults that do not fit this checkpoint.
    """

    family_name: str
    family: type[Family]
    settings: ModelConfig
    native_size: int
    configurations: Source
    denoiser_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    notes: tuple[Note, ...] = ()


def locate(
    settings: ModelConfig, *, vae_is_explicit: bool = True, guide: str | None = None
) -> BaseModel:
    """Finds the base model, its family and its size, and checks what can be checked without it.

    Args:
        settings: the request.
        vae_is_explicit: whether somebody chose `vae_url`; a default VAE of another latent
            space gives way to the checkpoint's own, an explicit one is an error.
        guide: what is to guide its pictures; None: no more than a prompt, as in training.

    Raises:
        InputError: not found, not reachable, of no known or another family, of no known noise
            schedule, missing variant, unfitting VAE.
    """
    shapes: Mapping[str, list[int]] = {}
    if settings.is_single_file:
        shapes = read_shapes(Path(settings.model_url), field="model_url")
        name = _family_of_file(settings.model_url, shapes)
    else:
        name = _family_of_folder(Source(settings.model_url, settings.revision), guide)
    family = _families(guide)[name]
    if settings.model_family not in (None, name):
        raise InputError.of(
            "model_family",
            f"is `{settings.model_family}`, but `{settings.model_url}` is a `{name}` checkpoint",
            f"leave it out or give `{name}`",
        )
    _check_variant(settings, family)
    source = _configurations(settings, family)
    denoiser_config = source.read_json(f"{family.denoiser_name}/config.json")
    _check_denoiser(source, name, family, denoiser_config)
    vae_config = source.read_json("vae/config.json")
    size = _native_size(source, family, denoiser_config, vae_config)
    scheduler_config = _scheduler_config(source, shapes)
    settings, notes = vae.settled(settings, family, vae_config, is_explicit=vae_is_explicit)
    base = BaseModel(name, family, settings, size, source, denoiser_config, scheduler_config, notes)
    objective_of(base)
    return base


def objective_of(base: BaseModel, loss: LossConfig | None = None) -> Objective:
    """What the base model was trained to predict, over its noise schedule.

    Args:
        base: as found.
        loss: how timesteps are drawn. None: by the engine's defaults.

    Raises:
        InputError: the schedule is of an unknown kind.
    """
    return base.family.objective_class.from_config(base.scheduler_config, loss)


def skeleton(base: BaseModel, component: str) -> torch.nn.Module:
    """A component with its layers and their shapes, but no weights: all on the meta device.

    Raises:
        InputError: its configuration contradicts itself.
    """
    library, class_name = base.configurations.read_json("model_index.json")[component]
    config = base.configurations.read_json(f"{component}/config.json")
    model_class: Any = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        try:
            model: torch.nn.Module = (
                model_class.from_config(config)
                if issubclass(model_class, ConfigMixin)
                else model_class(model_class.config_class.from_dict(config))
            )
        except (ValueError, TypeError) as error:
            message = f"`{component}/config.json` describes no model: {error}"
            raise InputError.of(base.configurations.field, message, "correct it") from error
    return model.requires_grad_(False).eval()


def load(
    base: BaseModel,
    precision: Precision,
    *,
    without: Collection[str] = frozenset(),
    later: Mapping[str, str] | None = None,
) -> Family:
    """Opens the pipeline with its weights, on the processor, all parts frozen and in `eval` mode.

    Args:
        base: as found.
        precision: number formats of its parts.
        without: models that are not needed and stay None.
        later: models that may not be needed, with digests of what they hold: they stay in their
            files until `Family.have`.

    Raises:
        InputError: files are missing or unreadable.
    """
    settings, later = base.settings, later or {}
    left, dtypes = {*without, *later}, precision.of(base.family)
    given: dict[str, Any] = dict.fromkeys((*base.family.checkpoints.unused, *left))
    if "vae" in later:
        # Pipelines ask its configuration how many pixels a latent one is wide.
        given["vae"] = skeleton(base, "vae")
    pipeline = _pipeline(base, precision, given)
    scheduler_class = type(pipeline.scheduler)
    pipeline.register_modules(scheduler=scheduler_class.from_config(dict(base.scheduler_config)))
    if settings.vae_url is not None and "vae" not in left:
        chosen = vae.load_vae(settings.vae_url, base.configurations, precision.vae)
        pipeline.register_modules(vae=chosen)
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in later:
            without_data = [n for n, p in component.named_parameters() if p.is_meta]
            _refuse_gaps(settings, name, without_data)
            component.requires_grad_(False).eval()
            wanted = dtypes.get(name, precision.frozen)
            if component.dtype != wanted:
                component.to(wanted)
    unread = {name: UnreadModel(contents, dtypes[name]) for name, contents in later.items()}
    left_in_files = Unread(pipeline, unread, partial(_read, base, precision))
    return base.family(pipeline, left_in_files, settings.max_sequence_length)


def _pipeline(base: BaseModel, precision: Precision, given: Mapping[str, Any]) -> Any:
    """The pipeline as diffusers reads it.

    Args:
        given: components that are not read.
    """
    settings, dtypes = base.settings, precision.of(base.family)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with hub_errors(
        "model_url", settings.model_url, revision=settings.revision, variant=settings.variant
    ):
        if settings.is_single_file:
            # One format for all parts: the widest, so that none is rounded before its own.
            return base.family.pipeline_class.from_single_file(
                settings.model_url,
                config=base.configurations.url,
                dtype=torch.float32,
                low_cpu_mem_usage=False,
                **given,
            )
        return base.family.pipeline_class.from_pretrained(
            settings.model_url,
            dtype={"default": precision.frozen, **dtypes},
            revision=settings.revision,
            variant=settings.variant,
            use_safetensors=True,
            **_text_encoders(base, dtypes, given.keys()),
            **given,
        )


def _read(
    base: BaseModel, precision: Precision, names: Collection[str]
) -> dict[str, torch.nn.Module]:
    """Some of the models alone."""
    others = precision.of(base.family).keys() - set(names)
    components = load(base, precision, without=others).pipeline.components
    return {name: components[name] for name in names}


def _text_encoders(
    base: BaseModel, dtypes: Mapping[str, torch.dtype], without: Collection[str]
) -> dict[str, torch.nn.Module]:
    """The text encoders of a folder or hub id, which transformers would complete with noise.

    Raises:
        InputError: a weight is missing.
    """
    settings = base.settings
    index = base.configurations.read_json("model_index.json")
    encoders: dict[str, torch.nn.Module] = {}
    for name in base.family.text_encoder_names:
        if name in without:
            continue
        encoder_class: Any = getattr(transformers, index[name][1])
        encoder, report = encoder_class.from_pretrained(
            settings.model_url,
            subfolder=name,
            revision=settings.revision,
            variant=settings.variant,
            dtype=dtypes[name],
            use_safetensors=True,
            output_loading_info=True,
        )
        _refuse_gaps(settings, name, sorted(report["missing_keys"]))
        encoders[name] = encoder
    return encoders


def _refuse_gaps(settings: ModelConfig, part: str, missing: Sequence[str]) -> None:
    if missing:
        raise InputError.of(
            "model_url",
            f"`{part}` of `{settings.model_url}` lacks {len(missing)} weights, "
            f"such as `{missing[0]}`",
            "give a complete checkpoint",
        )


def _configurations(settings: ModelConfig, family: type[Family]) -> Source:
    if not settings.is_single_file:
        return Source(settings.model_url, settings.revision)
    url = settings.single_file_config or family.checkpoints.file_config
    return Source(url, field="single_file_config")


def _families(guide: str | None) -> dict[str, type[Family]]:
    """Every family by its name, or those with checkpoints for a guide, as these have them."""
    families = {name: load_family(name) for name in family_names()}
    if guide is None:
        return families
    able = {n: family for n, family in families.items() if guide in family.checkpoints.guided}
    return {name: guided_by(family, guide) for name, family in able.items()}


def _family_of_folder(source: Source, guide: str | None) -> str:
    index = source.read_json("model_index.json")
    pipeline = str(index.get("_class_name"))
    families = _families(guide)
    alike = [n for n, family in families.items() if _is_bag_of(pipeline, family)]
    reason = f"is a `{pipeline}`"
    for name in alike:
        family = families[name]
        parts = (family.denoiser_name, "vae", *family.text_encoder_names)
        missing = [part for part in parts if index.get(part) in (None, [None, None])]
        if missing:
            reason = f"is a `{pipeline}` without {', '.join(missing)}"
            continue
        config = source.read_json(f"{family.denoiser_name}/config.json")
        difference = family.checkpoints.difference(config)
        if difference is None:
            return name
        reason = f"is no `{name}`: its {family.denoiser_name} {difference}"
    if guide is not None:
        classes = sorted({family.pipeline_class.__name__ for family in families.values()})
        hint = f"give a checkpoint made for it: a {' or '.join(classes)}"
        raise InputError.of(source.field, f"`{source.url}` {reason}, not one for `{guide}`", hint)
    raise InputError.of(
        source.field, f"`{source.url}` {reason}, which is not trained here", _known_families()
    )


def _is_bag_of(pipeline: str, family: type[Family]) -> bool:
    """Whether a pipeline class of this name holds a family's components."""
    return pipeline in {family.pipeline_class.__name__, *family.checkpoints.pipelines}


def _family_of_file(url: str, shapes: Mapping[str, list[int]]) -> str:
    names = [n for n in family_names() if load_family(n).checkpoints.file_key in shapes]
    if not names:
        raise InputError.of(
            "model_url",
            f"`{url}` holds no complete checkpoint of a known family",
            f"{_known_families()}; a LoRA is no base model",
        )
    (name,) = names
    checkpoints = load_family(name).checkpoints
    entrance = shapes.get(checkpoints.file_input)
    if entrance is None or entrance[1] != checkpoints.denoiser["in_channels"]:
        got = "no denoiser" if entrance is None else f"a denoiser with {entrance[1]} channels"
        raise InputError.of(
            "model_url",
            f"`{url}` has {got} where a `{name}` has {checkpoints.denoiser['in_channels']}",
            _known_families(),
        )
    for marker in _MARKERS_OF_EDM:
        if marker in shapes:
            message = f"`{url}` is of the EDM kind (it holds `{marker}`), which is not trained here"
            raise InputError.of("model_url", message, _known_families())
    return name


def _known_families() -> str:
    return f"give a checkpoint of one of: {', '.join(family_names())}"


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


def _check_denoiser(
    source: Source, name: str, family: type[Family], config: Mapping[str, Any]
) -> None:
    """Refuses configurations of another family beside a one-file checkpoint."""
    difference = family.checkpoints.difference(config)
    if difference is not None:
        raise InputError.of(
            source.field,
            f"`{source.url}` does not describe a `{name}`: its {family.denoiser_name} {difference}",
            f"give a folder or hub id with the configurations of a `{name}`, or leave it out",
        )


def _scheduler_config(source: Source, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The noise schedule, corrected by what a one-file checkpoint says of its training."""
    config = source.read_json("scheduler/scheduler_config.json")
    if _V_PREDICTION in shapes:
        config["prediction_type"] = "v_prediction"
        if _ZERO_TERMINAL_SNR in shapes:
            config["rescale_betas_zero_snr"] = True
    return config


def _native_size(
    source: Source,
    family: type[Family],
    denoiser_config: Mapping[str, Any],
    vae_config: Mapping[str, Any],
) -> int:
    """Side in pixels: the denoiser's side in latents, doubled by each block of the VAE but one.

    A transformer that takes any number of tokens has no side of its own: there it is the VAE's.
    """
    denoiser_class: Any = getattr(diffusers, denoiser_config["_class_name"])
    side, own = denoiser_config.get("sample_size"), vae_config.get("sample_size")
    blocks = vae_config.get("block_out_channels")
    if "sample_size" not in inspect.signature(denoiser_class).parameters:
        if isinstance(own, int):
            return own
        missing, name = "sample_size", "vae"
    elif not isinstance(side, int):
        missing, name = "sample_size", family.denoiser_name
    elif not isinstance(blocks, list) or not blocks:
        missing, name = "block_out_channels", "vae"
    else:
        return side * int(2 ** (len(blocks) - 1))
    raise InputError.of(
        source.field,
        f"`{name}/config.json` of `{source.url}` has no usable `{missing}`",
        "fetch the model anew, or correct it",
    )
