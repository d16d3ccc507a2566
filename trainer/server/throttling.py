"""How much clients may take: requests in a time, bytes of a body, memory, time to send and read."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from starlette.types import Message, Receive, Send

from trainer.server.refusals import Refusal

BURST = 4
# A body that comes a byte now and then would hold its connection for ever: it is waited for longer
# than there is patience only while so much comes in each second, on average.
LEAST_BYTES_PER_SECOND = 1000
# Bodies up to this many bytes may come in any number.
SMALL_BODY = 2**20
_REMEMBERED = 4096


class Rates:
    """A bucket of tokens for every client: refilled at a lasting rate, emptied by requests.

    Args:
        rate: requests in a second that may go on for ever.
        clock: seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = max(1.0, BURST * rate)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Counts a request.

        Raises:
            Refusal: too many came; with the time to wait.
        """
        now = self._clock()
        filled, at = self._buckets.get(client, (self._burst, now))
        filled = min(self._burst, filled + (now - at) * self._rate)
        if filled < 1:
            seconds = math.ceil((1 - filled) / self._rate)
            message = f"more than {self._rate:g} requests a second; go on in {seconds} s"
            raise Refusal("too_many", message, headers={"Retry-After": str(seconds)})
        self._buckets[client] = (filled - 1, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > _REMEMBERED:
            self._buckets.popitem(last=False)


class Memory:
    """Bytes that large bodies may have together; who wants more waits until others are done.

    Args:
        size: in bytes; more than that for one is taken for all of it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> int:
        """Waits for its turn.

        Returns:
            The bytes to `give_back`.
        """
        size = min(size, self._size)
        if self._free >= size and not self._waiting:
            self._free -= size
            return size
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            else:
                self._waiting.remove((size, turn))
                self.give_back(0)
            raise
        return size

    def give_back(self, size: int) -> None:
        """Lets those go on whose turn it is, in their order."""
        self._free += size
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= wanted
                turn.set_result(None)


class MeasuredBody:
    """A request's body as it comes: not more than may, not slower, and with memory to be in.

    Args:
        receive: gives its pieces.
        limit: bytes.
        patience: seconds that it may be waited for in any case.
        memory: that a body over `SMALL_BODY` needs. None: it is not kept in memory.
        declared: its bytes, where the client says so.
    """

    def __init__(
        self,
        receive: Receive,
        limit: int,
        patience: float,
        *,
        memory: Memory | None = None,
        declared: int = 0,
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._patience = patience
        self._memory = memory
        self._declared = declared
        self._held: int | None = None
        self._received = 0
        self._waited = 0.0
        self._is_whole = False

    async def __call__(self) -> Message:
        """The next piece, or what comes after the last one.

        Raises:
            Refusal: it is too much, or comes too slowly.
        """
        if self._is_whole:
            return await self._receive()
        message = await self._awaited()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise too_large(self._limit)
        self._is_whole = not message.get("more_body", False)
        if self._memory is not None and self._held is None and self._received > SMALL_BODY:
            # The server's own waiting is not the client's.
            self._held = await self._memory.take(self._declared or self._limit)
        return message

    def done(self) -> None:
        """Gives back the memory: nothing of the body is needed any more."""
        if self._memory is not None and self._held is not None:
            self._memory.give_back(self._held)
            self._memory = None

    async def _awaited(self) -> Message:
        earned = self._received / LEAST_BYTES_PER_SECOND
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(self._patience, earned) - self._waited):
                return await self._receive()
        except TimeoutError:
            # 408 would make clients try the same again.
            message = f"the body comes slower than {LEAST_BYTES_PER_SECOND} bytes a second"
            raise Refusal("malformed", message, headers={"Connection": "close"}) from None
        finally:
            # Only the client's time counts, not that of the disk.
            self._waited += time.monotonic() - began


class TooSlow(OSError):
    """A client does not read what it asked for: as good as a connection that is gone."""


class MeasuredAnswer:
    """The way to a client, who must read: no piece of an answer slower than bodies must come.

    Only the time in which nothing can be sent counts: an answer that itself comes slowly, such as a
    stream of statuses, may take as long as it likes. What was sent before earns nothing, since the
    system takes megabytes for a client that reads none of them.

    Args:
        send: to the client.
        patience: seconds that it may be waited for in any case.
    """

    def __init__(self, send: Send, patience: float) -> None:
        self._send = send
        self._patience = patience

    async def __call__(self, message: Message) -> None:
        """Passes a message on.

        Raises:
            TooSlow: the client reads too slowly.
        """
        seconds = len(message.get("body", b"")) / LEAST_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(self._patience + seconds):
                await self._send(message)
        except TimeoutError:
            raise TooSlow from None


def too_large(limit: int) -> Refusal:
    """The refusal of a body over a limit in bytes."""
    size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit} bytes"
    return Refusal("too_large", f"the body is larger than {size}", headers={"Connection": "close"})
