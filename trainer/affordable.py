"""What a training leaves to its device's memory, decided from forecasts before anything is read.

Whether activations are recomputed, see `recomputing`, and whether steps of several sizes may be
recorded. A training that goes on does as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainer import recomputing
from trainer.base_model import BaseModel
from trainer.capacity import device_memory, fits
from trainer.config import Note, TrainingConfig
from trainer.errors import InputError
from trainer.foreseen import Foreseen
from trainer.machine import precision_of
from trainer.memory import STEPS, Footprint
from trainer.pace import unrecordable
from trainer.spread import Spread


def affordable(
    config: TrainingConfig, base: BaseModel, spread: Spread, began_with: Mapping[str, Any]
) -> TrainingConfig:
    """The configuration with what depends on the device's memory decided.

    Args:
        config: settled otherwise.
        base: as found.
        spread: where it trains; one process decides for all.
        began_with: the settings of a checkpoint that it may go on from, or nothing.
    """
    if config.run.gradient_checkpointing is None and recomputing.LEAVES[0] in began_with:
        for leaf in recomputing.LEAVES:
            config = config.with_leaf(leaf, began_with.get(leaf))
    device = spread.accelerator.device
    if device.type != "cuda":
        return recomputing.kept(config)
    foreseen = Foreseen(base, device)
    parts = 1 if spread.sharding is None else spread.accelerator.num_processes

    def decide(config: TrainingConfig) -> TrainingConfig:
        try:
            return within(
                config,
                lambda tried: foreseen.footprint(tried, precision_of(tried)),
                capacity=device_memory(device),
                parts=parts,
                num_processes=spread.accelerator.num_processes,
            )
        except (InputError, OSError) as error:
            reason = str(error).removeprefix("error[input]: ")
            message = f"whether memory is enough cannot be foreseen: {reason}"
            note = Note(kind="warning", field=recomputing.LEAVES[0], message=message)
            return recomputing.kept(config).with_notes(note)

    ((_, decided),) = spread.processes.shared([config], decide)
    return decided


def within(
    config: TrainingConfig,
    footprint_of: Callable[[TrainingConfig], Footprint],
    *,
    capacity: int,
    parts: int,
    num_processes: int,
) -> TrainingConfig:
    """The configuration of a training on GPUs with so much memory.

    Args:
        config: completed.
        footprint_of: foresees a training whose model is whole on each device.
        capacity: memory of each device, in bytes.
        parts: over how many devices each weight is spread.
        num_processes: that train together.

    Raises:
        InputError: this training cannot be foreseen.
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """

    def peak_of(tried: TrainingConfig) -> int:
        footprint = footprint_of(tried)
        spread = footprint.weights_bytes
        spread += 0 if tried.adapter.use_lora else footprint.state_bytes
        return footprint.peak_bytes - spread * (parts - 1) // parts

    decided = recomputing.chosen(config, capacity, peak_of)
    if decided.run.gradient_checkpointing and config.run.gradient_checkpointing is None:
        gib = peak_of(recomputing.kept(config)) / 2**30
        message = f"true, since steps that keep their activations would take {gib:.1f} GiB"
        note = Note(kind="yielded", field=recomputing.LEAVES[0], message=message)
        decided = decided.with_notes(note)
    may_record = config.run.cuda_graph is None and unrecordable(config, num_processes) is None
    several_sizes = config.data.enable_bucket or config.data.priority is not None
    if not may_record or not several_sizes:
        return decided
    # Recordings keep the memory that they share, and before a further size is recorded, steps of
    # it are computed beside them.
    if fits(peak_of(decided) + _activations(footprint_of(decided)), capacity):
        return decided
    message = "false, since recordings of several sizes would not fit the device"
    return decided.with_leaf(
        "cuda_graph", False, Note(kind="yielded", field="cuda_graph", message=message)
    )


def _activations(footprint: Footprint) -> int:
    return max(0, footprint.stages[STEPS] - footprint.weights_bytes - footprint.state_bytes)
