"""Tickets for what a browser fetches without a key: random, for one thing, for a while."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

TICKET_SECONDS = 3600.0
_MOST = 1000


class Tickets:
    """The tickets of one server; a restart forgets them."""

    def __init__(self) -> None:
        self._given: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._lock = threading.Lock()

    def give(self, thing: str) -> str:
        """A ticket for a thing, good for `TICKET_SECONDS`."""
        ticket = secrets.token_hex(16)
        with self._lock:
            self._given[ticket] = (time.monotonic() + TICKET_SECONDS, thing)
            if len(self._given) > _MOST:
                self._given.popitem(last=False)
        return ticket

    def thing(self, ticket: str) -> str | None:
        """What a ticket is for, as long as it is good."""
        with self._lock:
            until, thing = self._given.get(ticket, (0.0, ""))
        return thing if time.monotonic() < until else None
