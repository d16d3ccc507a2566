"""How much the data folder may grow: measured now and then, counted in between."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trainer.server.refusals import Refusal


class Room:
    """What may still be added to the data folder.

    Args:
        limit: bytes that it may have. None: any number.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._taken = 0
        self.used = 0

    def require(self) -> None:
        """Makes sure that something may be added.

        Raises:
            Refusal: nothing may.
        """
        if self._limit is not None and self.used >= self._limit:
            raise _no_room()

    def take(self, size: int) -> None:
        """Counts bytes before they are written.

        Raises:
            Refusal: so many may not be added; none is counted.
        """
        with self._lock:
            if self._limit is not None and self.used + size > self._limit:
                raise _no_room()
            self.used += size
            self._taken += size

    def give_back(self, size: int) -> None:
        """Counts bytes that are not there any more."""
        with self._lock:
            self.used = max(0, self.used - size)
            self._taken -= size

    def measure(self, size_of_folder: Callable[[], int]) -> None:
        """Counts anew; what is written meanwhile counts once or twice until the next time."""
        before = self._taken
        size = size_of_folder()
        with self._lock:
            self.used = max(0, size + max(0, self._taken - before))


def _no_room() -> Refusal:
    return Refusal("no_room", "the server's data folder has the size that its owner allows")
