"""Peak memory of a training, counted on tensors that have shapes but no data.

The base model's parts are built from their configurations alone, so that nothing large is
downloaded or allocated; then what a training does runs over them once, up to a real forward and
backward pass, and every storage is counted from its making to its end. Of a row of equal blocks
few are run; `live_bytes` counts what the others add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from trainer import adapters, base_model
from trainer.base_model import BaseModel, Precision
from trainer.config import AdapterConfig, DataConfig, TokenConfig, TrainingConfig
from trainer.families.base import Conditioning, Family, adapted_encoders, token_encoders
from trainer.frozen import freeze, frozen_layers, repeated_blocks
from trainer.live_bytes import LiveBytes, StandIn, repeated, shorten
from trainer.sections.subjects import class_sources
from trainer.tokens import NewTokens
from trainer.trainables import recompute_activations
from trainer.update_memory import UpdateMemory


@dataclass(frozen=True)
class Footprint:
    """What a training takes.

    Args:
        peak_bytes: most memory that tensors hold at one time on the training device.
        trained_parameters: how many numbers learn.
    """

    peak_bytes: int
    trained_parameters: int


def training_footprint(
    base: BaseModel, precision: Precision, device: torch.device, config: TrainingConfig
) -> Footprint:
    """The footprint of training a base model on one device.

    Left out are what the device's driver takes for itself and memory lost to fragmentation.

    Args:
        base: as found; its weights are not touched.
        precision: number formats of its parts.
        device: where the training would run; it decides what autocast widens.
        config: with both resolutions set.

    Raises:
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    sources = class_sources(config.subjects())
    makes_class_images = any(source.url is None for source in sources)
    update = _update_of(config, precision, device)
    peaks = []
    with FakeTensorMode():
        if makes_class_images:
            untrained = _model_without_data(base, precision, device, config, learns=False)
            peaks.append(_peak_of_class_images(untrained, config))
        model = _model_without_data(base, precision, device, config, learns=True)
        learning = _learning(model.family)
        if config.run.gradient_checkpointing:
            _recompute_activations(model.family, learning)
        peaks += [
            _peak_of_encoding(model.family, config.data, text_stays=len(learning) > 1),
            *(
                _peak_of_steps(model, config, precision, parts, update)
                for parts in _phases(config.token, learning)
            ),
        ]
    trained = sum(map(model.count, learning.values()))
    return Footprint(peak_bytes=max(peaks), trained_parameters=trained)


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


@dataclass(frozen=True)
class _Model:
    """A base model that has shapes but no data.

    Args:
        family: its real tokenizers around models whose rows of equal blocks are shortened.
        stand_ins: the blocks that stand for those taken out.
    """

    family: Family
    stand_ins: tuple[StandIn, ...]

    def count(self, parameters: Sequence[torch.nn.Parameter]) -> int:
        """How many numbers these are, those of the blocks taken out included."""
        times = repeated(self.stand_ins)
        return sum(times.get(parameter, 1) * parameter.numel() for parameter in parameters)


def _model_without_data(
    base: BaseModel,
    precision: Precision,
    device: torch.device,
    config: TrainingConfig,
    *,
    learns: bool,
) -> _Model:
    """The base model around its real tokenizers.

    Args:
        base: as found.
        precision: number formats of the parts.
        device: of the models.
        config: what is made to learn, and how frozen weights are kept.
        learns: whether anything is made to learn yet.
    """
    dtypes = precision.of_text_encoders(base.family)
    dtypes |= {"vae": precision.vae, base.family.denoiser_name: precision.denoiser}
    parts: dict[str, torch.nn.Module] = {}
    diffusers_logging.disable_progress_bar()
    # Layers are made faster on the meta device alone; noise schedules compute with their numbers
    # as they are made.
    with unset_fake_temporarily():
        for name, dtype in dtypes.items():
            # Only numbers change: diffusers and transformers warn of it.
            parts[name] = torch.nn.Module.to(base_model.skeleton(base, name), dtype)
            if name != base.family.denoiser_name and learns:
                _make_text_trainable(base.family, parts[name], name, config)
        denoiser = parts[base.family.denoiser_name]
        stand_ins = _prepare_denoiser(base, denoiser, config, learns=learns)
        unused = dict.fromkeys(base.family.checkpoints.unused)
        pipeline = base.family.pipeline_class.from_pretrained(
            base.configurations.url, revision=base.configurations.revision, **parts, **unused
        )
    for part in parts.values():
        _give_tensors(part, device)
    return _Model(base.family(pipeline), stand_ins)


def _prepare_denoiser(
    base: BaseModel, denoiser: torch.nn.Module, config: TrainingConfig, *, learns: bool
) -> tuple[StandIn, ...]:
    freeze(
        denoiser,
        quantization=config.model.quantization,
        offload_blocks=config.run.offload_blocks,
        device=torch.device("meta"),
    )
    if learns:
        targets = config.adapter.target_unet_modules
        _make_trainable(denoiser, base.family.denoiser_name, config.adapter, targets)
    return shorten(denoiser, repeated_blocks(denoiser))


def _make_text_trainable(
    family: type[Family], text_encoder: Any, name: str, config: TrainingConfig
) -> None:
    adapter, token = config.adapter, config.token
    if token.train_text_encoder_ti and name in token_encoders(family):
        table = text_encoder.get_input_embeddings()
        count = len(token.token_abstraction) * token.num_new_tokens_per_abstraction
        rows = torch.empty(count, table.embedding_dim, device="meta")
        new = NewTokens(table, rows, first_id=table.num_embeddings, deviation=1.0)
        text_encoder.set_input_embeddings(new)
    if adapter.train_text_encoder and name in adapted_encoders(family):
        targets = adapter.target_text_encoder_modules
        _make_trainable(text_encoder, name, adapter.for_text_encoders(), targets)


def _make_trainable(
    module: torch.nn.Module, name: str, adapter: AdapterConfig, targets: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        adapters.make_trainable(
            module, adapter, targets, field="", component=name, seed=0, must_match=False
        )


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


def _give_tensors(model: torch.nn.Module, device: torch.device) -> None:
    """Puts tensors without data on a device in the place of those without a device."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def make(like: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Text encoders look words up in the table that they know as two.
            if parameter not in made:
                made[parameter] = torch.nn.Parameter(
                    make(parameter), requires_grad=parameter.requires_grad
                )
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, make(buffer))
    for layer in frozen_layers(model):
        layer.rebuild(make)


def _recompute_activations(family: Family, learning: _Learning) -> None:
    # States of random generators are data, which fake tensors do not have.
    def recompute(module: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)

    family.denoiser.enable_gradient_checkpointing(recompute)
    for name in learning.keys() - {family.denoiser_name}:
        recompute_activations(family.pipeline.components[name], preserve_rng_state=False)


def _peak_of_class_images(model: _Model, config: TrainingConfig) -> int:
    """Making one class picture: text, a step of denoising, decoding.

    All parts are on the device all the time, or each in its turn.
    """
    family = model.family
    # Without guidance, or where the denoiser is told it, there is but one row.
    scale = config.prior.class_guidance_scale
    is_told = family.denoiser.config.get("guidance_embeds", False)
    rows = 1 if is_told or (scale is not None and scale <= 1) else 2
    latents = _encode_pictures(family, config.data, 1)
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

    with torch.no_grad():
        text = encode()
    peaks = []
    for parts, work in ((encoders, encode), ([denoiser], denoise), ([vae], decode)):
        there = parts if config.run.offload_models else (denoiser, vae, *encoders)
        with LiveBytes(model.stand_ins) as stage, torch.no_grad():
            for part in there:
                stage.hold(part)
            work()
        peaks.append(int(stage.peak))
    return max(peaks)


def _peak_of_encoding(family: Family, data: DataConfig, *, text_stays: bool) -> int:
    """Captions, then pictures, each by itself; text encoders that learn stay on the device."""
    encoders = [family.pipeline.components[name] for name in family.text_encoder_names]
    with LiveBytes() as text_stage, torch.no_grad():
        for encoder in encoders:
            text_stage.hold(encoder)
        family.encode_text([""])
    with LiveBytes() as picture_stage:
        for part in (family.pipeline.vae, *(encoders if text_stays else ())):
            picture_stage.hold(part)
        _encode_pictures(family, data, 1)
    return max(int(text_stage.peak), int(picture_stage.peak))


def _peak_of_steps(
    model: _Model,
    config: TrainingConfig,
    precision: Precision,
    learning: _Learning,
    update: UpdateMemory,
) -> int:
    """Forward and backward passes while these parameters learn, beside the optimizer's state."""
    family = model.family
    encoders = [family.pipeline.components[n] for n in family.text_encoder_names if n in learning]
    parameters = [p for group in learning.values() for p in group]
    rows, num_captions = _forward_pass(config)
    latents = _encode_pictures(family, config.data, 1)
    kept = None
    if not encoders:
        with torch.no_grad():
            kept = _encode_captions(family, precision, 1, rows)
    _freeze_all_but(family, parameters)
    hooks = update.in_backward(parameters) if config.optim.fused_backward else []
    with LiveBytes(model.stand_ins) as steps:
        for module in (family.denoiser, *encoders):
            steps.hold(module)
        if not config.data.cache_latents:
            steps.hold(family.pipeline.vae)
        steps.add(round(update.state * model.count(parameters)))
        # From the second pass on, the gradients of the first are there from the start.
        for _ in range(min(2, config.run.gradient_accumulation_steps)):
            if not config.data.cache_latents:
                _encode_pictures(family, config.data, rows)
            noisy_latents = torch.empty(rows, *latents.shape[1:], device=latents.device)
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
    return int(steps.peak)


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
    places = torch.zeros(rows, dtype=torch.int64, device=family.denoiser.device)
    with _autocast(family, precision):
        text = family.encode_text([""] * num_captions)
    return {name: states.index_select(0, places) for name, states in text.items()}


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
