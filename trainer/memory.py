"""Peak memory of a training, counted on tensors that have shapes but no data.

The base model's parts are built from their configurations alone, so that nothing large is
downloaded or allocated; then what a training does runs over them, up to a real forward and backward
pass, and every storage is counted. Of equal blocks few are run; `live_bytes` adds the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from diffusers.utils import logging as diffusers_logging
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from trainer import base_model
from trainer.base_model import BaseModel, Precision
from trainer.collection import uncollected
from trainer.config import DataConfig, TokenConfig, TrainingConfig
from trainer.dataless import (
    Encoded,
    Model,
    able_encoders,
    give_tensors,
    make_text_trainable,
    prepare_denoiser,
)
from trainer.families.base import Conditioning, Family
from trainer.outcomes import Outcomes
from trainer.sections.subjects import class_sources
from trainer.trainables import recompute_activations
from trainer.update_memory import UpdateMemory

Made = TypeVar("Made")


# What a training does that may take the most memory.
CLASS_PICTURES, ENCODING, STEPS = "class pictures", "encoding", "steps"


@dataclass(frozen=True)
class Footprint:
    """What a training takes on the training device.

    Args:
        stages: most memory that tensors hold at one time while it does each of these.
        weights_bytes: of that in the steps, the weights of what runs in them.
        state_bytes: likewise, what the optimizer keeps.
        trained_parameters: how many numbers learn.
    """

    stages: Mapping[str, int]
    weights_bytes: int
    state_bytes: int
    trained_parameters: int

    @property
    def peak_bytes(self) -> int:
        """Most memory that tensors hold at one time."""
        return max(self.stages.values())


def training_footprint(
    base: BaseModel, precision: Precision, device: torch.device, config: TrainingConfig
) -> Footprint:
    """The footprint of one training, see `Forecast`."""
    return Forecast(base, device).footprint(config, precision)


class Forecast:
    """Foresees trainings of a base model on one device; what they share is made once.

    Left out are what the device's driver takes for itself and memory lost to fragmentation.

    Args:
        base: as found; its weights are not touched.
        device: where the trainings would run; it decides what autocast widens.
    """

    def __init__(self, base: BaseModel, device: torch.device) -> None:
        self._base, self._device = base, device
        self._mode, self._outcomes = FakeTensorMode(), Outcomes()
        self._made: dict[Hashable, object] = {}

    def footprint(self, config: TrainingConfig, precision: Precision) -> Footprint:
        """The footprint of one training.

        Args:
            config: with both resolutions set.
            precision: number formats of the base model's parts.

        Raises:
            InputError: this model or machine cannot be trained so.
            OSError: a configuration or tokenizer is neither here nor on the hub.
        """
        share = config.run.checkpointing_share
        if config.run.gradient_checkpointing and share < 1:
            return self._between(config, precision, share)
        settings = config.model_dump_json(exclude={"resolved"})
        return self._once((settings, precision), lambda: self._footprint(config, precision))

    def _between(self, config: TrainingConfig, precision: Precision, share: float) -> Footprint:
        """Where only some blocks recompute, which save about their share: they are of all sizes."""
        keeping = self.footprint(config.with_leaf("gradient_checkpointing", False), precision)
        recomputing = self.footprint(config.with_leaf("checkpointing_share", 1.0), precision)
        saved = max(0, keeping.stages[STEPS] - recomputing.stages[STEPS])
        steps = recomputing.stages[STEPS] + round((1 - share) * saved)
        return replace(recomputing, stages={**recomputing.stages, STEPS: steps})

    def _footprint(self, config: TrainingConfig, precision: Precision) -> Footprint:
        sources = class_sources(config.subjects())
        update = _update_of(config, precision, self._device)
        stages = {}
        with uncollected(), self._mode:
            if any(source.url is None for source in sources):
                untrained = self._model(precision, config, learns=False)
                latents = self._pictures(untrained, config, precision).made
                stages[CLASS_PICTURES] = _peak_of_class_images(untrained, config, latents)
            model = self._model(precision, config, learns=True)
            learning = _learning(model.family)
            if config.run.gradient_checkpointing:
                _recompute_activations(model.family, learning)
            else:
                model.family.denoiser.disable_gradient_checkpointing()
            captions = self._captions(model, precision, learning)
            pictures = self._pictures(model, config, precision)
            stages[ENCODING] = _peak_of_encoding(captions, pictures, text_stays=len(learning) > 1)
            steps = [
                _peak_of_steps(model, config, precision, parts, update, (captions, pictures))
                for parts in _phases(config.token, learning)
            ]
            _freeze_all_but(model.family, [p for group in learning.values() for p in group])
        most = max(steps, key=lambda phase: phase.peak)
        stages[STEPS] = most.peak
        trained = sum(map(model.count, learning.values()))
        return Footprint(stages, most.weights, most.state, trained)

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    def _model(self, precision: Precision, config: TrainingConfig, *, learns: bool) -> Model:
        """The base model, made anew only where something of it differs."""
        able = able_encoders(self._base.family, config) if learns else ()
        # Sections hold lists. What recomputes in a text encoder cannot be undone.
        kept = config.model.model_dump_json(), config.run.offload_blocks
        parts = config.adapter.model_dump_json(), config.token.model_dump_json()
        learnt = (*parts, config.run.gradient_checkpointing if able else None) if learns else ()
        return self._once(
            ("model", precision, *kept, *learnt),
            lambda: self._made_anew(precision, config, learns=learns),
        )

    def _made_anew(self, precision: Precision, config: TrainingConfig, *, learns: bool) -> Model:
        """The base model around its real tokenizers.

        Args:
            precision: number formats of the parts.
            config: what is made to learn, and how frozen weights are kept.
            learns: whether anything is made to learn yet.
        """
        family = self._base.family
        dtypes = precision.of_text_encoders(family) | {"vae": precision.vae}
        able = able_encoders(family, config) if learns else ()
        parts = {
            name: self._text_encoder(name, dtype, config)
            if name in able
            else self._once((name, dtype), lambda n=name, d=dtype: self._part(n, d))  # type: ignore[misc]
            for name, dtype in dtypes.items()
        }
        # Layers are made faster on the meta device alone.
        with unset_fake_temporarily():
            denoiser = base_model.skeleton(self._base, family.denoiser_name)
            denoiser = torch.nn.Module.to(denoiser, precision.denoiser)
            stand_ins = prepare_denoiser(self._base, denoiser, config, learns=learns)
        parts[family.denoiser_name] = denoiser
        give_tensors(denoiser, self._mode, self._device)
        pipeline = copy(self._once("pipeline", lambda: self._pipeline(parts)))
        pipeline.register_modules(**parts)
        made = family(pipeline, max_sequence_length=config.model.max_sequence_length)
        return Model(made, stand_ins, self._outcomes)

    def _pipeline(self, parts: Mapping[str, torch.nn.Module]) -> Any:
        source, family = self._base.configurations, self._base.family
        unused = dict.fromkeys(family.checkpoints.unused)
        diffusers_logging.disable_progress_bar()
        # Noise schedules compute with their numbers as they are made.
        with unset_fake_temporarily():
            return family.pipeline_class.from_pretrained(
                source.url, revision=source.revision, **parts, **unused
            )

    def _part(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        """A part in which nothing learns."""
        with unset_fake_temporarily():
            # Only numbers change: diffusers and transformers warn of it.
            part = torch.nn.Module.to(base_model.skeleton(self._base, name), dtype)
        give_tensors(part, self._mode, self._device)
        return part

    def _text_encoder(
        self, name: str, dtype: torch.dtype, config: TrainingConfig
    ) -> torch.nn.Module:
        """A text encoder that learns."""
        with unset_fake_temporarily():
            part = torch.nn.Module.to(base_model.skeleton(self._base, name), dtype)
            make_text_trainable(self._base.family, part, name, config)
        give_tensors(part, self._mode, self._device)
        return part

    def _captions(
        self, model: Model, precision: Precision, learning: _Learning
    ) -> Encoded[Conditioning]:
        """One caption, encoded as where text encoders do not learn."""
        family = model.family
        encoders = [family.pipeline.components[name] for name in family.text_encoder_names]

        def make() -> Encoded[Conditioning]:
            return model.encoded(encoders, lambda: family.encode_text([""]))

        if any(name in learning for name in family.text_encoder_names):
            return make()
        formats = precision.frozen, precision.text_encoders
        return self._once(("captions", *formats, family.max_sequence_length), make)

    def _pictures(
        self, model: Model, config: TrainingConfig, precision: Precision
    ) -> Encoded[torch.Tensor]:
        """One picture, encoded."""

        def make() -> Encoded[torch.Tensor]:
            vae = model.family.pipeline.vae
            encode = partial(_encode_pictures, model.family, config.data, 1)
            return model.encoded([vae], encode)

        size = config.data.resolution_height, config.data.resolution_width
        return self._once(("pictures", *size, precision.vae), make)


def _update_of(config: TrainingConfig, precision: Precision, device: torch.device) -> UpdateMemory:
    """What updates take; adapters learn in 32 bits, and by one step of the optimizer."""
    is_whole = not config.adapter.use_lora
    return UpdateMemory.measured(
        config.optim,
        precision.denoiser if is_whole else torch.float32,
        device,
        one_by_one=is_whole and config.optim.fused_backward,
    )


# Component to the parameters that learn in it, for components in which any do.
_Learning = dict[str, list[torch.nn.Parameter]]


def _learning(family: Family) -> _Learning:
    names = (family.denoiser_name, *family.text_encoder_names)
    found = {
        name: [p for p in family.pipeline.components[name].parameters() if p.requires_grad]
        for name in names
    }
    return {name: parameters for name, parameters in found.items() if parameters}


def _phases(token: TokenConfig, learning: _Learning) -> list[_Learning]:
    """What learns at one time: everything, or the new tokens first and then the denoiser."""
    if not (token.train_text_encoder_ti and token.disable_unet_during_ti_training):
        return [learning]
    (denoiser, *text_encoders) = learning
    return [{name: learning[name] for name in text_encoders}, {denoiser: learning[denoiser]}]


def _recompute_activations(family: Family, learning: _Learning) -> None:
    # States of random generators are data, which fake tensors do not have.
    def recompute(module: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)

    family.denoiser.enable_gradient_checkpointing(recompute)
    for name in learning.keys() - {family.denoiser_name}:
        recompute_activations(family.pipeline.components[name], preserve_rng_state=False)


def _peak_of_class_images(model: Model, config: TrainingConfig, latents: torch.Tensor) -> int:
    """Making one class picture: text, a step of denoising, decoding.

    All parts are on the device all the time, or each in its turn.

    Args:
        latents: of one picture.
    """
    family = model.family
    # Without guidance, or where the denoiser is told it, there is but one row.
    scale = config.prior.class_guidance_scale
    is_told = family.denoiser.config.get("guidance_embeds", False)
    rows = 1 if is_told or (scale is not None and scale <= 1) else 2
    noisy_latents = torch.empty(rows, *latents.shape[1:], device=latents.device)
    vae, denoiser = family.pipeline.vae, family.denoiser
    encoders = [family.pipeline.components[name] for name in family.text_encoder_names]

    def encode() -> Conditioning:
        return family.encode_text([""] * rows)

    def denoise() -> None:
        dtype = next(iter(text.values())).dtype
        formats_differ = denoiser.dtype != dtype
        with torch.autocast(noisy_latents.device.type, dtype, enabled=formats_differ):
            _predict(family, noisy_latents.to(dtype), text)

    def decode() -> None:
        shape = (1, vae.config.latent_channels, *latents.shape[-2:])
        vae.decode(torch.empty(shape, dtype=vae.dtype, device=latents.device))

    def there(*parts: torch.nn.Module) -> Sequence[torch.nn.Module]:
        return parts if config.run.offload_models else (denoiser, vae, *encoders)

    told = model.encoded(there(*encoders), encode)
    text = told.made
    denoised = model.encoded(there(denoiser), denoise)
    decoded = model.encoded(there(vae), decode)
    return max(told.peak, denoised.peak, decoded.peak)


def _peak_of_encoding(
    captions: Encoded[Conditioning], pictures: Encoded[torch.Tensor], *, text_stays: bool
) -> int:
    """Captions, then pictures, each by itself; text encoders that learn stay on the device."""
    return max(captions.peak, pictures.peak + (captions.weights if text_stays else 0))


@dataclass(frozen=True)
class _Steps:
    """Bytes of steps: the most at one time, and of these what weights and optimizer hold."""

    peak: int
    weights: int
    state: int


def _peak_of_steps(
    model: Model,
    config: TrainingConfig,
    precision: Precision,
    learning: _Learning,
    update: UpdateMemory,
    encoded: tuple[Encoded[Conditioning], Encoded[torch.Tensor]],
) -> _Steps:
    """Forward and backward passes while these parameters learn, beside the optimizer's state.

    Args:
        encoded: a caption and a picture.
    """
    family = model.family
    encoders = [family.pipeline.components[n] for n in family.text_encoder_names if n in learning]
    parameters = [p for group in learning.values() for p in group]
    rows, num_captions = _forward_pass(config)
    captions, pictures = encoded
    kept = None if encoders else _in_rows(captions.made, rows)
    shape = pictures.made.shape[1:]
    _freeze_all_but(family, parameters)
    hooks = update.in_backward(parameters) if config.optim.fused_backward else []
    with model.counter() as steps:
        for module in (family.denoiser, *encoders):
            steps.hold(module)
        if not config.data.cache_latents:
            steps.hold(family.pipeline.vae)
        weights, state = steps.now, round(update.state * model.count(parameters))
        steps.add(state)
        copies = model.copies([family.denoiser, *encoders], precision.frozen, steps)
        # From the second pass on, the gradients of the first are there from the start, unless each
        # is given up at once. What of a text encoder gets none is not known before.
        accumulates = config.run.gradient_accumulation_steps > 1 and not hooks
        steps.add(model.give_gradients(parameters if accumulates and not encoders else ()))
        for _ in range(1 + (accumulates and bool(encoders))):
            if not config.data.cache_latents:
                _encode_pictures(family, config.data, rows)
            noisy_latents = torch.empty(rows, *shape, device=family.denoiser.device)
            with copies.of_this_step():
                text = kept or _encode_captions(family, precision, num_captions, rows)
                with steps.ending_caches(_autocast(family, precision)):
                    prediction = _predict(family, noisy_latents, text)
                (prediction.float() - noisy_latents).square().mean().backward()
            del text, prediction
        for parameter in parameters:
            update.of(parameter)
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    return _Steps(int(steps.peak), int(weights), state)


def _forward_pass(config: TrainingConfig) -> tuple[int, int]:
    """The most examples of one forward pass, class pictures included, and different captions."""
    batch_size = config.run.batch_size
    class_prompts = {source.prompt for source in class_sources(config.subjects())}
    if not class_prompts:
        return batch_size, batch_size
    return 2 * batch_size, batch_size + min(batch_size, len(class_prompts))


def _freeze_all_but(family: Family, parameters: Sequence[torch.nn.Parameter]) -> None:
    for name in (family.denoiser_name, *family.text_encoder_names):
        family.pipeline.components[name].requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _autocast(family: Family, precision: Precision) -> torch.autocast:
    enabled = precision.frozen != torch.float32
    return torch.autocast(family.denoiser.device.type, precision.frozen, enabled=enabled)


def _encode_captions(
    family: Family, precision: Precision, num_captions: int, rows: int
) -> Conditioning:
    """Each caption is encoded once, and stands in as many rows as there are examples."""
    with _autocast(family, precision):
        text = family.encode_text([""] * num_captions)
    return _in_rows(text, rows)


def _in_rows(text: Conditioning, rows: int) -> Conditioning:
    def repeat(states: torch.Tensor) -> torch.Tensor:
        return states.index_select(0, torch.zeros(rows, dtype=torch.int64, device=states.device))

    return {name: repeat(states) for name, states in text.items()}


def _encode_pictures(family: Family, data: DataConfig, count: int) -> torch.Tensor:
    assert data.resolution_height is not None
    assert data.resolution_width is not None
    size = data.resolution_height, data.resolution_width
    with torch.no_grad():
        pixels = torch.empty(count, 3, *size, device=family.denoiser.device)
        return family.encode_image(pixels).mean


def _predict(family: Family, latents: torch.Tensor, text: Conditioning) -> torch.Tensor:
    count, device = len(latents), latents.device
    sizes = torch.zeros(count, 2, dtype=torch.int64, device=device)
    geometry = dict.fromkeys(("original_size", "crop_top_left", "target_size"), sizes)
    geometry["guidance"] = torch.zeros(count, device=device)
    timesteps = torch.zeros(count, dtype=torch.int64, device=device)
    return family.predict(latents, timesteps, text, geometry)
