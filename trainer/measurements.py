"""How long a step of a training took on this machine: remembered for `estimate`.

One JSON object a line in the user's cache folder. Knows no torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.cache import cache_folder
from trainer.config import AdapterConfig, TokenConfig, TrainingConfig


@dataclass(frozen=True)
class MeasurementKey:
    """What decides the time of a step: only a measurement of all the same tells it.

    Args:
        family: name of the base model's family.
        model_url: the base model, a local one by its whole path.
        method: form of the adapter, or `all weights`.
        targets: layers that get an adapter, by the end of their name.
        rank: of the adapter.
        adapter_layers: who computes it.
        text_method: what learns beside the denoiser: `new tokens`, `all weights` of the text
            encoders, the form of their adapter, or nothing.
        text_targets: layers of the text encoders that get an adapter.
        text_rank: of their adapter, or the number of new tokens.
        text_share: of the steps in which it learns.
        denoiser_waits: whether the denoiser learns in the other steps alone.
        width: in pixels.
        height: in pixels.
        max_sequence_length: tokens of a caption that a language model reads; None: as many as it
            usually does.
        examples_per_step: over all processes.
        batch_size: pictures of one forward pass.
        forward_examples: the same with the class pictures that may stand beside them.
        mixed_precision: `no`, `fp16` or `bf16`.
        weights_dtype: of weights that all learn; empty with an adapter.
        quantization: how frozen weights are kept.
        offload_blocks: blocks whose frozen weights come from the computer's memory.
        gradient_checkpointing: whether activations are recomputed.
        checkpointing_share: in which share of the blocks.
        deterministic: whether only operations are used that give the same bits each time.
        cuda_graph: whether steps are recorded; None here and below: as the run decides.
        compile_blocks: whether blocks are compiled.
        channels_last: whether convolutions' weights are kept so.
        tf32: whether 32-bit floats are multiplied with fewer bits.
        attention: which kernel computes it.
        cache_latents: whether pictures are encoded beforehand.
        upscale_vae_32bit: whether they are encoded in 32 bits.
        num_workers: processes that read pictures ahead.
        optimizer: name of the update rule.
        fused_backward: whether weights are updated in the middle of the backward pass.
        device: name of the accelerator, or of the processor.
        num_processes: processes that train together.
    """

    family: str
    model_url: str
    method: str
    targets: str
    rank: int
    adapter_layers: str
    text_method: str
    text_targets: str
    text_rank: int
    text_share: float
    denoiser_waits: bool
    width: int | None
    height: int | None
    priority: str | None
    max_sequence_length: int | None
    examples_per_step: int
    batch_size: int
    forward_examples: int
    mixed_precision: str
    weights_dtype: str
    quantization: str
    offload_blocks: int
    gradient_checkpointing: bool
    checkpointing_share: float
    deterministic: bool
    cuda_graph: bool | None
    compile_blocks: bool | None
    channels_last: bool | None
    tf32: bool | None
    attention: str
    cache_latents: bool
    upscale_vae_32bit: bool
    num_workers: int
    optimizer: str
    fused_backward: bool
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
    has_prior = any(concept.with_prior_preservation for concept in config.subjects())
    text_method, text_targets, text_rank, text_share = _text(adapter, config.token)
    return MeasurementKey(
        family=family,
        model_url=str(local.resolve()) if local.exists() else config.model.model_url,
        method=_form(adapter),
        targets=",".join(adapter.target_unet_modules) if adapter.use_lora else "",
        rank=adapter.rank if adapter.use_lora else 0,
        adapter_layers=adapter.adapter_layers if adapter.use_lora else "",
        text_method=text_method,
        text_targets=text_targets,
        text_rank=text_rank,
        text_share=text_share,
        denoiser_waits=config.token.train_text_encoder_ti
        and config.token.disable_unet_during_ti_training,
        width=config.data.resolution_width,
        height=config.data.resolution_height,
        priority=config.data.priority,
        max_sequence_length=config.model.max_sequence_length,
        examples_per_step=run.batch_size * run.gradient_accumulation_steps * num_processes,
        batch_size=run.batch_size,
        forward_examples=run.batch_size * (2 if has_prior else 1),
        mixed_precision=run.mixed_precision,
        weights_dtype="" if adapter.use_lora else adapter.weights_dtype,
        quantization=config.model.quantization,
        offload_blocks=run.offload_blocks,
        gradient_checkpointing=bool(run.gradient_checkpointing),
        checkpointing_share=run.checkpointing_share if run.gradient_checkpointing else 1.0,
        deterministic=run.deterministic,
        cuda_graph=run.cuda_graph,
        compile_blocks=run.compile_blocks,
        channels_last=run.channels_last,
        tf32=run.tf32,
        attention=run.attention,
        cache_latents=config.data.cache_latents,
        upscale_vae_32bit=config.model.upscale_vae_32bit,
        num_workers=run.num_workers,
        optimizer=config.optim.optimizer,
        fused_backward=not adapter.use_lora and config.optim.fused_backward,
        device=device,
        num_processes=num_processes,
    )


def measurements_file() -> Path:
    """Where measurements are kept: in the user's cache folder."""
    return cache_folder() / "measurements.jsonl"


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


def _form(adapter: AdapterConfig) -> str:
    if not adapter.use_lora:
        return "all weights"
    return "dora" if adapter.use_dora else adapter.lora_type


def _text(adapter: AdapterConfig, token: TokenConfig) -> tuple[str, str, int, float]:
    """What learns beside the denoiser: method, targets, rank, share of the steps."""
    if token.train_text_encoder_ti:
        count = len(token.token_abstraction) * token.num_new_tokens_per_abstraction
        return "new tokens", "", count, token.train_text_encoder_ti_frac
    if not adapter.train_text_encoder:
        return "", "", 0, 0.0
    if not adapter.use_lora:
        return _form(adapter), "", 0, adapter.train_text_encoder_frac
    targets, rank = ",".join(adapter.target_text_encoder_modules), adapter.for_text_encoders().rank
    return _form(adapter), targets, rank, adapter.train_text_encoder_frac
