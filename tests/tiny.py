"""Small trainings on the tiny base models, for tests of what a training does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import engine
from trainer.config import TrainingConfig
from trainer.events import Event, StepEvent
from trainer.job import RunFolder
from trainer.processes import ALONE, Processes
from trainer.resolve import Layer, resolve
from trainer.training import Training

SMALL = {"rank": 4, "max_train_steps": 4, "learning_rate": 1e-3, "tensorboard": False}
# A linear layer and a convolution, for what is the same however many layers learn: readers of the
# result files take most of a tiny training's time, layer by layer.
TWO_LAYERS = {
    "target_unet_modules": [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ]
}


def configuration(model: Path, photos: Path, **leaves: Any) -> TrainingConfig:
    """A small configuration in which the named leaves are explicit."""
    given = {"model_url": str(model), "images_data_url": str(photos), **SMALL, **leaves}
    return resolve([Layer("test", given, explicit=True)])


def never() -> bool:
    """A wish to stop that never comes."""
    return False


def train(config: TrainingConfig, folder: Path, stop: Callable[[], bool] = never) -> list[Event]:
    """Runs a training in this process and returns what it said."""
    return list(engine.run(config, RunFolder(folder), stop))


def compose(
    config: TrainingConfig, folder: Path, processes: Processes = ALONE
) -> tuple[Training, list[Event]]:
    """A training before its first step, and what was said on the way there."""
    composing = engine.compose(config, RunFolder(folder), processes)
    events: list[Event] = []
    while True:
        try:
            events.append(next(composing))
        except StopIteration as end:
            return end.value.training, events


def steps(config: TrainingConfig, folder: Path) -> list[Event]:
    """Composes a training and runs its steps, without result files and their verification."""
    training, events = compose(config, folder)
    return [*events, *training.steps(RunFolder(folder), never)]


def losses(events: list[Event]) -> list[float]:
    """The loss of each step."""
    return [event.loss for event in events if isinstance(event, StepEvent)]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
