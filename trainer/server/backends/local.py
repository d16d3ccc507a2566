"""Trainings as subprocesses on this machine, one on each slot."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from trainer.server import slots
from trainer.server.backends import Handover, Standing
from trainer.server.slots import Slot

_LOCK = "lock"


class LocalBackend:
    """Runs trainings here.

    Args:
        places: the slots of this machine.
        jobs: folder with the folders of jobs.
    """

    runs_here = True

    def __init__(self, places: Sequence[Slot], jobs: Path) -> None:
        self._places = places
        self._jobs = jobs
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def has_room(self) -> bool:
        """Whether a slot is free."""
        return any(not slot.is_held() for slot in self._places)

    def start(self, job: Handover) -> bool:
        """Starts a training on a free slot."""
        for slot in self._places:
            try:
                self._children[job.id] = slots.spawn(
                    job.command,
                    locks=[self._lock(job.id), slot.lock],
                    log=job.log,
                    environment=slot.environment(),
                )
            except slots.Busy:
                continue
            return True
        return False

    def standing(self, id: str) -> Standing:
        """Whether its process lives; how it ended is told once, then it is not known any more."""
        lock = self._lock(id)
        if slots.is_held(lock):
            return Standing("running")
        child = self._children.pop(id, None)
        # A child that lets go of its locks is ending.
        exit_code = None if child is None else child.wait()
        began = child is not None or slots.process_of(lock) is not None
        lock.unlink(missing_ok=True)
        return Standing("gone", exit_code) if began else Standing("unknown")

    def stop(self, id: str, *, at_once: bool) -> bool:
        """Sends its process group SIGTERM or SIGKILL."""
        return slots.end(self._lock(id), at_once=at_once)

    def _lock(self, id: str) -> Path:
        return self._jobs / id / _LOCK
