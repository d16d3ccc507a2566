"""Peak memory of a training, counted on tensors that have shapes but no data.

The base model's parts are built from their configurations alone, so that nothing large is
downloaded or allocated; then one real forward and backward pass runs over them, and every
storage is counted from its making to its end.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from trainer import adapters, optim
from trainer.base_model import BaseModel, Precision
from trainer.config import AdapterConfig, DataConfig, OptimConfig, RunConfig
from trainer.families.base import Conditioning, Family

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
    base: BaseModel,
    precision: Precision,
    device: torch.device,
    *,
    adapter: AdapterConfig,
    data: DataConfig,
    optimizer: OptimConfig,
    run: RunConfig,
) -> Footprint:
    """The footprint of training a base model on one device.

    Left out are what the device's driver takes for itself and memory lost to fragmentation.

    Args:
        base: as found; its weights are not touched.
        precision: number formats of its parts.
        device: where the training would run; it decides what autocast widens.
        adapter: what learns.
        data: size of the pictures, and whether latents are cached; both sizes are set.
        optimizer: whose state is counted.
        run: batch size, accumulation and gradient checkpointing.

    Raises:
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    state_bytes = optimizer_bytes_per_parameter(optimizer, device)
    mode = FakeTensorMode()
    with mode:
        family = _family_without_data(base, adapter, precision, device)
        if run.gradient_checkpointing:
            family.pipeline.components[family.denoiser_name].enable_gradient_checkpointing(
                _recompute
            )
        with LiveBytes() as text_stage:
            for name in family.text_encoder_names:
                text_stage.hold(family.pipeline.components[name])
            with torch.no_grad():
                text = family.encode_text([""] * run.batch_size)
        with LiveBytes() as picture_stage:
            picture_stage.hold(family.pipeline.vae)
            latents = _encode_pictures(family, data, 1, device)
        trained = sum(p.numel() for p in family.denoiser.parameters() if p.requires_grad)
        with LiveBytes() as steps:
            steps.hold(family.denoiser)
            steps.add(round(state_bytes * trained))
            if not data.cache_latents:
                steps.hold(family.pipeline.vae)
            # From the second pass on, the gradients of the first are there from the start.
            for _ in range(min(2, run.gradient_accumulation_steps)):
                if not data.cache_latents:
                    _encode_pictures(family, data, run.batch_size, device)
                noisy_latents = torch.empty(run.batch_size, *latents.shape[1:], device=device)
                _forward_and_backward(family, noisy_latents, text, precision)
    peak = max(stage.peak for stage in (text_stage, picture_stage, steps))
    return Footprint(peak_bytes=peak, trained_parameters=trained)


def optimizer_bytes_per_parameter(optimizer: OptimConfig, device: torch.device) -> float:
    """Bytes of state that an optimizer keeps for each number it trains, seen in a real step."""
    sample = torch.nn.Parameter(torch.ones(512, 512, device=device))
    group = optim.ParameterGroup("sample", [sample], learning_rate=1.0, weight_decay=0.0)
    built = optim.build_optimizer([group], optimizer)
    sample.grad = torch.ones_like(sample)
    built.step()
    tensors = [value for value in built.state[sample].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / sample.numel()


def _family_without_data(
    base: BaseModel, adapter: AdapterConfig, precision: Precision, device: torch.device
) -> Family:
    """The family with its real tokenizers around models that have only shapes."""
    source, revision = base.configurations.url, base.configurations.revision
    index = base.family.pipeline_class.load_config(source, revision=revision)
    dtypes = dict.fromkeys((*base.family.text_encoder_names, "vae"), precision.frozen)
    dtypes |= {"vae": precision.vae, base.family.denoiser_name: precision.denoiser}
    parts: dict[str, torch.nn.Module] = {}
    for name, dtype in dtypes.items():
        with torch.device("meta"):
            part = _model(index[name], source, name, revision).requires_grad_(False).eval()
            if name == base.family.denoiser_name:
                adapters.make_trainable(part, adapter, seed=0, must_match=False)
        _give_fake_tensors(part, dtype, device)
        parts[name] = part
    unused = dict.fromkeys(base.family.unused_components)
    diffusers_logging.disable_progress_bar()
    pipeline = base.family.pipeline_class.from_pretrained(
        source, revision=revision, **parts, **unused
    )
    return base.family(pipeline)


def _model(
    library_and_class: tuple[str, str], source: str, name: str, revision: str | None
) -> torch.nn.Module:
    """A model made from its configuration, as `model_index.json` names its class."""
    library, class_name = library_and_class
    model_class = getattr(importlib.import_module(library), class_name)
    if library == "diffusers":
        config = model_class.load_config(source, subfolder=name, revision=revision)
        model: torch.nn.Module = model_class.from_config(config)
        return model
    config = model_class.config_class.from_pretrained(source, subfolder=name, revision=revision)
    encoder: torch.nn.Module = model_class(config)
    return encoder


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


def _recompute(module: torch.nn.Module, *inputs: Any) -> Any:
    # States of random generators are data, which fake tensors do not have.
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def _encode_pictures(
    family: Family, data: DataConfig, count: int, device: torch.device
) -> torch.Tensor:
    assert data.resolution_height is not None
    assert data.resolution_width is not None
    size = data.resolution_height, data.resolution_width
    with torch.no_grad():
        return family.encode_image(torch.empty(count, 3, *size, device=device)).mean


def _forward_and_backward(
    family: Family, noisy_latents: torch.Tensor, text: Conditioning, precision: Precision
) -> None:
    count, device = len(noisy_latents), noisy_latents.device
    sizes = torch.zeros(count, 2, dtype=torch.int64, device=device)
    geometry = dict.fromkeys(("original_size", "crop_top_left", "target_size"), sizes)
    timesteps = torch.zeros(count, dtype=torch.int64, device=device)
    autocast = torch.autocast(
        device.type, precision.frozen, enabled=precision.frozen != torch.float32
    )
    with autocast:
        prediction = family.predict(noisy_latents, timesteps, text, geometry)
    (prediction.float() - noisy_latents).square().mean().backward()
