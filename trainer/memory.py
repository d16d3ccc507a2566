"""Peak memory of a training, counted on tensors that have shapes but no data.

The base model's parts are built from their configurations alone, so that nothing large is
downloaded or allocated; then what a training does runs over them once, up to a real forward and
backward pass, and every storage is counted from its making to its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from trainer import adapters, base_model, optim
from trainer.base_model import BaseModel, Precision
from trainer.config import AdapterConfig, DataConfig, OptimConfig, TokenConfig, TrainingConfig
from trainer.families.base import Conditioning, Family, pixels_of
from trainer.sections.subjects import class_sources
from trainer.tokens import NewTokens

# PyTorch's CUDA allocator hands out multiples of this many bytes.
ALLOCATION_UNIT = 512


@dataclass(frozen=True)
class Footprint:
    """What a training takes.

    Args:
        peak_bytes: most memory that tensors hold at one time on the training device.
        trained_parameters: how many numbers learn.
    """

    peak_bytes: int
    trained_parameters: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live at one time: those held, and those made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch gives it no types
        self.now = 0
        self.peak = 0
        self._sizes = WeakIdKeyDictionary()

    def hold(self, module: torch.nn.Module) -> None:
        """Counts the parameters and buffers of a module."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._count(tensor)

    def add(self, size: int) -> None:
        """Counts bytes that stay."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts the storages it makes."""
        outcome = func(*args, **(kwargs or {}))
        for tensor in tree_iter(outcome):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return outcome

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
        self._sizes[storage] = size
        self.add(size)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


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
    state_bytes = optimizer_bytes_per_parameter(config.optim, device)
    sources = class_sources(config.subjects())
    makes_class_images = any(source.url is None for source in sources)
    with FakeTensorMode():
        peaks = []
        if makes_class_images:
            untrained = _family_without_data(base, precision, device, None)
            peaks.append(_peak_of_class_images(untrained, config))
        family = _family_without_data(base, precision, device, config)
        learning = _learning(family)
        trained = sum(p.numel() for parameters in learning.values() for p in parameters)
        if config.run.gradient_checkpointing:
            _recompute_activations(family, learning)
        peaks += [
            _peak_of_encoding(family, config.data, text_stays=len(learning) > 1),
            *(
                _peak_of_steps(family, config, precision, parts, state_bytes)
                for parts in _phases(config.token, learning)
            ),
        ]
    return Footprint(peak_bytes=max(peaks), trained_parameters=trained)


def optimizer_bytes_per_parameter(optimizer: OptimConfig, device: torch.device) -> float:
    """Bytes of state that an optimizer keeps for each number it trains, seen in a real step."""
    sample = torch.nn.Parameter(torch.ones(512, 512, device=device))
    group = optim.ParameterGroup("sample", [sample], learning_rate=1.0, weight_decay=0.0)
    built = optim.build_optimizer([group], optimizer)
    sample.grad = torch.ones_like(sample)
    built.step()
    tensors = [value for value in built.state[sample].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / sample.numel()


# Component to the parameters that learn in it, for components in which any do.
_Learning = dict[str, list[torch.nn.Parameter]]


def _family_without_data(
    base: BaseModel, precision: Precision, device: torch.device, config: TrainingConfig | None
) -> Family:
    """The family with its real tokenizers around models that have only shapes.

    Args:
        base: as found.
        precision: number formats of what does not learn.
        device: of the models.
        config: what is made to learn. None: nothing.
    """
    dtypes = dict.fromkeys(base.family.text_encoder_names, precision.text_encoders)
    dtypes |= {"vae": precision.vae, base.family.denoiser_name: precision.denoiser}
    parts: dict[str, torch.nn.Module] = {}
    for name, dtype in dtypes.items():
        parts[name] = base_model.skeleton(base, name)
        if config is not None and name == base.family.denoiser_name:
            _make_trainable(parts[name], name, config.adapter, config.adapter.target_unet_modules)
        if config is not None and name in base.family.text_encoder_names:
            _make_text_trainable(parts[name], name, config.adapter, config.token)
        _give_fake_tensors(parts[name], dtype, device)
    unused = dict.fromkeys(base.family.unused_components)
    diffusers_logging.disable_progress_bar()
    pipeline = base.family.pipeline_class.from_pretrained(
        base.configurations.url, revision=base.configurations.revision, **parts, **unused
    )
    return base.family(pipeline)


def _make_text_trainable(
    text_encoder: Any, name: str, adapter: AdapterConfig, token: TokenConfig
) -> None:
    if token.train_text_encoder_ti:
        table = text_encoder.get_input_embeddings()
        count = len(token.token_abstraction) * token.num_new_tokens_per_abstraction
        rows = torch.empty(count, table.embedding_dim, device="meta")
        new = NewTokens(table, rows, first_id=table.num_embeddings, deviation=1.0)
        text_encoder.set_input_embeddings(new)
    if adapter.train_text_encoder:
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


def _give_fake_tensors(model: torch.nn.Module, frozen: torch.dtype, device: torch.device) -> None:
    """Puts tensors without data on a device in the place of a model's meta tensors."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = parameter.dtype if parameter.requires_grad else frozen
            tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
            learns = parameter.requires_grad
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=learns))
        for name, buffer in list(module.named_buffers(recurse=False)):
            dtype = frozen if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=dtype, device=device))


def _recompute_activations(family: Family, learning: _Learning) -> None:
    # States of random generators are data, which fake tensors do not have.
    def recompute(module: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)

    family.denoiser.enable_gradient_checkpointing(recompute)
    for name in learning.keys() - {family.denoiser_name}:
        text_encoder = family.pipeline.components[name]
        text_encoder.activation_checkpointing_enable(
            {"use_reentrant": False, "preserve_rng_state": False}
        )
        # transformers recomputes in training mode only.
        text_encoder.train()


def _peak_of_class_images(family: Family, config: TrainingConfig) -> int:
    """A step of denoising and the decoding of one class picture, with all parts on the device."""
    rows = 2 if config.prior.class_guidance_scale > 1 else 1
    latents = _encode_pictures(family, config.data, 1)
    noisy_latents = torch.empty(rows, *latents.shape[1:], device=latents.device)
    with LiveBytes() as stage, torch.no_grad():
        for name in (family.denoiser_name, "vae", *family.text_encoder_names):
            stage.hold(family.pipeline.components[name])
        text = family.encode_text([""] * rows)
        dtype = next(iter(text.values())).dtype
        formats_differ = family.denoiser.dtype != dtype
        with torch.autocast(noisy_latents.device.type, dtype, enabled=formats_differ):
            _predict(family, noisy_latents.to(dtype), text)
        del text
        pixels_of(family.pipeline.vae, noisy_latents[:1])
    return int(stage.peak)


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
    family: Family,
    config: TrainingConfig,
    precision: Precision,
    learning: _Learning,
    state_bytes: float,
) -> int:
    """Forward and backward passes while these parameters learn, beside the optimizer's state."""
    encoders = [family.pipeline.components[n] for n in family.text_encoder_names if n in learning]
    parameters = [p for group in learning.values() for p in group]
    rows, num_captions = _forward_pass(config)
    latents = _encode_pictures(family, config.data, 1)
    kept = None
    if not encoders:
        with torch.no_grad():
            kept = _encode_captions(family, precision, 1, rows)
    _freeze_all_but(family, parameters)
    with LiveBytes() as steps:
        for module in (family.denoiser, *encoders):
            steps.hold(module)
        if not config.data.cache_latents:
            steps.hold(family.pipeline.vae)
        steps.add(round(state_bytes * sum(p.numel() for p in parameters)))
        # From the second pass on, the gradients of the first are there from the start.
        for _ in range(min(2, config.run.gradient_accumulation_steps)):
            if not config.data.cache_latents:
                _encode_pictures(family, config.data, rows)
            noisy_latents = torch.empty(rows, *latents.shape[1:], device=latents.device)
            text = kept or _encode_captions(family, precision, num_captions, rows)
            with _autocast(family, precision):
                prediction = _predict(family, noisy_latents, text)
            (prediction.float() - noisy_latents).square().mean().backward()
            del text, prediction
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
    timesteps = torch.zeros(count, dtype=torch.int64, device=device)
    return family.predict(latents, timesteps, text, geometry)
