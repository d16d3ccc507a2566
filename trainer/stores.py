"""The store that processes of one training share, asked without waiting for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

# Of the time that a call may take.
_PARTS = 10


class LimitedStore:
    """A store whose calls end: by itself, one waits as long as the network does for an answer.

    Args:
        store: that nobody else uses.
        seconds: that a call may take; until one that takes longer ends, others fail at once.
    """

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._late: Future[Any] | None = None
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Puts a value under a key."""
        self._answer(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self._answer(lambda: self._store.get(key))

    def check(self, key: str) -> bool:
        """Whether a key is there."""
        return self._answer(lambda: bool(self._store.check([key])))

    def put_first(self, key: str, value: str) -> bytes:
        """Puts a value under a key unless there is one, and gives the one that is there."""
        return self._answer(lambda: self._store.compare_set(key, "", value))

    def _serve(self) -> None:
        while True:
            self._calls.get()()

    def _answer(self, call: Callable[[], Value]) -> Value:
        if self._late is not None and not self._late.done():
            raise DistError("it still does not answer")
        future: Future[Value] = Future()

        def attempt() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(attempt)
        # Counted in parts: a wait that was suspended with the process is over, by the clock.
        for _ in range(_PARTS):
            with suppress(TimeoutError):
                return future.result(self._seconds / _PARTS)
        self._late = future
        raise DistError(f"no answer within {self._seconds:.0f} s")
