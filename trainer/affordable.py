"""What a training leaves to its device's memory, decided from a forecast before anything is read.

Whether activations are recomputed, see `recomputing`. A training that goes on does as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer import recomputing
from trainer.base_model import BaseModel
from trainer.capacity import Room, device_memory
from trainer.config import Note, TrainingConfig
from trainer.errors import TrainerError
from trainer.foreseen import Foreseen
from trainer.machine import precision_of
from trainer.memory import STEPS, Footprint
from trainer.spread import Spread

# What a training takes whose model is whole on each device.
FootprintOf = Callable[[TrainingConfig], Footprint]


def affordable(
    config: TrainingConfig, base: BaseModel, spread: Spread, began_with: Mapping[str, Any]
) -> tuple[TrainingConfig, Room | None]:
    """The configuration with what depends on the device's memory decided, and what is known of it.

    Args:
        config: settled otherwise.
        base: as found.
        spread: where it trains; one process decides for all.
        began_with: the settings of a checkpoint that it may go on from, or nothing.
    """
    config = recomputing.as_begun(config, began_with)
    device = spread.accelerator.device
    if device.type != "cuda":
        return recomputing.kept(config), None
    foreseen = Foreseen(base, device)
    parts = 1 if spread.sharding is None else spread.accelerator.num_processes

    def decide(config: TrainingConfig) -> tuple[TrainingConfig, Room | None]:
        try:
            return within(
                config,
                lambda tried: foreseen.footprint(tried, precision_of(tried)),
                capacity=device_memory(device),
                parts=parts,
            )
        # Whatever keeps it from being foreseen, the training can be tried.
        except (TrainerError, OSError, RuntimeError) as error:
            reason = str(error).removeprefix("error[input]: ").partition("\n")[0]
            message = f"whether memory is enough cannot be foreseen: {reason}"
            note = Note(kind="warning", field=recomputing.LEAVES[0], message=message)
            return recomputing.kept(config).with_notes(note), None

    ((_, decided),) = spread.processes.shared([config], decide)
    return decided


def within(
    config: TrainingConfig, footprint_of: FootprintOf, *, capacity: int, parts: int = 1
) -> tuple[TrainingConfig, Room]:
    """The configuration of a training on GPUs with so much memory, and what its steps take of it.

    Args:
        config: completed.
        footprint_of: foresees what is tried.
        capacity: memory of each device, in bytes.
        parts: over how many devices the denoiser is spread.

    Raises:
        InputError: this training cannot be foreseen.
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """

    def bytes_of(tried: TrainingConfig) -> int:
        footprint = footprint_of(tried)
        return footprint.stages[STEPS] - _elsewhere(tried, footprint, parts)

    decided = recomputing.chosen(config, capacity, bytes_of)
    if decided.run.gradient_checkpointing and config.run.gradient_checkpointing is None:
        gib = bytes_of(recomputing.kept(config)) / 2**30
        message = f"true, since steps that keep their activations would take {gib:.1f} GiB"
        note = Note(kind="yielded", field=recomputing.LEAVES[0], message=message)
        decided = decided.with_notes(note)
    footprint = footprint_of(decided)
    activations = footprint.stages[STEPS] - footprint.weights_bytes - footprint.state_bytes
    return decided, Room(capacity, bytes_of(decided), max(0, activations))


def _elsewhere(config: TrainingConfig, footprint: Footprint, parts: int) -> int:
    """Bytes that other devices hold of a denoiser in parts; what may stand beside it is whole."""
    stays_whole = (
        config.adapter.train_text_encoder
        or config.token.train_text_encoder_ti
        or not config.data.cache_latents
    )
    if stays_whole:
        return 0
    if config.adapter.use_lora:
        # Adapters learn in 32 bits, on every device.
        spread = footprint.weights_bytes - 4 * footprint.trained_parameters
    else:
        spread = footprint.weights_bytes + footprint.state_bytes
    return max(0, spread) * (parts - 1) // parts
