"""The dispatcher: brings jobs from the queue to whoever runs them, and settles how they ended.

What ended is judged in this order: a wish to cancel, the result that the job wrote last, exit
code 75 of one that was interrupted and goes on, and a start that led to nothing, of which there
are three. A started server looks at every job that was running in just this way: one that still
lives is adopted, one that has a result is settled, any other goes back to its place.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from trainer.durable import write_text
from trainer.errors import TrainerError
from trainer.generation import GenerationFolder
from trainer.job import Result
from trainer.server.backends import PREEMPTED, Backend, Handover, Standing, with_places
from trainer.server.files import FileStore
from trainer.server.generators import Generators
from trainer.server.job_folders import JobFolder, JobFolders
from trainer.server.queue import MAX_STARTS, Job, Kind, Queue

log = logging.getLogger("trainer.server")

# Kinds of failure that are the server's own, beside those of `trainer.errors`.
LOST, LATE, OVERTIME, REFUSED = "lost", "request_timeout", "wall_time", "backend"
# An engine that does not take a training is asked again, each time after twice as long.
HANDOVER_TRIES = 5
HANDOVER_SECONDS = 5.0


@dataclass(frozen=True)
class Lane:
    """What works on the jobs of one kind, each a process of its own.

    Args:
        backend: runs them.
        command: with places `{config}`, `{output}`, `{folder}`, `{id}`.
    """

    backend: Backend
    command: Sequence[str]


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    Args:
        grace: that a job has for its checkpoint once it is stopped.
        wall: that a job may run, without a break, before it is stopped. None: no limit.
        poll: between two looks at the same running job.
    """

    grace: float = 60
    wall: float | None = None
    poll: float = 0


@dataclass
class _Watch:
    """What is remembered of a running job, by a clock that does not jump."""

    looked: float = -math.inf
    running_since: float | None = None
    asked_to_end: float | None = None
    # That it is to end, False, and that at once, True.
    told: set[bool] = field(default_factory=set)
    # Held by the thread that tells it: a tick, or the end of the server beside it.
    telling: threading.Lock = field(default_factory=threading.Lock)
    is_overtime: bool = False


class Dispatcher:
    """Starts, watches and settles jobs.

    Trouble with one job, its disk or its engine, leaves the others alone: it is logged, and tried
    again at the next tick.

    Args:
        queue: of jobs.
        files: where results are made fetchable.
        folders: of jobs.
        trainings: where they are worked on.
        preparations: where pictures are prepared to be looked at: beside trainings, so that
            nobody waits for one to see them. None: nowhere.
        generators: make pictures.
        limits: how long things may take.
    """

    def __init__(
        self,
        queue: Queue,
        files: FileStore,
        folders: JobFolders,
        *,
        trainings: Lane,
        preparations: Lane | None = None,
        generators: Generators,
        limits: Limits = Limits(),
    ) -> None:
        self._queue = queue
        self._files = files
        self._folders = folders
        self._lanes: dict[Kind, Lane] = {"training": trainings}
        if preparations is not None:
            self._lanes["preparation"] = preparations
        self._generators = generators
        self._limits = limits
        self._watches: dict[str, _Watch] = {}
        self._handover_tries = 0
        self._handover_rests_until = -math.inf
        self._ends = False
        # A tick and the end of the server do not work at the same time.
        self._at_work = threading.Lock()

    def tick(self) -> None:
        """Does all that can be done now."""
        with self._at_work:
            for job in self._queue.late(time.time()):
                with _trouble_logged(job):
                    self._fail(job, LATE, "the job did not begin in the time that its request gave")
            for job in self._queue.running():
                with _trouble_logged(job):
                    self._look_at(job)
            for kinds in self._lines():
                while not self._ends and self._begin_next(kinds):
                    pass
            self._generators.expire(self._limits.grace)

    def wind_down(self) -> int:
        """Begins nothing any more, and asks what runs on this machine to leave a checkpoint.

        Returns:
            How many trainings and preparations are waited for.
        """
        self._ends = True
        running = self._ending_here()
        for job in running:
            with _trouble_logged(job):
                self._tell_to_end(job, self._watch_of(job), at_once=False)
        return len(running)

    def close(self, hurry: threading.Event | None = None) -> None:
        """Waits until what runs on this machine has left its checkpoint, and puts it back.

        Trainings that were handed over to another engine go on there.

        Args:
            hurry: ends the wait when set; what still runs then is adopted by the next server.
        """
        hurry = hurry or threading.Event()
        self.wind_down()
        with self._at_work:
            self._generators.close()
            deadline = time.monotonic() + self._limits.grace
            while self._awaited() and time.monotonic() < deadline and not hurry.wait(0.05):
                for job in self._awaited():
                    with _trouble_logged(job):
                        watch = self._watch_of(job)
                        if job.kind != "generation":
                            self._tell_to_end(job, watch, at_once=False)
                        watch.looked = -math.inf
                        self._look_at(job)
            # What was at work is idle now, and leaves.
            self._generators.close()

    def _lines(self) -> list[Sequence[Kind]]:
        """The kinds of jobs that wait in one line each."""
        others: list[Sequence[Kind]] = [("preparation",)] if "preparation" in self._lanes else []
        return [*_LINES[self._lanes["training"].backend.runs_here], *others]

    def _ending_here(self) -> list[Job]:
        """What is asked to end with the server."""
        here = [kind for kind, lane in self._lanes.items() if lane.backend.runs_here]
        return [job for job in self._queue.running() if job.kind in here]

    def _awaited(self) -> list[Job]:
        """What ends with the server."""
        pictures = [job for job in self._queue.running() if job.kind == "generation"]
        return [*self._ending_here(), *pictures]

    def _look_at(self, job: Job) -> None:
        now = time.monotonic()
        watch = self._watch_of(job)
        if now - watch.looked < self._limits.poll:
            return
        watch.looked = now
        result = self._folders.of(job.id).result()
        standing = self._standing(job)
        if standing.state == "running" and watch.running_since is None:
            watch.running_since = now
        if standing.state in ("gone", "unknown") or (result and job.kind == "generation"):
            self._settle(job, result, standing)
        else:
            self._limit(job, watch, standing, has_result=result is not None)

    def _watch_of(self, job: Job) -> _Watch:
        watch = self._watches.get(job.id)
        # Where another thread makes one too, the first counts for both.
        return watch or self._watches.setdefault(job.id, self._remembered(job))

    def _remembered(self, job: Job) -> _Watch:
        """The watch over a job that this server has not looked at yet, or an earlier one told."""
        told = self._queue.told(job)
        if False not in told:
            return _Watch()
        asked_to_end = time.monotonic() - max(0.0, time.time() - told[False])
        # An end at once can be told again, which heals one that came to nothing.
        return _Watch(told={False}, asked_to_end=asked_to_end)

    def _standing(self, job: Job) -> Standing:
        if job.kind == "generation":
            return self._generators.standing(job)
        return self._lanes[job.kind].backend.standing(job.id)

    def _limit(self, job: Job, watch: _Watch, standing: Standing, *, has_result: bool) -> None:
        """Stops a running job that somebody cancelled, or that takes too long, also to end."""
        now = time.monotonic()
        wall, since = self._limits.wall, watch.running_since
        # One that ends with the server goes on with the next.
        if wall is not None and since is not None and not self._ends:
            watch.is_overtime = now - since > wall
        if not (job.cancel_requested or has_result or watch.is_overtime):
            return
        if watch.asked_to_end is None:
            watch.asked_to_end = now
        # One that waits elsewhere has no checkpoint to leave, and hears nothing that it is asked.
        waits = standing.state == "waiting" and not has_result
        at_once = waits or now - watch.asked_to_end > self._limits.grace
        if job.kind == "generation":
            self._generators.stop(job)
        elif at_once or not has_result:
            self._tell_to_end(job, watch, at_once=at_once)

    def _tell_to_end(self, job: Job, watch: _Watch, *, at_once: bool) -> None:
        """Tells a job once to end: a launcher that is told again waits for no checkpoint.

        Whom another thread is just telling is left to it, and told later where that is not heard.
        """
        if not watch.telling.acquire(blocking=False):
            return
        try:
            if at_once in watch.told:
                return
            if self._lanes[job.kind].backend.stop(job.id, at_once=at_once):
                watch.told.add(at_once)
                self._queue.note_told(job, at_once=at_once)
        finally:
            watch.telling.release()

    def _settle(self, job: Job, result: Result | None, standing: Standing) -> None:
        job = self._queue.find(job.id) or job
        watch = self._watches.pop(job.id, _Watch())
        self._generators.finished(job)
        folder = self._folders.of(job.id)
        if job.cancel_requested:
            self._queue.settle(job, "cancelled")
        elif result is not None and result.status == "done":
            self._files.register(job.id, folder.run.root, result.files)
            self._queue.settle(job, "done")
        elif result is not None:
            self._queue.settle(job, "failed")
        elif watch.is_overtime:
            self._fail(job, OVERTIME, "the job took longer than this server lets one take")
        elif self._costs_nothing(folder, standing):
            self._queue.requeue(job, counts=False)
        else:
            code = standing.exit_code
            log.warning(
                "job %s ended (exit code %s) without a result: %s", job.id, code, folder.log
            )
            if job.starts < MAX_STARTS:
                self._queue.requeue(job, counts=True)
            else:
                self._fail(job, LOST, f"the job ended {MAX_STARTS} times without a result")

    def _costs_nothing(self, folder: JobFolder, standing: Standing) -> bool:
        """Whether a start that led to no result was interrupted, or never came about."""
        interrupted = standing.exit_code == PREEMPTED or folder.was_interrupted()
        return standing.state == "unknown" or interrupted

    def _fail(self, job: Job, kind: str, message: str) -> None:
        """Ends a job that has no result of its own with one that says why."""
        run = self._folders.of(job.id).run
        run.create()
        run.write_result(Result(status="failed", exit_code=1, error_kind=kind, error=message))
        self._queue.settle(job, "failed")

    def _begin_next(self, kinds: Sequence[Kind]) -> bool:
        """Begins the job of these kinds whose turn it is; false where that cannot be now."""
        job = self._queue.waiting(kinds)
        if job is None:
            return False
        with _trouble_logged(job):
            result = self._folders.of(job.id).result()
            if result is None:
                return _BEGINNINGS[job.kind](self, job)
            # It ended while nobody looked.
            self._settle(job, result, Standing("gone"))
            return True
        return False

    def _begin_training(self, job: Job) -> bool:
        if time.monotonic() < self._handover_rests_until:
            return False
        if not self._lanes["training"].backend.has_room():
            self._generators.make_room()
            return False
        return self._hand_over(job)

    def _begin_preparation(self, job: Job) -> bool:
        return self._lanes["preparation"].backend.has_room() and self._hand_over(job)

    def _hand_over(self, job: Job) -> bool:
        """Gives a job to what works on its kind; false where that cannot be now."""
        folder = self._folders.of(job.id)
        # One that is refused takes back what it made, and leaves its reason where a folder was.
        folder.run.create()
        if not folder.config.exists():
            write_text(folder.config, job.work)
        # What an interrupted start said must not be taken for what this one says.
        folder.run.forget_result()
        if not self._queue.start(job):
            return True
        try:
            taken = self._lanes[job.kind].backend.start(self._handover(job, folder))
        except (TrainerError, OSError) as error:
            self._not_taken(job, error)
            return False
        self._handover_tries = 0
        if not taken:
            self._queue.requeue(job, counts=False)
        return taken

    def _not_taken(self, job: Job, error: Exception) -> None:
        """Puts a training back that the engine does not take, for some time; then it fails."""
        log.error("job %s is not taken: %s", job.id, error)
        self._handover_tries += 1
        if self._handover_tries >= HANDOVER_TRIES:
            self._handover_tries = 0
            self._fail(job, REFUSED, "what runs trainings does not take this one")
            return
        rest = HANDOVER_SECONDS * 2.0 ** (self._handover_tries - 1)
        self._handover_rests_until = time.monotonic() + rest
        self._queue.requeue(job, counts=False)

    def _begin_generation(self, job: Job) -> bool:
        slot = self._generators.free_slot()
        if slot is None:
            return False
        folder = self._folders.of(job.id)
        folder.run.create()
        write_text(GenerationFolder(folder.run.root).request, job.work)
        if not self._queue.start(job, slot):
            return True
        if not self._generators.give(job, folder.run.root, slot):
            self._queue.requeue(job, counts=False)
            return False
        return True

    def _handover(self, job: Job, folder: JobFolder) -> Handover:
        root = folder.root.resolve()
        places = {
            "id": job.id,
            "folder": str(root),
            "config": str(folder.config.resolve()),
            "output": str(folder.run.root.resolve()),
        }
        return Handover(job.id, root, with_places(self._lanes[job.kind].command, places))


@contextmanager
def _trouble_logged(job: Job) -> Iterator[None]:
    """Work on one job whose trouble with disk or engine is no other job's."""
    try:
        yield
    except (TrainerError, OSError, sqlite3.Error) as error:
        log.error("job %s: %s", job.id, error)


# Where trainings and pictures share slots they wait in one line, else in two.
_LINES: Mapping[bool, Sequence[Sequence[Kind]]] = {
    True: (("training", "generation"),),
    False: (("training",), ("generation",)),
}
_BEGINNINGS: Mapping[str, Callable[[Dispatcher, Job], bool]] = {
    "training": Dispatcher._begin_training,
    "preparation": Dispatcher._begin_preparation,
    "generation": Dispatcher._begin_generation,
}
