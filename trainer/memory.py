"""Peak memory of a training, counted on tensors that have shapes but no data.

The base model's parts are built from their configurations alone, so that nothing large is
downloaded or allocated; then one real forward and backward pass runs over them, and every
storage is counted from its making to its end.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from trainer import adapters, optim
from trainer.base_model import BaseModel, Precision
from trainer.config import AdapterConfig, DataConfig, OptimConfig, RunConfig
from trainer.families.base import Conditioning, Family, LatentDistribution

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
    """Counts the bytes of all storages made or held inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, module: torch.nn.Module) -> None:
        """Counts the parameters and buffers of a module for as long as they live."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._count(tensor)

    def add(self, size: int) -> None:
        """Counts bytes that stay."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts what it makes."""
        outcome = func(*args, **(kwargs or {}))
        for tensor in tree_iter(outcome):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return outcome

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._counted:
            return
        self._counted.add(storage)
        size = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
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
    """The footprint of training this base model on one device.

    Left out are what the device's driver takes for itself and memory lost to fragmentation.

    Args:
        base: as found; its weights are not touched.
        precision: number formats of its parts.
        device: where the training would run; decides which operations autocast widens.
        adapter: what learns.
        data: size of the pictures, and whether latents are cached.
        optimizer: whose state is counted.
        run: batch size, accumulation and gradient checkpointing.

    Raises:
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    assert data.resolution_height is not None
    assert data.resolution_width is not None
    mode = FakeTensorMode()
    family = _family_without_data(base, adapter, run, mode=mode)
    parts = family.pipeline.components
    trained = [p for p in family.denoiser.parameters() if p.requires_grad]
    picture = torch.Size((3, data.resolution_height, data.resolution_width))
    batch = run.batch_size
    with mode:
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                dtype = {family.denoiser_name: precision.denoiser, "vae": precision.vae}
                _materialise(part, dtype.get(name, precision.frozen), device)
        with _counting() as text_stage:
            text = _encode_text(family, text_stage, batch)
        with _counting() as picture_stage:
            picture_stage.hold(parts["vae"])
            pictures = 1 if data.cache_latents else batch
            latents = _encode_pictures(family, (pictures, *picture), device)
        with _counting() as steps:
            steps.hold(family.denoiser)
            steps.add(_optimizer_bytes(optimizer) * sum(p.numel() for p in trained))
            if not data.cache_latents:
                steps.hold(parts["vae"])
            shape = torch.Size((batch, *latents.mean.shape[1:]))
            for _ in range(min(2, run.gradient_accumulation_steps)):
                if not data.cache_latents:
                    _encode_pictures(family, (batch, *picture), device)
                _forward_and_backward(family, shape, text, device, precision.frozen)
    peak = max(stage.peak for stage in (text_stage, picture_stage, steps))
    return Footprint(peak_bytes=peak, trained_parameters=sum(p.numel() for p in trained))


@contextmanager
def _counting() -> Iterator[LiveBytes]:
    with LiveBytes() as counter:
        yield counter


def _family_without_data(
    base: BaseModel, adapter: AdapterConfig, run: RunConfig, *, mode: FakeTensorMode
) -> Family:
    """The family with its real tokenizers, and models whose tensors have only shapes."""
    settings = base.settings
    single = settings.model_url.endswith(".safetensors")
    source = settings.model_url
    revision = settings.revision
    if single:
        source, revision = settings.single_file_config or base.family.single_file.config, None
    index = base.family.pipeline_class.load_config(source, revision=revision)
    names = (base.family.denoiser_name, *base.family.text_encoder_names, "vae")
    with torch.device("meta"):
        parts = {
            name: _model_of(index[name], source, name, revision).requires_grad_(False)
            for name in names
        }
    denoiser = parts[base.family.denoiser_name]
    if adapter.use_lora:
        layers, _ = adapters.target_layers(
            denoiser, adapter.target_unet_modules, field="target_unet_modules", must_match=False
        )
        adapters.add_adapter(denoiser, adapter, layers, seed=0)
    else:
        denoiser.requires_grad_(True)
    if run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(_recompute)
    pipeline = base.family.pipeline_class.from_pretrained(
        source, revision=revision, **parts, **dict.fromkeys(base.family.unused_components)
    )
    return base.family(pipeline)
