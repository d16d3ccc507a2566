"""Memory for large bodies, and time for those who read: nobody holds what others need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from trainer.server.security import Guard, body_is_done
from trainer.server.settings import MEBIBYTE, ServerSettings
from trainer.server.throttling import Memory

LARGE = 3 * MEBIBYTE
PIECE = bytes(MEBIBYTE // 2)


class Bodies:
    """An application that reads bodies and holds them until it is told to answer."""

    def __init__(self, *, early: bool = False) -> None:
        self.whole: list[str] = []
        self.answer = asyncio.Event()
        self._early = early

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await request.body()
        self.whole.append(request.url.path)
        if self._early:
            body_is_done(request)
        await self.answer.wait()
        await Response()(scope, receive, send)


def asked(guard: Guard, path: str, size: int, *, declared: bool = True) -> asyncio.Task[int]:
    """A request with a body under way, which ends with its status."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if declared:
        headers.append((b"content-length", str(size).encode()))
    scope = {
        **{"type": "http", "method": "POST", "path": path, "query_string": b"", "scheme": "http"},
        **{"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8700)},
    }
    left = size
    statuses: list[int] = []

    async def receive() -> Message:
        nonlocal left
        await asyncio.sleep(0)
        piece = PIECE[:left]
        left -= len(piece)
        return {"type": "http.request", "body": piece, "more_body": left > 0}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def work() -> int:
        await guard(scope, receive, send)
        return statuses[0]

    return asyncio.create_task(work())


async def settle() -> None:
    """Lets everything go on that can."""
    for _ in range(100):
        await asyncio.sleep(0)


def guard(app: Any, **given: Any) -> Guard:
    return Guard(app, ServerSettings(data=Path("unused"), max_body_mib=4, **given))


def run(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_large_bodies_wait_until_there_is_memory_and_small_ones_do_not() -> None:
    async def work() -> None:
        app = Bodies()
        # So short a patience is over before the third body comes to its end.
        guarded = guard(app, client_seconds=0.05)
        # Two of the largest may be there: 8 MiB.
        tasks = [asked(guarded, f"/{number}", LARGE) for number in range(3)]
        tasks.append(asked(guarded, "/small", MEBIBYTE))
        await settle()
        assert sorted(app.whole) == ["/0", "/1", "/small"]
        await asyncio.sleep(0.1)
        app.answer.set()
        assert await asyncio.gather(*tasks) == [200] * 4

    run(work())


def test_a_body_whose_size_is_not_told_counts_as_the_largest() -> None:
    async def work() -> None:
        app = Bodies()
        guarded = guard(app)
        first = asked(guarded, "/1", LARGE, declared=False)
        second = asked(guarded, "/2", LARGE)
        third = asked(guarded, "/3", 2 * MEBIBYTE)
        await settle()
        assert sorted(app.whole) == ["/1", "/2"], "4 and 3 MiB of 8"
        app.answer.set()
        await asyncio.gather(first, second, third)

    run(work())


def test_an_answer_that_takes_long_does_not_hold_the_memory_of_its_body() -> None:
    async def work() -> None:
        app = Bodies(early=True)
        guarded = guard(app)
        tasks = [asked(guarded, f"/{number}", LARGE) for number in range(4)]
        await settle()
        assert len(app.whole) == 4
        app.answer.set()
        await asyncio.gather(*tasks)

    run(work())


def test_memory_is_given_in_turn_and_who_leaves_makes_room() -> None:
    async def work() -> None:
        memory, order = Memory(10), list[int]()

        async def take(size: int) -> None:
            order.append(await memory.take(size))

        held = await memory.take(7)
        tasks = [asyncio.create_task(take(size)) for size in (8, 3, 99)]
        await settle()
        assert order == [], "3 would fit, and comes after 8"
        tasks[0].cancel()
        await settle()
        assert order == [3]
        memory.give_back(held)
        await settle()
        assert order == [3]
        memory.give_back(3)
        await settle()
        assert order == [3, 10], "more than all is all"
        memory.give_back(10)
        assert await memory.take(10) == 10

    run(work())


class Sending:
    """An application that sends pieces of so many bytes, and counts those that went out."""

    def __init__(self, pieces: int, size: int = 10, pause: float = 0.0) -> None:
        self._pieces, self._size, self._pause = pieces, size, pause
        self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self._pieces):
            await asyncio.sleep(self._pause)
            body = bytes(self._size)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.sent += 1


async def read(app: Sending, *seconds: float) -> None:
    """Takes so long over the head and each piece of an answer, and for all others no time."""
    left = list(seconds)
    scope = {
        **{"type": "http", "method": "GET", "path": "/files/1", "query_string": b""},
        **{"headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "scheme": "http"},
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        await asyncio.sleep(left.pop(0) if left else 0)

    await guard(app, client_seconds=0.2)(scope, receive, send)


def test_who_does_not_read_is_left_and_who_reads_slowly_or_is_told_slowly_is_not() -> None:
    stalled, slow, streamed = Sending(5, 100), Sending(2, 500), Sending(30, pause=0.01)
    head = Sending(1)

    async def work() -> None:
        await asyncio.gather(
            read(stalled, 0, 0, 60),
            read(slow, 0, 0.5, 0.5),
            read(streamed),
            read(head, 60),
        )

    run(work())

    assert (stalled.sent, slow.sent, streamed.sent, head.sent) == (1, 2, 30, 0)
