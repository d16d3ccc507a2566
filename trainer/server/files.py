"""Files that clients upload and fetch: known by random ids, whatever they are called.

An upload is expected first, under a token that is good once and for a while; result files are
registered where they lie. Names are for people only: nothing is ever found by one. Nor does the
place of a file tell its id, by which anybody may fetch it: places stand in configurations.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool

from trainer.durable import disk_errors, publish_file, sync_folder
from trainer.job import ResultFile
from trainer.server.database import Database
from trainer.server.room import Room

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY,
    path TEXT NOT NULL,
    name TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    job TEXT,
    role TEXT,
    created REAL NOT NULL,
    token TEXT,
    expires REAL
);
CREATE INDEX IF NOT EXISTS files_of_job ON files (job);
"""

UPLOAD_SECONDS = 3600.0
OTHER_CONTENT = "application/octet-stream"
_LONGEST_NAME = 120
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_CONTENT_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")
_BUFFER = 2**20
_KEPT: ContextVar[list[Path] | None] = ContextVar("contents kept for a request", default=None)


@dataclass(frozen=True)
class StoredFile:
    """A file that can be fetched, or is expected.

    Args:
        id: 32 random hexadecimal digits.
        path: where it lies, or will.
        name: what it is called, safe in an address.
        content_type: MIME type.
        size: in bytes.
        job: the job whose result it belongs to.
        role: what it is among that job's results.
        is_expected: whether its content is still to come.
    """

    id: str
    path: Path
    name: str
    content_type: str
    size: int
    job: str | None = None
    role: str | None = None
    is_expected: bool = False

    @property
    def address(self) -> str:
        """Its path on the server."""
        return f"/files/{self.id}/{quote(self.name)}"


class TooLarge(Exception):
    """More came than may."""


class NotExpected(Exception):
    """Nothing is expected under this id and token any more."""


class FileStore:
    """The files of one server.

    Args:
        database: holds what is known of them; made with `SCHEMA`.
        folder: of uploads; made when missing.
        room: what comes is counted there.
    """

    def __init__(self, database: Database, folder: Path, room: Room | None = None) -> None:
        self._database = database
        self._folder = folder
        self._room = room or Room()
        self._contents = _Contents()
        with disk_errors(folder, "--data"):
            folder.mkdir(parents=True, exist_ok=True)

    def expect(self, name: str, content_type: str) -> tuple[StoredFile, str]:
        """Makes place for an upload.

        Returns:
            The file to be, and the token under which its content is taken, once, within
            `UPLOAD_SECONDS`.
        """
        token = secrets.token_urlsafe(24)
        file = self._new(name, content_type, is_expected=True)
        self._insert([(file, _digest(token), time.time() + UPLOAD_SECONDS)])
        return file, token

    def is_expected(self, id: str, token: str) -> bool:
        """Whether content may come under this id with this token."""
        row = self._database.row("SELECT token, expires FROM files WHERE id = ?", (id,))
        if row is None or row["token"] is None or row["expires"] < time.time():
            return False
        return hmac.compare_digest(row["token"], _digest(token))

    async def take(
        self,
        id: str,
        token: str,
        chunks: AsyncIterator[bytes],
        *,
        limit: int,
        content_type: str | None = None,
    ) -> StoredFile:
        """Writes an expected upload as it comes; it is there as a whole or not at all.

        Args:
            limit: bytes.
            content_type: replaces what was announced.

        Raises:
            NotExpected: wrong or used token, or too late.
            TooLarge: more bytes than the limit.
            Refusal: the data folder may not have them.
            DiskError: no room.
        """
        if not await run_in_threadpool(self.is_expected, id, token):
            raise NotExpected
        temporary = self.temporary()
        try:
            size = await self.write(temporary, chunks, limit)
            try:
                return await run_in_threadpool(
                    self._arrived, id, token, temporary, size, content_type
                )
            except BaseException:
                self._room.give_back(size)
                raise
        finally:
            temporary.unlink(missing_ok=True)

    async def write(self, path: Path, chunks: AsyncIterator[bytes], limit: int) -> int:
        """Writes what comes to a temporary file, which goes again unless all of it comes.

        Returns:
            Its size in bytes.

        Raises:
            TooLarge: more bytes than the limit.
            Refusal: the data folder may not have them.
            DiskError: no room.
        """
        size = 0
        try:
            # Unbuffered: a full disk shows where the bytes are counted.
            with disk_errors(path, "--data"), open(path, "wb", buffering=0) as file:
                pending = bytearray()
                async for chunk in chunks:
                    if size + len(chunk) > limit:
                        raise TooLarge
                    self._room.take(len(chunk))
                    size += len(chunk)
                    pending += chunk
                    if len(pending) >= _BUFFER:
                        await run_in_threadpool(_write_whole, file.fileno(), bytes(pending))
                        pending.clear()
                await run_in_threadpool(_write_whole, file.fileno(), bytes(pending))
                # Before any transaction that waits for it.
                await run_in_threadpool(os.fsync, file.fileno())
        except BaseException:
            self.remove(path, size)
            raise
        return size

    def remove(self, path: Path, size: int) -> None:
        """Removes a file that `write` wrote."""
        path.unlink(missing_ok=True)
        self._room.give_back(size)

    @contextmanager
    def for_one_request(self) -> Iterator[None]:
        """A block whose failure takes with it what it kept, unless another request has it too."""
        token = _KEPT.set(kept := list[Path]())
        is_taken = False
        try:
            yield
            is_taken = True
        finally:
            _KEPT.reset(token)
            for path in kept:
                self._let_go(path, is_taken=is_taken)

    def keep(self, content: bytes, name: str) -> Path:
        """Keeps content that stood in a request; the same content once.

        Raises:
            Refusal: the data folder may not have it.
            DiskError: no room.
        """
        path = self._folder / f"sha256-{hashlib.sha256(content).hexdigest()}"
        kept = _KEPT.get()
        with self._contents.lock:
            if path.exists():
                self._touch(path)
            else:
                self._write_content(content, path, name)
                if kept is not None:
                    self._contents.fresh.add(path)
            if kept is not None:
                self._contents.holders[path] += 1
                kept.append(path)
        return path

    def register(self, job: str, root: Path, results: Iterable[ResultFile]) -> None:
        """Makes the result files of a job fetchable; those that are already stay as they are."""
        known = {file.path for file in self.of_job(job)}
        new = [
            self._new(
                result.path.rsplit("/", maxsplit=1)[-1],
                result.content_type,
                path=root / result.path,
                size=result.size,
                job=job,
                role=result.role,
            )
            for result in results
            if root / result.path not in known
        ]
        self._insert([(file, None, None) for file in new])

    def find(self, id: str) -> StoredFile | None:
        """The file with this id, expected or there."""
        row = self._database.row("SELECT * FROM files WHERE id = ?", (id,))
        return None if row is None else _as_file(row)

    def of_job(self, job: str) -> list[StoredFile]:
        """The result files of a job, in their order."""
        rows = self._database.rows("SELECT * FROM files WHERE job = ? ORDER BY rowid", (job,))
        return [_as_file(row) for row in rows]

    def forget_job(self, job: str) -> None:
        """Forgets the result files of a job; they themselves are not touched."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM files WHERE job = ?", (job,))

    def remove_uploads_before(self, moment: float, *, used: Sequence[str]) -> int:
        """Removes uploads from before a moment that no job's work speaks of.

        Args:
            used: the works of jobs that are still there.

        Returns:
            How many.
        """
        rows = self._database.rows(
            "SELECT * FROM files WHERE job IS NULL AND created < ?", (moment,)
        )
        old = [file for file in map(_as_file, rows) if not any(str(file.path) in w for w in used)]
        with self._database.transaction() as connection:
            for file in old:
                connection.execute("DELETE FROM files WHERE id = ?", (file.id,))
        for file in old:
            file.path.unlink(missing_ok=True)
            if file.path.parent != self._folder:
                with suppress(OSError):
                    file.path.parent.rmdir()
        return len(old)

    def temporary(self) -> Path:
        """A path in the folder of uploads that nobody else has."""
        return self._folder / f".tmp-{secrets.token_hex(16)}"

    def sweep(self) -> None:
        """Removes what uploads left that a crash cut off."""
        for path in self._folder.glob(".tmp-*"):
            path.unlink(missing_ok=True)

    def _new(
        self,
        name: str,
        content_type: str,
        *,
        path: Path | None = None,
        size: int = 0,
        job: str | None = None,
        role: str | None = None,
        is_expected: bool = False,
    ) -> StoredFile:
        id, safe = secrets.token_hex(16), safe_name(name)
        kind = content_type if _CONTENT_TYPE.fullmatch(content_type) else OTHER_CONTENT
        place = path or self._folder / secrets.token_hex(16) / safe
        return StoredFile(id, place, safe, kind, size, job, role, is_expected)

    def _insert(self, files: Sequence[tuple[StoredFile, str | None, float | None]]) -> None:
        now = time.time()
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO files (id, path, name, content_type, size, job, role, created, token,"
                " expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(file.id, str(file.path), file.name, file.content_type, file.size),
                        *(file.job, file.role, now, token, expires),
                    )
                    for file, token, expires in files
                ],
            )

    def _arrived(
        self, id: str, token: str, temporary: Path, size: int, content_type: str | None
    ) -> StoredFile:
        """Gives an upload its place, unless another one under the same token came before.

        Raises:
            NotExpected: one did.
        """
        file = self.find(id)
        with self._database.transaction() as connection:
            cursor = connection.execute(
                "UPDATE files SET token = NULL, expires = NULL, size = ?,"
                " content_type = coalesce(?, content_type) WHERE id = ? AND token = ?",
                (size, content_type, id, _digest(token)),
            )
            if cursor.rowcount != 1 or file is None:
                raise NotExpected
            with disk_errors(file.path, "--data"):
                file.path.parent.mkdir(exist_ok=True)
                os.replace(temporary, file.path)
            sync_folder(file.path.parent)
            sync_folder(self._folder)
        return replace(
            file, size=size, is_expected=False, content_type=content_type or file.content_type
        )

    def _write_content(self, content: bytes, path: Path, name: str) -> None:
        temporary = self.temporary()
        self._room.take(len(content))
        try:
            with disk_errors(path, "--data"):
                temporary.write_bytes(content)
            publish_file(temporary, path)
        except BaseException:
            self.remove(temporary, len(content))
            raise
        file = self._new(name, OTHER_CONTENT, path=path, size=len(content))
        self._insert([(file, None, None)])

    def _let_go(self, path: Path, *, is_taken: bool) -> None:
        contents = self._contents
        with contents.lock:
            contents.holders[path] -= 1
            if is_taken:
                contents.fresh.discard(path)
            if contents.holders[path] == 0:
                del contents.holders[path]
                if path in contents.fresh:
                    contents.fresh.remove(path)
                    self._forget(path)

    def _touch(self, path: Path) -> None:
        """Makes content as young as the request that has it once more."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE files SET created = ? WHERE path = ?", (time.time(), str(path))
            )

    def _forget(self, path: Path) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM files WHERE path = ?", (str(path),))
        self.remove(path, path.stat().st_size)


@dataclass
class _Contents:
    """Contents that requests under way have kept.

    Args:
        lock: for whoever keeps or lets go.
        holders: how many requests under way have each.
        fresh: those that none has been taken with.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    holders: Counter[Path] = field(default_factory=Counter)
    fresh: set[Path] = field(default_factory=set)


def safe_name(name: str) -> str:
    """A file name that means nothing to any system but itself."""
    last = name.replace("\\", "/").rsplit("/", maxsplit=1)[-1]
    kept = _NOT_IN_NAME.sub("-", last).lstrip(".-")[-_LONGEST_NAME:].lstrip(".-")
    return kept or "file"


def _write_whole(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _as_file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(
        id=row["id"],
        path=Path(row["path"]),
        name=row["name"],
        content_type=row["content_type"],
        size=row["size"],
        job=row["job"],
        role=row["role"],
        is_expected=row["token"] is not None,
    )
