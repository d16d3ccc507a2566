"""What the processes of one training tell each other: signs of life, and what ends them all."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from trainer.errors import (
    CheckpointError,
    DiskError,
    InputError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    Problem,
    ProcessError,
    TrainerError,
    VerificationError,
)
from trainer.job import Result

# What a process is at before it says anything.
BEGINNING = "the beginning"

_KINDS: dict[str, type[TrainerError]] = {
    kind.kind: kind
    for kind in (
        VerificationError,
        NonFiniteError,
        OutOfMemoryError,
        DiskError,
        CheckpointError,
        ProcessError,
        Interrupted,
    )
}
# They say themselves whose they are, or are nobody's.
_WITHOUT_PLACE = (InputError.kind, ProcessError.kind, Interrupted.kind)


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Args:
        number: of the beat.
        host: the machine's name.
        pid: of the process there.
        doing: what its main thread is at.
        step: that its main thread has begun, from 1; 0 before the first.
        wishes: whether it was asked to stop.
        left: whether it has left the training.
    """

    number: int
    host: str
    pid: int
    doing: str = BEGINNING
    step: int = 0
    wishes: bool = False
    left: bool = False


class Cause(BaseModel):
    """What ends the training.

    Args:
        rank: the process that says so.
        host: where it runs.
        result: kind, message and exit code.
        lost: processes that can say nothing any more.
    """

    model_config = ConfigDict(frozen=True)
    rank: int
    host: str
    result: Result
    lost: tuple[int, ...] = ()

    def error(self) -> TrainerError:
        """The cause as another process raises it."""
        result = self.result
        kind, message, hint = result.error_kind or "", result.error or "", result.hint or ""
        if kind == InputError.kind:
            return InputError([Problem(p.field, p.message, p.hint) for p in result.problems])
        if kind not in _WITHOUT_PLACE:
            message = f"process {self.rank} on {self.host}: {message}"
        return _KINDS.get(kind, TrainerError)(message, hint)
