"""What a server does for itself: metrics, and making room by the owner's rules."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.durable import disk_errors
from trainer.server.database import Database
from trainer.server.files import FileStore
from trainer.server.job_folders import JobFolders
from trainer.server.queue import Queue
from trainer.server.room import Room

DATABASE = "server.sqlite3"
_DAY = 86400.0
_PRIVATE = 0o700
_OWN_FOLDERS = ("files", "jobs", "slots")


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile do not count."""
    return sum(_sizes(folder))


def private_folder(data: Path) -> None:
    """Makes the data folder: photographs, keys and results are for its owner's eyes alone.

    One that is there keeps its mode, since it may hold more; what the server has in it does not.

    Raises:
        DiskError: it cannot be made.
    """
    with disk_errors(data, "--data"):
        data.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        for name in _OWN_FOLDERS:
            (data / name).mkdir(exist_ok=True, mode=_PRIVATE)
            (data / name).chmod(_PRIVATE)
        database = data / DATABASE
        database.touch(mode=_PRIVATE & 0o666)
        database.chmod(_PRIVATE & 0o666)


def tidy(
    queue: Queue,
    files: FileStore,
    folders: JobFolders,
    room: Room,
    *,
    data: Path,
    days: float | None,
) -> None:
    """Removes what is older than the owner keeps, and measures what is left.

    Args:
        data: the data folder.
        days: that ended jobs and uploads are kept. None: for good.
    """
    if days is not None:
        moment = time.time() - days * _DAY
        # Pictures that are asked for need the run that they are made with.
        under_way = queue.works(under_way=True)
        old = [j for j in queue.ended_before(moment) if not any(j.id in w for w in under_way)]
        for job in old:
            files.forget_job(job.id)
            shutil.rmtree(folders.of(job.id).root, ignore_errors=True)
        queue.forget([job.id for job in old])
        files.remove_uploads_before(moment, used=queue.works())
    room.measure(lambda: size_of(data))


def metrics(queue: Queue, database: Database, room: Room) -> str:
    """What is measured, in Prometheus' text format."""
    counts = queue.counts()
    jobs = {
        f'trainer_jobs{{state="{state}"}}': counts.get(state, 0)
        for state in ("queued", "running", "done", "failed", "cancelled")
    }
    waiting = database.row("SELECT count(*) FROM outbox WHERE state = 'waiting'")
    head = queue.waiting()
    rest = {
        "trainer_webhooks_waiting": waiting[0] if waiting else 0,
        "trainer_oldest_queued_seconds": 0.0 if head is None else time.time() - head.created,
        "trainer_data_bytes": room.used,
    }
    lines = ["# TYPE trainer_jobs gauge", *(f"{name} {value}" for name, value in jobs.items())]
    for name, value in rest.items():
        lines += [f"# TYPE {name} gauge", f"{name} {value}"]
    return "\n".join(lines) + "\n"


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
