"""The kinds of failure a user can meet: each has a name, an exit code and a remedy.

Knows nothing of the rest of the project, so that every module may raise these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    Args:
        field: the option, file or column at fault.
        message: what is wrong, with the value and what is allowed.
        hint: the next action, or nothing where the message already says it.
    """

    field: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """The problem as `field: message`, with the hint on a line of its own."""
        text = f"`{self.field}`: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Missing(Problem):
    """A required field that is not there."""


class TrainerError(Exception):
    """A failure with a kind, a documented exit code and a next action."""

    kind = "internal"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The failure as `error[kind]: message`, with the hint on a line of its own."""
        text = f"error[{self.kind}]: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class InputError(TrainerError):
    """What the user gave cannot be used; carries every problem found, not just the first."""

    kind = "input"
    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        """One `error[input]: …` paragraph per problem."""
        return "\n".join(f"error[{self.kind}]: {problem}" for problem in self.problems)

    @classmethod
    def of(cls, field: str, message: str, hint: str = "") -> InputError:
        """An error with a single problem."""
        return cls([Problem(field, message, hint)])


class VerificationError(TrainerError):
    """A written file does not give back the trained model."""

    kind = "verification"
    exit_code = 1


class NonFiniteError(TrainerError):
    """A latent, loss or gradient became NaN or infinite."""

    kind = "non-finite"
    exit_code = 3


class OutOfMemoryError(TrainerError):
    """The device has too little memory for this configuration."""

    kind = "memory"
    exit_code = 4


class DiskError(TrainerError):
    """A file could not be written, or a checkpoint not be read: disk full, quota, rights."""

    kind = "disk"
    exit_code = 5


class CheckpointError(TrainerError):
    """No usable checkpoint, or one that belongs to another configuration."""

    kind = "checkpoint"
    exit_code = 6


class ProcessError(TrainerError):
    """One of the processes of a training died, hangs or never came; the others end with it."""

    kind = "process"
    exit_code = 7


class Interrupted(TrainerError):
    """Stopped on request; every step done is in a checkpoint, and the same command goes on."""

    kind = "interrupted"
    exit_code = 75
