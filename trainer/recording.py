"""Work that is the same in every step, recorded once and played again: CUDA graphs.

A step of a small batch is thousands of small pieces of work, and a GPU waits while the processor
hands out each. Recorded, all of them are handed out at once. What is recorded reads its inputs from
fixed places, and leaves its outputs in fixed places. Knows tensors and shapes, nothing of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Tensors = dict[str, torch.Tensor]
Work = Callable[[], Tensors]

# Times that work is done plainly before it is recorded: kernels are chosen, and memory is found.
_PLAIN = 3
# Recordings kept at once; whatever has yet another shape is always done plainly.
_MOST = 16


class CannotRecordError(Exception):
    """The device cannot record the work, of which nothing was done."""


class Recorder(Protocol):
    """Records work on a device."""

    def plainly(self, work: Work) -> Tensors:
        """Does the work as it will be done when it is recorded."""

    def record(self, work: Work) -> Work:
        """What plays the work again; outputs are the same tensors each time."""


class CudaRecorder:
    """Records on the current GPU; all recordings share their memory, as one is played at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def plainly(self, work: Work) -> Tensors:
        """Does the work on the stream that recordings are made on, where autograd then finds it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work()
        current.wait_stream(self._stream)
        return outputs

    def record(self, work: Work) -> Work:
        """See `Recorder`; nothing is computed yet.

        Raises:
            CannotRecordError: a piece of the work needs the processor.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotRecordError(str(error).partition("\n")[0]) from error

        def play() -> Tensors:
            graph.replay()
            return outputs

        return play


class PlainRecorder:
    """Does the work anew each time it is played: what can be recorded can be tried anywhere."""

    def plainly(self, work: Work) -> Tensors:
        """Does the work."""
        return work()

    def record(self, work: Work) -> Work:
        """The work itself."""
        return work


@dataclass
class _Recording:
    inputs: Tensors
    play: Work


@dataclass
class Recordings:
    """Recordings of one kind of work on inputs of several shapes.

    Args:
        recorder: of the device.
    """

    recorder: Recorder
    _seen: Counter[Hashable] = field(default_factory=Counter)
    _kept: dict[Hashable, _Recording] = field(default_factory=dict)

    def forget(self) -> None:
        """Gives all recordings up: what they were made of has changed."""
        self._seen.clear()
        self._kept.clear()

    def outputs(
        self, kind: Hashable, work: Callable[[Mapping[str, torch.Tensor]], Tensors], inputs: Tensors
    ) -> Tensors:
        """What the work gives for these inputs; plainly at first, then by a recording.

        Args:
            kind: of the work, beside the shapes of its inputs.
            work: reads nothing that changes but its inputs.
            inputs: of fixed names.

        Raises:
            CannotRecordError: see `CudaRecorder`.
        """
        key = kind, tuple((name, tensor.shape) for name, tensor in inputs.items())
        self._seen[key] += 1
        if key not in self._kept:
            if self._seen[key] <= _PLAIN or len(self._kept) == _MOST:
                return self.recorder.plainly(lambda: work(inputs))
            fixed = {name: tensor.clone() for name, tensor in inputs.items()}
            self._kept[key] = _Recording(fixed, self.recorder.record(lambda: work(fixed)))
        recording = self._kept[key]
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor, non_blocking=True)
        # The next time overwrites them.
        return {name: output.clone() for name, output in recording.play().items()}
