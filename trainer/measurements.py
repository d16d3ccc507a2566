"""How long a step of a training took on this machine: remembered for `estimate`.

One JSON object a line in the user's cache folder. Knows no torch.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.config import TrainingConfig


@dataclass(frozen=True)
class MeasurementKey:
    """What decides the time of a step: only a measurement of all the same tells it.

    Args:
        family: name of the base model's family.
        model_url: the base model, a local one by its whole path.
        method: form of the adapter, or `all weights`.
        targets: layers that get an adapter, by the end of their name.
        rank: of the adapter.
        width: in pixels.
        height: in pixels.
        examples_per_step: over all processes.
        batch_size: of one forward pass.
        mixed_precision: `no`, `fp16` or `bf16`.
        gradient_checkpointing: whether activations are recomputed.
        cache_latents: whether pictures are encoded beforehand.
        upscale_vae_32bit: whether they are encoded in 32 bits.
        num_workers: processes that read pictures ahead.
        optimizer: name of the update rule.
        device: name of the accelerator, or of the processor.
        num_processes: processes that train together.
    """

    family: str
    model_url: str
    method: str
    targets: str
    rank: int
    width: int | None
    height: int | None
    examples_per_step: int
    batch_size: int
    mixed_precision: str
    gradient_checkpointing: bool
    cache_latents: bool
    upscale_vae_32bit: bool
    num_workers: int
    optimizer: str
    device: str
    num_processes: int


def measurement_key(
    config: TrainingConfig, *, family: str, device: str, num_processes: int
) -> MeasurementKey:
    """The key of a training.

    Args:
        config: with resolution and `mixed_precision` as they are used.
        family: name of the base model's family.
        device: name of the device that trains.
        num_processes: processes that train together.
    """
    adapter, run, local = config.adapter, config.run, Path(config.model.model_url)
    form = "dora" if adapter.use_dora else adapter.lora_type
    return MeasurementKey(
        family=family,
        model_url=str(local.resolve()) if local.exists() else config.model.model_url,
        method=form if adapter.use_lora else "all weights",
        targets=",".join(adapter.target_unet_modules) if adapter.use_lora else "",
        rank=adapter.rank if adapter.use_lora else 0,
        width=config.data.resolution_width,
        height=config.data.resolution_height,
        examples_per_step=run.batch_size * run.gradient_accumulation_steps * num_processes,
        batch_size=run.batch_size,
        mixed_precision=run.mixed_precision,
        gradient_checkpointing=run.gradient_checkpointing,
        cache_latents=config.data.cache_latents,
        upscale_vae_32bit=config.model.upscale_vae_32bit,
        num_workers=run.num_workers,
        optimizer=config.optim.optimizer,
        device=device,
        num_processes=num_processes,
    )


def measurements_file() -> Path:
    """Where measurements are kept: below `XDG_CACHE_HOME`, or `.cache` of the user's home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(cache)) / "tok-trainer" / "measurements.jsonl"


def record_measurement(key: MeasurementKey, seconds_per_step: float) -> None:
    """Remembers the time of a step; a machine without a place for it forgets it.

    Args:
        key: what was measured.
        seconds_per_step: of a typical step, best the median without the first few.
    """
    line = json.dumps({"key": asdict(key), "seconds_per_step": seconds_per_step}) + "\n"
    # A training does not fail for want of a cache folder.
    with suppress(OSError):
        measurements_file().parent.mkdir(parents=True, exist_ok=True)
        with open(measurements_file(), "a", encoding="utf-8") as file:
            file.write(line)


def measured_seconds_per_step(key: MeasurementKey) -> float | None:
    """The newest measurement with this very key, or nothing."""
    try:
        lines = measurements_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        # A line cut short by a crash tells nothing.
        with suppress(ValueError, KeyError, TypeError):
            measurement = json.loads(line)
            if measurement["key"] == asdict(key):
                return float(measurement["seconds_per_step"])
    return None
