"""Whether activations are recomputed where nobody said so: in as few blocks as memory asks for.

Knows forecasts of memory and the options that they are about, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trainer.capacity import fits
from trainer.config import Note, TrainingConfig
from trainer.machine import precision_of
from trainer.memory import STEPS, Forecast

# What is chosen where nobody chose.
LEAVES = ("gradient_checkpointing", "checkpointing_share")

# Of the blocks, tried in this order: what is not recomputed takes no time.
_SHARES = (0.25, 0.5, 0.75, 1.0)

# The most memory that the steps of a completed training take on each device, in bytes.
BytesOf = Callable[[TrainingConfig], int]


def chosen(config: TrainingConfig, capacity: int, bytes_of: BytesOf) -> TrainingConfig:
    """The configuration with what is left open decided: the first that fits, or what takes least.

    Args:
        config: completed.
        capacity: memory of each device.
        bytes_of: foresees what is tried; what comes before the steps cannot be helped here.

    Raises:
        InputError: this training cannot be foreseen.
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    if config.run.gradient_checkpointing is not None:
        return config
    for candidate in _candidates(config):
        if fits(bytes_of(candidate), capacity):
            break
    return candidate


def decided(
    config: TrainingConfig, forecast: Forecast, capacity: int, device: torch.device
) -> TrainingConfig:
    """What a training on such a device would choose: a processor keeps all activations.

    Args:
        config: completed.
        forecast: of its base model on this device.
        capacity: its memory.
        device: that trains.
    """
    if device.type != "cuda":
        return kept(config)
    return chosen(
        config, capacity, lambda tried: forecast.footprint(tried, precision_of(tried)).stages[STEPS]
    )


def kept(config: TrainingConfig) -> TrainingConfig:
    """The configuration with all activations kept, unless somebody chose."""
    if config.run.gradient_checkpointing is not None:
        return config
    note = Note(kind="ignored", field="checkpointing_share", message="all activations are kept")
    return config.with_leaf("gradient_checkpointing", False, note)


def as_begun(config: TrainingConfig, began_with: Mapping[str, Any]) -> TrainingConfig:
    """The configuration with what a training chose when it began.

    Args:
        config: of the training that goes on.
        began_with: the settings that it began with.
    """
    recomputes = began_with.get("gradient_checkpointing")
    if config.run.gradient_checkpointing is not None or recomputes is None:
        return config
    if not recomputes:
        return kept(config)
    config = config.with_leaf("gradient_checkpointing", True)
    share = began_with.get("checkpointing_share")
    if share is None or config.is_explicit("checkpointing_share"):
        return config
    return config.with_leaf("checkpointing_share", share)


def words(config: TrainingConfig) -> str:
    """What becomes of the activations in a training, as its beginning tells it."""
    if not config.run.gradient_checkpointing:
        return "kept"
    if config.run.checkpointing_share == 1:
        return "recomputed"
    return f"recomputed in {config.run.checkpointing_share:.0%} of the blocks"


def _candidates(config: TrainingConfig) -> Iterator[TrainingConfig]:
    yield kept(config)
    recomputing = config.with_leaf("gradient_checkpointing", True)
    if config.is_explicit("checkpointing_share"):
        yield recomputing
        return
    for share in _SHARES:
        yield recomputing.with_leaf("checkpointing_share", share)
