"""What this machine and the checkpoint decide of a training: device, precision, native size."""

from __future__ import annotations

import os
import platform

import torch

from trainer.base_model import BaseModel, Precision
from trainer.config import RunConfig, TrainingConfig
from trainer.errors import InputError

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def completed(config: TrainingConfig, base: BaseModel) -> TrainingConfig:
    """The configuration with what only the checkpoint and the machine could tell."""
    config = config.with_leaf("mixed_precision", mixed_precision_of(config.run))
    for field in ("resolution_width", "resolution_height"):
        if config.leaf(field) is None:
            config = config.with_leaf(field, base.native_size)
    return config.model_copy(update={"model": base.settings}).with_notes(*base.notes)


def precision_of(config: TrainingConfig) -> Precision:
    """The number formats of a completed configuration: what learns stays in 32 bits."""
    frozen = _DTYPES[config.run.mixed_precision]
    whole_text_encoders = config.adapter.train_text_encoder and not config.adapter.use_lora
    return Precision(
        frozen=frozen,
        denoiser=frozen if config.adapter.use_lora else torch.float32,
        vae=torch.float32 if config.model.upscale_vae_32bit else frozen,
        text_encoders=torch.float32 if whole_text_encoders else frozen,
    )
