"""Inference on the slots of this machine: one long-lived process each, which keeps models loaded.

It is given one request at a time on its input, holds the lock of its slot as a training does, and
leaves when its input ends: when it has been idle, or a training wants the slot.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.server import slots
from trainer.server.backends import Standing
from trainer.server.queue import Job
from trainer.server.slots import Slot

_LEAVING_SECONDS = 10.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    job: str | None
    idle_since: float = 0.0
    leaves: bool = False
    dismissed: float = 0.0


class Generators:
    """The inference processes of one server.

    Args:
        places: the slots of this machine.
        folder: of logs.
        command: of the process, which reads folders of requests on its input.
        idle_seconds: after which one leaves.
    """

    def __init__(
        self, places: Sequence[Slot], folder: Path, command: Sequence[str], idle_seconds: float
    ) -> None:
        self._places = {slot.name: slot for slot in places}
        self._folder = folder
        self._command = command
        self._idle_seconds = idle_seconds
        self._workers: dict[str, _Worker] = {}

    def free_slot(self) -> str | None:
        """A slot for a request: where an idle process is, else one that nobody holds."""
        self._bury()
        for name, worker in self._workers.items():
            if worker.job is None and not worker.leaves:
                return name
        free = (name for name, slot in self._places.items() if not slot.is_held())
        return next(free, None)

    def give(self, job: Job, folder: Path, slot: str) -> bool:
        """Gives a request to the process on a slot, which is started where there is none.

        Args:
            folder: with the request.
        """
        worker = self._workers.get(slot)
        try:
            if worker is None:
                worker = self._workers[slot] = _Worker(self._started(slot), None)
            assert worker.process.stdin is not None
            worker.process.stdin.write(f"{folder}\n".encode())
            worker.process.stdin.flush()
        except (slots.Busy, BrokenPipeError):
            return False
        worker.job = job.id
        return True

    def standing(self, job: Job) -> Standing:
        """Whether a request is being worked on."""
        worker = self._workers.get(job.slot or "")
        if worker is not None and worker.job == job.id:
            exit_code = worker.process.poll()
            return Standing("running") if exit_code is None else Standing("gone", exit_code)
        # The process of a server that is no more finishes what it was given.
        place = self._places.get(job.slot or "")
        if worker is None and place is not None and place.is_held():
            return Standing("running")
        return Standing("unknown")

    def finished(self, job: Job) -> None:
        """Takes note that a request is done, so that its process is idle."""
        for worker in self._workers.values():
            if worker.job == job.id:
                worker.job, worker.idle_since = None, time.monotonic()

    def make_room(self) -> None:
        """Asks one idle process to leave, unless one is leaving already."""
        self._bury()
        if not any(worker.leaves for worker in self._workers.values()):
            idle = [worker for worker in self._workers.values() if worker.job is None]
            for worker in idle[:1]:
                _dismiss(worker)

    def expire(self, grace: float) -> None:
        """Asks processes that have been idle for long to leave, and ends those that do not.

        Args:
            grace: seconds that one has for leaving.
        """
        self._bury()
        now = time.monotonic()
        for name, worker in self._workers.items():
            if worker.job is None and now - worker.idle_since >= self._idle_seconds:
                _dismiss(worker)
            if worker.job is None and worker.leaves and now - worker.dismissed > grace:
                slots.end(self._places[name].lock, at_once=True)

    def stop(self, job: Job) -> None:
        """Ends the process that works on a request; what it keeps loaded goes with it.

        Also one that an earlier server started.
        """
        place = self._places.get(job.slot or "")
        worker = self._workers.get(job.slot or "")
        if place is not None and (worker is None or worker.job == job.id):
            slots.end(place.lock, at_once=True)

    def close(self) -> None:
        """Asks all processes to leave; each finishes what it works on."""
        for worker in self._workers.values():
            _dismiss(worker)
            if worker.job is None:
                # It leaves at once; whoever started it takes its end.
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(_LEAVING_SECONDS)

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        slot = self._places[name]
        return slots.spawn(
            self._command,
            locks=[slot.lock],
            log=self._folder / f"generation-{name.replace('/', '-')}.log",
            environment=slot.environment(),
            pipe=True,
        )

    def _bury(self) -> None:
        """Forgets processes that have left; one that died over a request is told of first."""
        for name, worker in list(self._workers.items()):
            if worker.job is None and worker.process.poll() is not None:
                _dismiss(worker)
                del self._workers[name]


def _dismiss(worker: _Worker) -> None:
    if not worker.leaves:
        worker.leaves, worker.dismissed = True, time.monotonic()
    if worker.process.stdin is not None:
        worker.process.stdin.close()
