"""A long training in a process of its own, with every listener that a user has."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from tiny import TWO_LAYERS, configuration, never

from trainer import engine
from trainer.events import Event, StepEvent
from trainer.job import RunFolder
from trainer.listeners import progress_for
from trainer.runner import supervise
from trainer.trackers import logs_for

LOOKS = (30, 60, 90)


def resident_bytes() -> int:
    """Memory of this process that is not swapped out."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Gauge:
    """Looks at the process after every step: memory each time, living objects at some steps."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.living: list[tuple[int, int]] = []

    def hear(self, event: Event) -> None:
        """Takes the measures of a step."""
        if not isinstance(event, StepEvent):
            return
        self.resident.append(resident_bytes())
        if event.step in LOOKS:
            gc.collect()
            everything = gc.get_objects()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in everything)
            self.living.append((len(everything), tensors))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def run(arguments: Sequence[str]) -> int:
    """Trains and writes what the gauge saw.

    Args:
        arguments: base model, pictures, run folder, number of steps, file for the measures.
    """
    model, photos, folder, number, measures = arguments
    leaves = {"max_train_steps": int(number), "tensorboard": True, "checkpointing_steps": 50}
    # So small a rate that weights stay finite.
    config = configuration(Path(model), Path(photos), **TWO_LAYERS, **leaves, learning_rate=1e-6)
    run_folder, gauge = RunFolder(Path(folder)), Gauge()
    with open(os.devnull, "w") as nowhere:
        shown = progress_for(Console(file=nowhere))
        listeners = [*logs_for(config, run_folder), shown, gauge]
        result = supervise(config, run_folder, listeners, engine=engine.run, stop=never)
    Path(measures).write_text(json.dumps({"resident": gauge.resident, "living": gauge.living}))
    return result.exit_code
