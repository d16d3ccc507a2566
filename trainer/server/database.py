"""One SQLite file that every thread of the server reads and writes; durable when it returns.

Write-ahead log with full synchronisation: what was committed survives a crash of the machine.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import DiskError

_WAIT_SECONDS = 30
# What SQLite says where there is no room or no right to write.
_DISK = ("full", "readonly", "disk i/o", "unable to open")


class Database:
    """A file with tables.

    Args:
        path: of the file; made when missing.
        schema: SQL that makes what is not there yet.

    Raises:
        DiskError: it cannot be made.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self._path = path
        self._local = threading.local()
        self._writing = threading.Lock()
        with _disk_errors(path):
            self._connection().executescript(schema)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside is written together, or not at all.

        Raises:
            DiskError: it cannot be written.
        """
        with self._writing, _disk_errors(self._path):
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """What a query finds."""
        return self._connection().execute(sql, values).fetchall()

    def row(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row that a query finds."""
        found: sqlite3.Row | None = self._connection().execute(sql, values).fetchone()
        return found

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            self._local.connection = connection
        return connection


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if any(word in str(error).lower() for word in _DISK):
            message = f"`{path}` cannot be written: {error}"
            raise DiskError(message, "make room, or give another --data") from error
        raise
