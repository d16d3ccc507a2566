"""Trains several configurations one after the other in each process that a launcher starts.

Usage: several_processes.py FILE FOLDER. FILE is JSON, name to leaves; each process leaves its
losses and everything it has learnt in FOLDER as NAME.PROCESS.json and .safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tiny import compose, losses, never

from trainer.events import Event, StageEvent
from trainer.job import RunFolder
from trainer.resolve import Layer, resolve


def train_one(leaves: dict[str, Any], run: Path, result: Path) -> None:
    """Runs the steps of a configuration and writes what came of them in this process."""
    config = resolve([Layer("test", leaves, explicit=True)])
    training, events = compose(config, run)
    told: list[Event] = list(training.steps(RunFolder(run), never))
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


def main() -> None:
    """Trains every configuration of the file."""
    file, folder = map(Path, sys.argv[1:])
    for name, leaves in json.loads(file.read_text()).items():
        train_one(leaves, folder / f"{name}.run", folder / name)


if __name__ == "__main__":
    main()
