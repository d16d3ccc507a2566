"""What a configuration means for the base model that was found, before any weights are read.

Options that mean nothing for it are refused where somebody set them and noted as ignored
otherwise; defaults give way to what its family is trained with. Knows facts, not families.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trainer.adapters import target_layers
from trainer.base_model import BaseModel, skeleton
from trainer.config import LEAVES, AdapterConfig, Note, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.families.base import adapted_encoders, token_encoders
from trainer.leaves import shown
from trainer.rules.draft import Draft
from trainer.rules.idle import note_idle
from trainer.rules.ordinary import warn_of_ordinary_identifiers

_SIZES = ("resolution_width", "resolution_height")
_TOKENS = "train_text_encoder_ti"
_TEXT = "train_text_encoder"


def fitted(
    config: TrainingConfig, base: BaseModel, denoiser: torch.nn.Module | None = None
) -> TrainingConfig:
    """The configuration as this base model takes it.

    Args:
        denoiser: its skeleton, if there is one already.

    Raises:
        InputError: with everything that somebody set and that means nothing here.
    """
    problems = [
        *_without_meaning(config, base),
        *_without_learner(config, base),
        *_odd_sizes(config, base),
        *_without_layers(config, base, denoiser),
    ]
    if problems:
        raise InputError(problems)
    config = _without_snr(config, base)
    config = _with_targets(config, base)
    config = _with_text_left_alone(config, base)
    config = _with_guidance(config, base)
    reasons = _meaningless(base)
    config = _without_lesser_reasons(config, reasons)
    ignored = [Note(kind="ignored", field=n, message=reason) for n, reason in reasons.items()]
    config = config.with_notes(*ignored)
    config = config.with_notes(*_idle(config), *_warnings(config, base))
    return _without_idle_warnings(config)


def _meaningless(base: BaseModel) -> dict[str, str]:
    """The options that this base model has no use for, and why."""
    objective = base.family.objective_class
    reasons = dict.fromkeys(sorted(objective.unused), f"a `{base.family_name}` {objective.learns}")
    if not base.denoiser_config.get("guidance_embeds"):
        reasons["guidance_scale"] = "this denoiser is not told any guidance"
    if not base.family.checkpoints.language_model:
        reasons["max_sequence_length"] = f"CLIP alone reads the captions of a `{base.family_name}`"
    return reasons


def _without_meaning(config: TrainingConfig, base: BaseModel) -> Iterator[Problem]:
    for name, reason in _meaningless(base).items():
        value = config.leaf(name)
        # 0 switches off what is on by default; null asks for nothing.
        is_off = value is None or (value == 0 and LEAVES[name].info.default != 0)
        if config.is_explicit(name) and not is_off:
            message = f"got {shown(value)}, which means nothing here: {reason}"
            yield Problem(name, message, "leave it out")


def _without_learner(config: TrainingConfig, base: BaseModel) -> Iterator[Problem]:
    """Text encoders that should learn, where none can."""
    for leaf, able in _learners(base).items():
        if config.leaf(leaf) and config.is_explicit(leaf) and not able:
            message = f"got true, but no text encoder of a `{base.family_name}` can learn that way"
            yield Problem(leaf, message, f"leave it out; {_words(config)}")


def _learners(base: BaseModel) -> dict[str, tuple[str, ...]]:
    """The options that let text encoders learn, with the text encoders that can."""
    return {
        _TOKENS: token_encoders(base.family),
        _TEXT: adapted_encoders(base.family),
    }


def _words(config: TrainingConfig) -> str:
    listed = ", ".join(f"`{name}`" for name in config.token.token_abstraction)
    return f"{listed} stays text, read as any other word"


def _odd_sizes(config: TrainingConfig, base: BaseModel) -> Iterator[Problem]:
    step = base.family.checkpoints.side_step
    # A side that follows from the other one is told of there.
    chosen = [leaf for leaf in _SIZES if config.is_explicit(leaf)]
    for leaf in chosen or _SIZES:
        side = config.leaf(leaf)
        if side is not None and side % step:
            near = max(step, round(side / step) * step)
            message = f"got {side}; allowed for a `{base.family_name}`: a multiple of {step}"
            yield Problem(leaf, message, f"give {near}")


def _without_layers(
    config: TrainingConfig, base: BaseModel, denoiser: torch.nn.Module | None
) -> Iterator[Problem]:
    """Targets that somebody chose and that are the end of no layer."""
    adapter = config.adapter
    if not adapter.use_lora:
        return
    made = {} if denoiser is None else {base.family.denoiser_name: denoiser}
    targets = {base.family.denoiser_name: ("target_unet_modules", adapter.target_unet_modules)}
    if adapter.train_text_encoder:
        ours = ("target_text_encoder_modules", adapter.target_text_encoder_modules)
        targets |= dict.fromkeys(adapted_encoders(base.family), ours)
    for component, (field, names) in targets.items():
        model = made[component] if component in made else skeleton(base, component)
        try:
            target_layers(model, names, field=field, must_match=config.is_explicit(field))
        except InputError as error:
            yield from error.problems


def _without_snr(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """No min-SNR weight where signal-to-noise ratios play no part."""
    if "snr_gamma" in base.family.objective_class.unused:
        return config.with_leaf("snr_gamma", None)
    return config


def _with_targets(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """The family's own layers in the place of layers that nobody chose."""
    leaf, default = "target_unet_modules", AdapterConfig().target_unet_modules
    own = base.family.target_modules
    nobody = set(config.leaf(leaf)) == set(default) and not config.is_explicit(leaf)
    if not nobody or set(own) == set(default):
        return config
    message = f"{shown(list(default))} gave way to {shown(list(own))}: the layers of such a model"
    note = Note(kind="yielded", field=leaf, message=message)
    return config.with_leaf(leaf, own, note if config.adapter.use_lora else None)


def _with_text_left_alone(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """Text encoders learn neither where they cannot nor, unasked, where it does little."""
    unasked = base.family.objective_class.unasked
    for leaf, able in _learners(base).items():
        if config.leaf(leaf) and not config.is_explicit(leaf) and (not able or leaf in unasked):
            message = f"true gave way to false: {_words(config)}"
            config = config.with_leaf(
                leaf, False, Note(kind="yielded", field=leaf, message=message)
            )
    return config


def _with_guidance(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """Class pictures as the base model's pipeline makes pictures by itself."""
    leaf = "class_guidance_scale"
    if config.leaf(leaf) is not None:
        return config
    parameters = inspect.signature(base.family.pipeline_class.__call__).parameters
    return config.with_leaf(leaf, float(parameters["guidance_scale"].default))


def _idle(config: TrainingConfig) -> list[Note]:
    """What has no effect any more in the configuration as it is now, or is odd without it."""
    values: dict[str, Any] = {name: config.leaf(name) for name in LEAVES}
    draft = Draft(values, dict.fromkeys(LEAVES, 0), frozenset(config.resolved.explicit))
    note_idle(draft)
    if not config.token.train_text_encoder_ti:
        warn_of_ordinary_identifiers(draft)
    known = config.resolved.ignored_options
    return [note for note in draft.notes if note.field not in known]


def _without_lesser_reasons(config: TrainingConfig, reasons: Mapping[str, str]) -> TrainingConfig:
    """No other reason why an option does nothing where this one holds whatever is set."""
    kept = tuple(
        note
        for note in config.resolved.notes
        if note.kind != "ignored" or note.message == reasons.get(note.field, note.message)
    )
    return config.model_copy(
        update={"resolved": config.resolved.model_copy(update={"notes": kept})}
    )


def _without_idle_warnings(config: TrainingConfig) -> TrainingConfig:
    """Nothing is odd about the value of an option without an effect."""
    ignored = config.resolved.ignored_options
    kept = tuple(n for n in config.resolved.notes if n.kind != "warning" or n.field not in ignored)
    resolved = config.resolved.model_copy(update={"notes": kept})
    return config.model_copy(update={"resolved": resolved})


def _warnings(config: TrainingConfig, base: BaseModel) -> Iterator[Note]:
    if config.loss.noise_offset and base.family.objective_class.starts_from_plain_noise:
        message = (
            f"{config.loss.noise_offset:g} teaches noise that no sampler of such a model starts "
            "from: pictures may come out too dark or too bright"
        )
        yield Note(kind="warning", field="noise_offset", message=message)
    if config.data.caption_dropout and base.denoiser_config.get("guidance_embeds"):
        message = (
            f"{shown(config.data.caption_dropout)}: this denoiser is told its guidance, and no "
            "sampler asks it for pictures without a caption"
        )
        yield Note(kind="warning", field="caption_dropout", message=message)
