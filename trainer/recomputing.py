"""Whether activations are recomputed where nobody said so: in as few blocks as memory asks for.

Knows forecasts of memory and the options that they are about, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from trainer.capacity import fits
from trainer.config import TrainingConfig
from trainer.machine import precision_of
from trainer.memory import Forecast

# What is chosen where nobody chose.
LEAVES = ("gradient_checkpointing", "checkpointing_share")

# Of the blocks, tried in this order: what is not recomputed takes no time.
_SHARES = (0.25, 0.5, 0.75, 1.0)

# The most memory that a completed training takes on each device, in bytes.
PeakOf = Callable[[TrainingConfig], int]


def chosen(config: TrainingConfig, capacity: int, peak_of: PeakOf) -> TrainingConfig:
    """The configuration with what is left open decided: the first that fits, or what takes least.

    Args:
        config: completed.
        capacity: memory of each device.
        peak_of: foresees what is tried.

    Raises:
        InputError: this training cannot be foreseen.
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    if config.run.gradient_checkpointing is not None:
        return config
    for candidate in _candidates(config):
        if fits(peak_of(candidate), capacity):
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
        config, capacity, lambda tried: forecast.footprint(tried, precision_of(tried)).peak_bytes
    )


def kept(config: TrainingConfig) -> TrainingConfig:
    """The configuration with all activations kept, unless somebody chose."""
    if config.run.gradient_checkpointing is not None:
        return config
    return config.with_leaf("gradient_checkpointing", False)


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
