"""What runs trainings: this machine, or an engine that they are handed over to.

A backend is asked by the id of a job alone, so that a job is found again after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trainer.errors import TrainerError

# The exit code of a training that was stopped and can go on, see `errors.Interrupted`.
PREEMPTED = 75


@dataclass(frozen=True)
class Handover:
    """A training to be run.

    Args:
        id: of the job.
        folder: of the job; absolute.
        command: the program and its arguments.
    """

    id: str
    folder: Path
    command: Sequence[str]

    @property
    def log(self) -> Path:
        """What the program prints."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Standing:
    """Where a handed-over training stands.

    Args:
        state: whether it waits, runs, is gone, or is not known: most likely it never began.
        exit_code: of one that is gone, where that is known.
    """

    state: Literal["waiting", "running", "gone", "unknown"]
    exit_code: int | None = None


class Backend(Protocol):
    """What runs trainings.

    `runs_here`: whether they run on this machine, in the slots that pictures are made in, and end
    with the server.
    """

    runs_here: bool

    def has_room(self) -> bool:
        """Whether a training can be taken now."""

    def start(self, job: Handover) -> bool:
        """Takes a training; false where there is no room for it after all.

        Raises:
            BackendError: it cannot be taken at all.
        """

    def standing(self, id: str) -> Standing:
        """Where a training stands, also one from before a restart."""

    def stop(self, id: str, *, at_once: bool) -> bool:
        """Asks a training to leave a checkpoint and end, or ends it at once.

        Returns:
            Whether it was told; otherwise this is to be tried again.
        """


class BackendError(TrainerError):
    """The engine that trainings are handed over to refuses something, or does not answer."""

    kind = "backend"


def with_places(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The words of a command, with `{name}` in them replaced by what stands there."""
    filled = list(words)
    for name, value in places.items():
        filled = [word.replace(f"{{{name}}}", value) for word in filled]
    return filled
