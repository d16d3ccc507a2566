"""Trains several configurations one after the other in each of the processes that do so together.

Each leaves its losses and everything it has learnt as NAME.PROCESS.json and .safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tiny import compose, losses, never

from trainer.events import Event, StageEvent
from trainer.job import RunFolder
from trainer.processes import Launched
from trainer.resolve import Layer, resolve


def train_one(leaves: dict[str, Any], run: Path, result: Path) -> None:
    """Runs the steps of a configuration and writes what came of them in this process."""
    config = resolve([Layer("test", leaves, explicit=True)])
    with Launched(config.run.rank_timeout, RunFolder(run), never) as processes:
        training, events = compose(config, run, processes)
        told: list[Event] = list(training.steps(RunFolder(run), never))
        processes.wait()
    made = [e.done for e in events if isinstance(e, StageEvent) and e.stage == "class images"]
    process = training.accelerator.process_index
    result = result.with_name(f"{result.name}.{process}")
    facts = {"losses": losses(told), "class_images": made}
    result.with_name(f"{result.name}.json").write_text(json.dumps(facts))
    tensors = {
        f"{component}.{name}": tensor.contiguous()
        for component, group in training.trainables.tensors().items()
        for name, tensor in group.items()
    }
    save_file(tensors, result.with_name(f"{result.name}.safetensors"))


def train_all(file: str, folder: str) -> int:
    """Trains every configuration of the file."""
    for name, leaves in json.loads(Path(file).read_text()).items():
        train_one(leaves, Path(folder) / f"{name}.run", Path(folder) / name)
    return 0
