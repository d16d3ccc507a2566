"""Tells receivers of webhooks that jobs are over: what waits in the outbox is sent until taken.

The outbox is a table, so that nothing is forgotten when the server ends; a message may come twice
where it ends at the wrong moment, and never more often than `MOST_TRIES`. What is told, and how it
is signed, is the protocol's own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from trainer.errors import TrainerError
from trainer.fetch import post
from trainer.network import (
    ALLOWED_HOSTS,
    AddressForbidden,
    AddressRefused,
    allowed_hosts,
    checked_url,
    is_public,
    shown_url,
)
from trainer.server.database import Database
from trainer.server.protocols import WireProtocol, protocol_named
from trainer.server.queue import Job
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop

# Seconds from a failed try to the next: as soon as one service promises at first, then as long as
# another does, within two hours in all.
WAITS = (1, 5, 30, 120, 300, 600, 1200, 1800, 3000)
MOST_TRIES = len(WAITS) + 1

_AT_A_TIME = 8
# A receiver that does not answer holds up no other.
_AT_A_TIME_TO_ONE = 2
_LOOK_SECONDS = 0.25
_LONGEST_URL = 2000
# Stays below what receivers take as a rule; results are links.
_LONGEST_BODY = 2**20

log = logging.getLogger("trainer.server.webhooks")

Post = Callable[[str, bytes, Mapping[str, str]], int]


class _Unsendable(Exception):
    """A message that cannot be sent, now or later."""


class Outbox:
    """The messages of one server.

    Args:
        database: has the table `outbox`, see `queue.SCHEMA`.
        workshop: of the server.
        protocol: finds a protocol by its name.
        send: posts a message and gives the status of the answer.
        waits: seconds from each failed try to the next.
    """

    def __init__(
        self,
        database: Database,
        workshop: Workshop,
        *,
        protocol: Callable[[str], WireProtocol] = protocol_named,
        send: Post = post,
        waits: tuple[float, ...] = WAITS,
    ) -> None:
        self._database = database
        self._workshop = workshop
        self._protocol = protocol
        self._send = send
        self._waits = waits
        self._lock = threading.Lock()
        self._under_way: dict[str, str] = {}

    async def run(self) -> None:
        """Sends what waits, until cancelled."""
        await asyncio.to_thread(self._give_up_the_exhausted)
        while True:
            await asyncio.to_thread(self._hand_over)
            await asyncio.sleep(_LOOK_SECONDS)

    def _hand_over(self) -> None:
        """Begins to send what is due, first tries first."""
        try:
            # What is under way is looked at in the same moment: nothing is sent twice.
            with self._lock:
                self._begin(self._due())
        except sqlite3.Error as error:
            log.error("the outbox cannot be read: %s", error)

    def _due(self) -> list[sqlite3.Row]:
        return self._database.rows(
            "SELECT outbox.job, outbox.tries, jobs.webhook FROM outbox JOIN jobs"
            " ON jobs.id = outbox.job WHERE outbox.state = 'waiting' AND next_try <= ?"
            " ORDER BY outbox.tries, next_try",
            (time.time(),),
        )

    def _begin(self, due: Sequence[sqlite3.Row]) -> None:
        busy = Counter(self._under_way.values())
        for row in due:
            receiver = urlsplit(json.loads(row["webhook"])["url"]).netloc
            if len(self._under_way) >= _AT_A_TIME:
                return
            if row["job"] in self._under_way or busy[receiver] >= _AT_A_TIME_TO_ONE:
                continue
            busy[receiver] += 1
            self._under_way[row["job"]] = receiver
            # A daemon: a receiver that takes its time does not keep the server from ending.
            threading.Thread(
                target=self._work, args=(row["job"], row["tries"] + 1), daemon=True
            ).start()

    def _work(self, id: str, tries: int) -> None:
        try:
            self._deliver(id, tries)
        except (sqlite3.Error, TrainerError, OSError) as error:
            log.error("webhook of %s: %s", id, error)
        finally:
            with self._lock:
                del self._under_way[id]

    def _deliver(self, id: str, tries: int) -> None:
        job = self._workshop.queue.find(id)
        if job is None or job.webhook is None:
            return
        last = tries > len(self._waits)
        again = time.time() + (0 if last else self._waits[tries - 1])
        # Counted before: a server that ends in the middle of every try comes to an end with it.
        self._note(job.id, tries, again, "waiting")
        state, told = self._outcome(job, last)
        if state == "waiting":
            again = time.time() + self._waits[tries - 1]
        self._note(job.id, tries, again, state)
        if told:
            log.warning(
                "webhook of %s to %s, try %d of %d: %s; %s",
                *(job.id, shown_url(job.webhook["url"]), tries, len(self._waits) + 1),
                *(told, "tried again later" if state == "waiting" else "given up"),
            )

    def _outcome(self, job: Job, last: bool) -> tuple[str, str]:
        """The state after a try, and what is wrong."""
        try:
            status = self._posted(job)
        except AddressForbidden as error:
            return "given_up", f"{error.reason} ({error.hint})"
        except _Unsendable as error:
            return "given_up", str(error)
        except AddressRefused as error:
            return "given_up" if last else "waiting", error.reason
        if 200 <= status < 300:
            return "delivered", ""
        return "given_up" if last else "waiting", f"the receiver answers with HTTP {status}"

    def _posted(self, job: Job) -> int:
        assert job.webhook is not None
        protocol = self._protocol(job.protocol)
        told = protocol.announced(job, self._workshop)
        body = json.dumps(told, separators=(",", ":")).encode()
        if len(body) > _LONGEST_BODY:
            raise _Unsendable(f"the message is longer than {_LONGEST_BODY >> 20} MiB")
        signed = protocol.signed(job, body, self._workshop)
        headers = {"Content-Type": "application/json", **signed}
        return self._send(job.webhook["url"], body, headers)

    def _note(self, job: str, tries: int, next_try: float, state: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE outbox SET tries = ?, next_try = ?, state = ? WHERE job = ?",
                (tries, next_try, state, job),
            )

    def _give_up_the_exhausted(self) -> None:
        """Ends what was in its last try when the server ended."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE outbox SET state = 'given_up' WHERE state = 'waiting' AND tries > ?",
                (len(self._waits),),
            )


def checked_webhook(url: str, field: str) -> str:
    """An address that a message may go to, as far as its text says; names are looked up later.

    Args:
        field: the request's own name for it.

    Raises:
        Refusal: it may not.
    """
    hint = "give a public http:// or https:// address"
    if len(url) > _LONGEST_URL:
        raise Refusal.of(field, f"is longer than {_LONGEST_URL} characters", hint)
    try:
        host = checked_url(url).host.lower().rstrip(".")
    except AddressForbidden as error:
        raise Refusal.of(field, f"got `{shown_url(url)}`: {error.reason}", hint) from error
    if host not in allowed_hosts() and _is_private(host):
        raise Refusal.of(
            field,
            f"got `{shown_url(url)}`: `{host}` is not on the public internet",
            f"{hint}; the owner of the server can name the host in {ALLOWED_HOSTS}",
        )
    return url


def _is_private(host: str) -> bool:
    """Whether a host says by itself that it is none of the public ones."""
    with suppress(ValueError):
        return not is_public(str(ip_address(host)))
    return host == "localhost" or host.endswith(".localhost")
