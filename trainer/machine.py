"""What this machine and the checkpoint decide of a training: device, processes, precision, size."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from trainer.base_model import BaseModel, Precision
from trainer.config import ModelConfig, Note, RunConfig, TrainingConfig
from trainer.data.buckets import largest_side
from trainer.errors import InputError
from trainer.fitting import fitted

_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# How long processes wait for the one that prepares the pictures.
_PREPARATION_LIMIT = timedelta(minutes=30)

# Options that mean something on a GPU alone, switched off.
_OFFLOADING: Mapping[str, bool | int] = {"offload_models": False, "offload_blocks": 0}
NO_GPU = "there is no GPU here to take memory from"

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of weights that are all trained.
_WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_name() -> str:
    """The device that a training here would use: the name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} processor, {os.cpu_count()} cores"


def mixed_precision_of(run: RunConfig) -> str:
    """What `mixed_precision: auto` means on this machine; anything else means itself.

    Raises:
        InputError: `fp16` on a processor.
    """
    on_gpu = torch.cuda.is_available()
    if run.mixed_precision == "fp16" and not on_gpu:
        raise InputError.of(
            "mixed_precision", "`fp16` needs a GPU", "give `no` or `bf16` to train on a processor"
        )
    if run.mixed_precision != "auto":
        return run.mixed_precision
    if not on_gpu:
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def accelerator_of(run: RunConfig) -> Accelerator:
    """The processes of this training, and its precision.

    Raises:
        InputError: they were launched in a way that is not there yet.
    """
    precision = mixed_precision_of(run)
    # Accelerate keeps the precision per process; a second training here may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PREPARATION_LIMIT)],
    )
    if accelerator.distributed_type not in _LAUNCHES:
        raise InputError.of(
            "accelerate launch",
            f"`{accelerator.distributed_type.value}` is not available yet",
            "launch with plain data parallelism, as configs/accelerate/ does",
        )
    return accelerator


def completed(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """The configuration with what only the checkpoint and the machine could tell."""
    config = fitted(config, base)
    config = config.with_leaf("mixed_precision", mixed_precision_of(config.run))
    for field in ("resolution_width", "resolution_height"):
        if config.leaf(field) is None:
            config = config.with_leaf(field, largest_side(base.native_size, config.data.priority))
    config = _without_offloading(config)
    return config.model_copy(update={"model": base.settings}).with_notes(*base.notes)


def _without_offloading(config: TrainingConfig) -> TrainingConfig:
    """Nothing is offloaded where all of it is in the computer's memory already."""
    if torch.cuda.is_available():
        return config
    for field, off in _OFFLOADING.items():
        if config.leaf(field) != off:
            note = Note(kind="ignored", field=field, message=NO_GPU)
            config = config.with_leaf(field, off).with_notes(note)
    return config


def refuse_updates_in_backward(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Finds out early whether weights can be updated in the middle of the backward pass.

    Args:
        config: completed.
        accelerator: of this training.

    Raises:
        InputError: gradients must be kept for a scaler or for other processes.
    """
    if config.adapter.use_lora or not config.optim.fused_backward:
        return
    if config.run.mixed_precision == "fp16":
        raise InputError.of(
            "fused_backward",
            "true with `mixed_precision` fp16, whose scaler must see all gradients first",
            "give `mixed_precision: bf16` or `no`, or `fused_backward: false`",
        )
    if accelerator.num_processes > 1:
        raise InputError.of(
            "fused_backward",
            f"true with {accelerator.num_processes} processes, which average gradients before an "
            "update",
            "launch one process, or give `fused_backward: false`",
        )


def precision_of(config: TrainingConfig) -> Precision:
    """The number formats of a completed configuration: adapters always learn in 32 bits."""
    frozen = _DTYPES[config.run.mixed_precision]
    whole = _WEIGHTS[config.adapter.weights_dtype]
    whole_text_encoders = config.adapter.train_text_encoder and not config.adapter.use_lora
    return Precision(
        frozen=frozen,
        denoiser=frozen if config.adapter.use_lora else whole,
        vae=torch.float32 if config.model.upscale_vae_32bit else frozen,
        text_encoders=whole if whole_text_encoders else frozen,
    )


def inference_precision(settings: ModelConfig) -> Precision:
    """The number formats in which pictures are made here, where nothing learns."""
    dtype = _DTYPES[mixed_precision_of(RunConfig())]
    vae = torch.float32 if settings.upscale_vae_32bit else dtype
    return Precision(frozen=dtype, denoiser=dtype, vae=vae, text_encoders=dtype)
