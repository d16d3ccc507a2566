"""The queue of jobs: what was asked for, in which order it goes, and where each one stands.

A job is `queued`, `running`, or over: `done`, `failed`, `cancelled`. Every change is one
transaction. Who runs a job and what its result is, is not known here.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trainer.server.database import Database

State = Literal["queued", "running", "done", "failed", "cancelled"]
Kind = Literal["training", "generation", "preparation"]
Ending = Literal["done", "failed", "cancelled"]

QUEUED_OR_RUNNING = ("queued", "running")
MAX_STARTS = 3

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    protocol TEXT NOT NULL,
    app TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    priority INTEGER NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    start_by REAL,
    starts INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL,
    slot TEXT,
    name TEXT NOT NULL,
    request TEXT NOT NULL,
    work TEXT NOT NULL,
    webhook TEXT,
    idempotency_key TEXT UNIQUE,
    fingerprint TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_waiting ON jobs (state, priority, number);
CREATE TABLE IF NOT EXISTS outbox (
    job TEXT PRIMARY KEY,
    tries INTEGER NOT NULL,
    next_try REAL NOT NULL,
    state TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS told (
    job TEXT NOT NULL,
    at_once INTEGER NOT NULL,
    moment REAL NOT NULL,
    PRIMARY KEY (job, at_once)
);
"""


@dataclass(frozen=True)
class NewJob:
    """What is asked for.

    Args:
        protocol: name of the protocol that speaks of this job.
        app: what was called, in the service's words, such as `fal-ai/personalization`.
        kind: what it is.
        request: the service's request, without long contents.
        work: the configuration as YAML for a training and for the preparation of one, a
            `GenerationRequest` as JSON for pictures.
        name: what the user calls it.
        priority: lower ones first.
        start_by: seconds since 1970 after which it is not begun any more.
        webhook: where and how its end is told; the protocol's own.
        idempotency_key: a second request with it is the first.
        fingerprint: of everything asked for; equal for equal requests.
    """

    protocol: str
    app: str
    kind: Kind
    request: Mapping[str, Any]
    work: str = ""
    name: str = ""
    priority: int = 0
    start_by: float | None = None
    webhook: Mapping[str, Any] | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class Job(NewJob):
    """A job in the queue.

    Args:
        number: the order of arrival.
        id: by which clients know it; a UUID.
        state: where it stands.
        created: seconds since 1970, as all times here.
        started: of the latest start.
        ended: when its end was settled.
        starts: how often it was started; those that were interrupted do not count.
        cancel_requested: whether somebody asked for its end.
        slot: which slot of this machine has it.
    """

    number: int = 0
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: State = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    starts: int = 0
    cancel_requested: bool = False
    slot: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state not in QUEUED_OR_RUNNING


class KeyReused(Exception):
    """An idempotency key came again with another request."""


class QueueFull(Exception):
    """More jobs wait than may."""


class Queue:
    """The jobs of one server.

    Args:
        database: holds them; made with `SCHEMA`.
        max_queued: jobs that may wait.
    """

    def __init__(self, database: Database, *, max_queued: int = 1000) -> None:
        self._database = database
        self._max_queued = max_queued

    def submit(self, new: NewJob) -> Job:
        """Puts a job into the queue; when this returns, it is not lost any more.

        Returns:
            The job, or the earlier one with the same idempotency key.

        Raises:
            KeyReused: that one asked for something else.
            QueueFull: too many wait.
        """
        asked = {item.name: getattr(new, item.name) for item in fields(NewJob)}
        job = Job(**asked)
        with self._database.transaction() as connection:
            earlier = _with_key(connection, new.idempotency_key)
            if earlier is not None:
                if earlier.fingerprint != new.fingerprint:
                    raise KeyReused
                return earlier
            count = "SELECT count(*) FROM jobs WHERE state = 'queued'"
            if connection.execute(count).fetchone()[0] >= self._max_queued:
                raise QueueFull
            values = _as_row(job)
            columns = ", ".join(values)
            marks = ", ".join("?" * len(values))
            connection.execute(
                f"INSERT INTO jobs ({columns}) VALUES ({marks})", tuple(values.values())
            )
        return job

    def find_repeated(self, key: str, fingerprint: str) -> Job | None:
        """The job that came with an idempotency key before.

        Raises:
            KeyReused: it asked for something else.
        """
        row = self._database.row("SELECT * FROM jobs WHERE idempotency_key = ?", (key,))
        if row is not None and row["fingerprint"] != fingerprint:
            raise KeyReused
        return None if row is None else _as_job(row)

    def require_room(self) -> None:
        """Makes sure that one more may wait.

        Raises:
            QueueFull: as many wait as may.
        """
        row = self._database.row("SELECT count(*) FROM jobs WHERE state = 'queued'")
        if row is not None and row[0] >= self._max_queued:
            raise QueueFull

    def find(self, id: str) -> Job | None:
        """The job with this id."""
        row = self._database.row("SELECT * FROM jobs WHERE id = ?", (id,))
        return None if row is None else _as_job(row)

    def position(self, job: Job) -> int:
        """Jobs that go before this one, from 0: preparations wait in a line of their own."""
        row = self._database.row(
            "SELECT count(*) FROM jobs WHERE state = 'queued' AND (kind = 'preparation') = ? AND"
            " (priority, number) < (SELECT priority, number FROM jobs WHERE id = ?)",
            (job.kind == "preparation", job.id),
        )
        assert row is not None
        return int(row[0])

    def listed(
        self, protocol: str, kind: Kind, *, limit: int = 1_000_000, offset: int = 0
    ) -> list[Job]:
        """The jobs of a protocol, newest first."""
        rows = self._database.rows(
            "SELECT * FROM jobs WHERE protocol = ? AND kind = ?"
            " ORDER BY number DESC LIMIT ? OFFSET ?",
            (protocol, kind, limit, offset),
        )
        return [_as_job(row) for row in rows]

    def recent(self, *, limit: int, offset: int = 0) -> list[Job]:
        """The jobs of all protocols, newest first."""
        rows = self._database.rows(
            "SELECT * FROM jobs ORDER BY number DESC LIMIT ? OFFSET ?", (limit, offset)
        )
        return [_as_job(row) for row in rows]

    def waiting(self, kinds: Sequence[Kind] = ("training", "generation")) -> Job | None:
        """The job of these kinds whose turn it is."""
        marks = ", ".join("?" * len(kinds))
        row = self._database.row(
            f"SELECT * FROM jobs WHERE state = 'queued' AND kind IN ({marks})"
            " ORDER BY priority, number LIMIT 1",
            tuple(kinds),
        )
        return None if row is None else _as_job(row)

    def running(self) -> list[Job]:
        """The jobs that were started and are not over."""
        rows = self._database.rows("SELECT * FROM jobs WHERE state = 'running' ORDER BY number")
        return [_as_job(row) for row in rows]

    def late(self, now: float) -> list[Job]:
        """Waiting jobs that should have begun by now, and never have."""
        rows = self._database.rows(
            "SELECT * FROM jobs WHERE state = 'queued' AND started IS NULL AND start_by < ?"
            " ORDER BY number",
            (now,),
        )
        return [_as_job(row) for row in rows]

    def ended_before(self, moment: float) -> list[Job]:
        """Jobs that were over before a moment."""
        rows = self._database.rows("SELECT * FROM jobs WHERE ended < ?", (moment,))
        return [_as_job(row) for row in rows]

    def works(self, *, under_way: bool = False) -> list[str]:
        """What jobs work on that are still known, all or those that are not over."""
        only = " WHERE state IN ('queued', 'running')" if under_way else ""
        return [row[0] for row in self._database.rows(f"SELECT work FROM jobs{only}")]

    def counts(self) -> dict[str, int]:
        """State to the number of jobs."""
        rows = self._database.rows("SELECT state, count(*) FROM jobs GROUP BY state")
        return {row[0]: row[1] for row in rows}

    def start(self, job: Job, slot: str | None = None) -> bool:
        """Marks a waiting job as started; false where it does not wait any more."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "UPDATE jobs SET state = 'running', started = ?, starts = starts + 1, slot = ?"
                " WHERE id = ? AND state = 'queued'",
                (time.time(), slot, job.id),
            )
            if cursor.rowcount == 1:
                # What an earlier start was told, this one has not heard.
                connection.execute("DELETE FROM told WHERE job = ?", (job.id,))
            return cursor.rowcount == 1

    def note_told(self, job: Job, *, at_once: bool) -> None:
        """Remembers, past a restart of the server, that this start of a job was told to end."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO told (job, at_once, moment) VALUES (?, ?, ?)",
                (job.id, at_once, time.time()),
            )

    def told(self, job: Job) -> dict[bool, float]:
        """When this start of a job was told to end: False, with a checkpoint, or True, at once."""
        rows = self._database.rows("SELECT at_once, moment FROM told WHERE job = ?", (job.id,))
        return {bool(row["at_once"]): row["moment"] for row in rows}

    def requeue(self, job: Job, *, counts: bool) -> None:
        """Puts a started job back to its old place.

        Args:
            counts: whether the start counts towards `MAX_STARTS`.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = 'queued', slot = NULL, starts = starts - ?"
                " WHERE id = ? AND state = 'running'",
                (0 if counts else 1, job.id),
            )

    def settle(self, job: Job, ending: Ending) -> None:
        """Ends a job, once and for all; a webhook goes into the outbox in the same moment."""
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, slot = NULL"
                " WHERE id = ? AND state IN ('queued', 'running')",
                (ending, time.time(), job.id),
            )
            if cursor.rowcount == 1 and job.webhook is not None:
                _post(connection, job.id)

    def request_cancel(self, id: str) -> Job | None:
        """Asks for the end of a job: a waiting one is over at once, a running one soon.

        Returns:
            The job as it stood before, nothing where there is none.
        """
        with self._database.transaction() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
            if row is None:
                return None
            job = _as_job(row)
            if job.state == "queued":
                connection.execute(
                    "UPDATE jobs SET state = 'cancelled', ended = ?, cancel_requested = 1"
                    " WHERE id = ?",
                    (time.time(), id),
                )
                if job.webhook is not None:
                    _post(connection, id)
            elif job.state == "running":
                connection.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (id,))
            return job

    def forget(self, ids: Sequence[str]) -> None:
        """Removes jobs that are over."""
        with self._database.transaction() as connection:
            for id in ids:
                connection.execute("DELETE FROM outbox WHERE job = ?", (id,))
                connection.execute(
                    "DELETE FROM jobs WHERE id = ? AND state NOT IN ('queued', 'running')", (id,)
                )
            connection.execute("DELETE FROM told WHERE job NOT IN (SELECT id FROM jobs)")


def _post(connection: sqlite3.Connection, id: str) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO outbox (job, tries, next_try, state) VALUES (?, 0, ?, 'waiting')",
        (id, time.time()),
    )


def _with_key(connection: sqlite3.Connection, key: str | None) -> Job | None:
    if key is None:
        return None
    row = connection.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
    return None if row is None else _as_job(row)


def _as_row(job: Job) -> dict[str, Any]:
    row = {item.name: getattr(job, item.name) for item in fields(job)}
    del row["number"]
    webhook = None if job.webhook is None else json.dumps(dict(job.webhook))
    return {**row, "request": json.dumps(dict(job.request)), "webhook": webhook}


def _as_job(row: sqlite3.Row) -> Job:
    values = dict(row)
    webhook = None if values["webhook"] is None else json.loads(values["webhook"])
    asked_to_end = bool(values["cancel_requested"])
    return Job(
        **{
            **values,
            "request": json.loads(values["request"]),
            "webhook": webhook,
            "cancel_requested": asked_to_end,
        }
    )
