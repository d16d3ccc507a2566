"""What this machine and the checkpoint decide of a training: device, processes, precision, size."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from trainer.base_model import BaseModel, Precision
from trainer.config import ModelConfig, Note, RunConfig, TrainingConfig
from trainer.data.buckets import largest_side
from trainer.errors import InputError
from trainer.fitting import fitted
from trainer.rules.idle import ALL_IN_32_BITS
from trainer.sharding import kept_from_accelerate

_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)

NO_GPU = "there is no GPU here to take memory from"
SAME_ANYWAY = "a processor computes the same bits each time anyway"
NO_GRAPH = "there is no GPU here that could be given a graph"
NO_TF32 = "a processor has no TF32"
# Options that mean something on a GPU alone: what is as good as left out, and why elsewhere.
_ON_A_GPU: Mapping[str, tuple[tuple[bool | int | None, ...], str]] = {
    "offload_models": ((False,), NO_GPU),
    "offload_blocks": ((0,), NO_GPU),
    "deterministic": ((False,), SAME_ANYWAY),
    "cuda_graph": ((None, False), NO_GRAPH),
    "tf32": ((None, False), NO_TF32),
}

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
    # Accelerate keeps precision and group per process; a second training here may have others.
    AcceleratorState._reset_state(reset_partial_state=True)
    with kept_from_accelerate():
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    if accelerator.distributed_type not in _LAUNCHES:
        raise InputError.of(
            "accelerate launch",
            f"`{accelerator.distributed_type.value}` is not available yet",
            "launch with plain data parallelism, as configs/accelerate/ does",
        )
    return accelerator


def completed(
    config: TrainingConfig, base: BaseModel, denoiser: torch.nn.Module | None = None
) -> TrainingConfig:
    """The configuration with what only the checkpoint and the machine could tell.

    Args:
        denoiser: its skeleton, if there is one already.
    """
    config = fitted(config, base, denoiser)
    config = config.with_leaf("mixed_precision", mixed_precision_of(config.run))
    if config.run.mixed_precision == "no":
        note = Note(kind="ignored", field="upscale_vae_32bit", message=ALL_IN_32_BITS)
        config = config.with_notes(note)
    for field in ("resolution_width", "resolution_height"):
        if config.leaf(field) is None:
            config = config.with_leaf(field, largest_side(base.native_size, config.data.priority))
    config = _for_a_processor(config)
    return config.model_copy(update={"model": base.settings}).with_notes(*base.notes)


def _for_a_processor(config: TrainingConfig) -> TrainingConfig:
    """Without what is for GPUs, where there is none."""
    if torch.cuda.is_available():
        return config
    for field, (off, reason) in _ON_A_GPU.items():
        if config.leaf(field) not in off:
            note = Note(kind="ignored", field=field, message=reason)
            config = config.with_leaf(field, off[0]).with_notes(note)
    return config


def refuse_updates_in_backward(config: TrainingConfig, num_processes: int) -> None:
    """Finds out early whether weights can be updated in the middle of the backward pass.

    Args:
        config: completed.
        num_processes: of this training.

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
    if num_processes > 1:
        raise InputError.of(
            "fused_backward",
            f"true with {num_processes} processes, which average gradients before an update",
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
