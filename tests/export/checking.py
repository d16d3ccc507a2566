"""Runs verification to its end, and rewrites files in small ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained_adapters import TrainedAdapter

from trainer.events import Event
from trainer.export.verify import Check, TrainedWeights, WrittenFile, verify

Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def run_verification(
    root: Path, files: list[tuple[str, Path]], adapter: TrainedAdapter
) -> tuple[list[Check], list[Event]]:
    """The checks, and the events on the way."""
    written = [WrittenFile(role, path, _holds(role, path, adapter)) for role, path in files]
    return run_checks(root, written, adapter)


def run_checks(
    root: Path, files: list[WrittenFile], adapter: TrainedAdapter
) -> tuple[list[Check], list[Event]]:
    """The same for files of any content."""
    stage = verify(root, files, adapter.fresh, adapter.names)
    events = []
    while True:
        try:
            events.append(next(stage))
        except StopIteration as end:
            return end.value, events


def _holds(role: str, path: Path, adapter: TrainedAdapter) -> TrainedWeights:
    """A PEFT folder has the adapter of the one component after which it is named."""
    if role != "peft_folder":
        return adapter.weights
    return {path.parent.name: adapter.weights[path.parent.name]}


def rewrite(path: Path, change: Change) -> None:
    """Changes the tensors and metadata of a file in place."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    # The library's own writer takes what ours refuses, such as NaN.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
