"""Runs verification to its end, and rewrites files in small ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import TrainedAdapter

from trainer import tensorfile
from trainer.events import Event
from trainer.export.verify import Check, verify

Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def run_verification(
    root: Path, files: list[tuple[str, Path]], adapter: TrainedAdapter
) -> tuple[list[Check], list[Event]]:
    """The checks, and the events on the way."""
    stage = verify(root, files, adapter.weights, adapter.fresh, adapter.names)
    events = []
    while True:
        try:
            events.append(next(stage))
        except StopIteration as end:
            return end.value, events


def rewrite(path: Path, change: Change) -> None:
    """Changes the tensors and metadata of a file in place."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    tensorfile.write(path, tensors, metadata)
