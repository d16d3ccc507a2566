"""Running out of memory: what is told by it, and the error that says where and what would help."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Generator

import torch

from trainer import base_model, recomputing
from trainer.capacity import device_memory
from trainer.config import TrainingConfig
from trainer.errors import OutOfMemoryError, TrainerError
from trainer.events import CheckpointEvent, Event, RunEvent, StageEvent, StepEvent
from trainer.machine import refuse_updates_in_backward
from trainer.remedies import advise
from trainer.sharding import asked_for, refuse_in_shards

STAGE = "what would save memory"
# Of the time after which the others give a process up: what looking for advice may take.
_PATIENCE = 0.25

# What torch says of processes that read pictures, and of what they hand over.
_OF_READERS = re.compile(
    r"out of shared memory|unable to allocate shared memory|unable to (mmap|resize|open shared)"
    r"|worker \(pid.*killed by signal: (killed|bus error)",
    re.IGNORECASE,
)
_FOR_READERS = (
    "the processes that read pictures had too little: give `num_workers: 0`, "
    "or more shared memory (/dev/shm; for containers `--shm-size` or `--ipc=host`)"
)
# What torch, CUDA's libraries and the computer's allocator say; each is a RuntimeError.
# oneDNN, which convolves on processors, does not say why it could not create something; that it
# has no kernel for what is asked it says of a descriptor.
_SAYS_SO = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|_ALLOC_FAILED"
    r"|could not create a (primitive|memory object)(?! descriptor)",
    re.IGNORECASE,
)


class Place:
    """Where a training is, from what it says."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._total_steps = 0
        # Step of the last checkpoint; 0: there is none.
        self.kept_step = 0

    def hear(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case RunEvent():
                self._step, self._total_steps = event.start_step, event.total_steps
                self.kept_step = event.start_step
            case StepEvent():
                self._step = event.step
            case CheckpointEvent():
                self.kept_step = event.step
            case _:
                pass

    @property
    def words(self) -> str:
        """Where it is, and what can be gone on from."""
        if self._step is None:
            return "before the first step"
        if self._step == self.kept_step == self._total_steps:
            return "after the last step, which is in a checkpoint, as all before it are"
        kept = f"step {self.kept_step}" if self.kept_step else "none"
        return f"after step {self._step} of {self._total_steps}, of which {kept} is in a checkpoint"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be had: a device's or the computer's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(pattern.search(str(error)) for pattern in (_SAYS_SO, _OF_READERS))
    )


def out_of_memory(
    error: BaseException,
    config: TrainingConfig,
    *,
    where: str,
    kept_step: int = 0,
    num_processes: int = 1,
) -> Generator[Event, None, OutOfMemoryError]:
    """The error to end with: what failed and where, and as a hint what would help.

    Args:
        error: for which `ran_out_of_memory`.
        config: as its user gave it.
        where: what was being done, such as `in step 3`.
        kept_step: of the last checkpoint; 0: there is none.
        num_processes: of the training; each has a device of its own.
    """
    # What failed must not hold the memory that looking for advice takes.
    traceback.clear_frames(error.__traceback__)
    reason = str(error).split(". ", maxsplit=1)[0].split("\n")[0] or type(error).__name__
    each = f", in each of {num_processes} processes" if num_processes > 1 else ""
    if _OF_READERS.search(str(error)):
        return OutOfMemoryError(f"{where}{each}: {reason}", _FOR_READERS)
    yield StageEvent(STAGE, 0, 1)
    try:
        lines = _advice(config, kept_step, num_processes)
    # Whatever keeps advice from being given, the training ran out of memory.
    except (TrainerError, OSError, RuntimeError, MemoryError) as failure:
        lines = [f"what would help cannot be foreseen here: {failure}"]
    yield StageEvent(STAGE, 1, 1)
    return OutOfMemoryError(f"{where}{each}: {reason}", "\n        ".join(lines))


def _advice(config: TrainingConfig, kept_step: int, num_processes: int) -> list[str]:
    """What would help, a sentence a line: nothing that this launch refuses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    in_shards = num_processes > 1 and asked_for() is not None

    def refuse(candidate: TrainingConfig) -> None:
        refuse_updates_in_backward(candidate, num_processes)
        if in_shards:
            refuse_in_shards(candidate, num_processes)

    if in_shards:
        # What was chosen there is not known here: recomputing may help.
        config = recomputing.kept(config)
    base = base_model.locate(config.model, vae_is_explicit=config.is_explicit("vae_url"))
    lines = advise(
        config,
        base,
        capacity=device_memory(device),
        device=device,
        refuse=refuse,
        seconds=_PATIENCE * config.run.rank_timeout if num_processes > 1 else math.inf,
        has_checkpoint=kept_step > 0,
    ).lines(kept_step)
    if in_shards:
        told = "all of this is counted without shards, of which each process holds one of "
        lines.append(f"{told}{num_processes}: it takes less, and saves less of weights")
    return lines
