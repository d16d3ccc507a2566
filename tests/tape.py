"""A stand-in for CUDA graphs on the processor: operations on fixed tensors, taped and played.

As in a graph, nothing of Python is left in what is played: a number that the processor had decided
stays what it was, and whoever reads a tensor while it is taped is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.recording import CannotRecordError, Tensors, Work

# What a tensor's number is read by.
READ = torch.ops.aten._local_scalar_dense.default


class HostRead(AssertionError):
    """The processor read a number from the device."""


class NoReads(TorchDispatchMode):
    """Refuses to read a number from a tensor, which would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READ:
            raise HostRead(f"a tensor of shape {tuple(args[0].shape)} was read")
        return func(*args, **(kwargs or {}))


class Tape(NoReads):
    """Tapes every operation inside of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch gives it no types
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def play(self) -> None:
        """Does every operation again, on the same tensors."""
        for func, args, kwargs, made in self.operations:
            given = {_place(tensor) for tensor in _tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for earlier, later in zip(_tensors(made), _tensors(again), strict=True):
                if _place(earlier) not in given:
                    earlier.copy_(later)


class TapeRecorder:
    """Tapes work while it is done for the first time.

    Args:
        refuses: as a GPU that cannot record it.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.played = 0
        self.tapes: list[Tape] = []

    def plainly(self, work: Work) -> Tensors:
        """Does the work."""
        return work()

    def record(self, work: Work) -> Work:
        """What plays the work; the first time it is done already."""
        if self.refuses:
            raise CannotRecordError("operation not permitted when stream is capturing")
        tape = Tape()
        with tape:
            outputs = work()
        self.tapes.append(tape)
        is_done = True

        def play() -> Tensors:
            nonlocal is_done
            if not is_done:
                with torch.no_grad():
                    tape.play()
            is_done = False
            self.played += 1
            return outputs

        return play


@contextmanager
def nothing_read() -> Iterator[None]:
    """Inside, no number may be read from a tensor."""
    with NoReads():  # type: ignore[no-untyped-call] # torch gives it no types
        yield


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
