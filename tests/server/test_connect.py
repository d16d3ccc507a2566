"""The CONNECT proxy: to the services' names alone, whole, and not for clients that dawdle."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import pytest

from trainer.server.connect import Limits, serve_connect

T = TypeVar("T")
HOSTS = {"queue.fal.run", "api.novita.ai"}
HELLO = b"CONNECT queue.fal.run:443 HTTP/1.1\r\nHost: queue.fal.run:443\r\n\r\n"
Handler = Callable[[StreamReader, StreamWriter], Awaitable[None]]
Dial = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]


async def echo(reader: StreamReader, writer: StreamWriter) -> None:
    """A server behind the proxy: says back what it hears, and ends when the client does."""
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()
    writer.write(b"<end>")
    writer.close()


@asynccontextmanager
async def proxy(limits: Limits | None = None, behind: Handler = echo) -> AsyncIterator[Dial]:
    """A running proxy before a server; gives a function that connects to it."""
    stop, found = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(behind, "127.0.0.1", 0)
    target = server.sockets[0].getsockname()[:2]
    service = asyncio.create_task(
        serve_connect(("127.0.0.1", 0), target, HOSTS, stop, limits=limits, ready=found.set_result)
    )
    address = await found
    opened: list[StreamWriter] = []

    async def dial() -> tuple[StreamReader, StreamWriter]:
        reader, writer = await asyncio.open_connection(*address)
        opened.append(writer)
        return reader, writer

    try:
        yield dial
    finally:
        stop.set()
        await asyncio.wait_for(service, 5)
        server.close()
        for writer in opened:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in opened), return_exceptions=True)


def run(work: Awaitable[T]) -> T:
    """Runs it to its end, which must come soon."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, 10)

    return asyncio.run(bounded())


async def answer_to(request: bytes, limits: Limits | None = None) -> bytes:
    """All that a new proxy says to a request."""
    async with proxy(limits) as dial:
        reader, writer = await dial()
        writer.write(request)
        return await reader.read()


def test_a_tunnel_carries_bytes_both_ways_and_an_answer_may_outlast_the_question() -> None:
    sent = bytes(range(256)) * 4096

    async def work() -> tuple[bytes, bytes]:
        async with proxy() as dial:
            reader, writer = await dial()
            writer.write(HELLO)
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            writer.write_eof()
            return head, await reader.read()

    head, received = run(work())

    assert head == b"HTTP/1.1 200 Connection established\r\n\r\n"
    assert received == sent + b"<end>"


def test_what_a_client_sends_right_behind_its_request_goes_through() -> None:
    async def work() -> bytes:
        async with proxy() as dial:
            reader, writer = await dial()
            writer.write(HELLO + b"hello")
            await reader.readuntil(b"\r\n\r\n")
            return await reader.readexactly(5)

    assert run(work()) == b"hello"


@pytest.mark.parametrize(
    "request_line",
    ["CONNECT API.Novita.ai:443 HTTP/1.1", "CONNECT api.novita.ai.:443 HTTP/1.0"],
)
def test_a_name_is_the_same_in_capitals_and_with_its_last_dot(request_line: str) -> None:
    async def work() -> bytes:
        async with proxy() as dial:
            reader, writer = await dial()
            writer.write(f"{request_line}\r\n\r\n".encode())
            return await reader.readline()

    assert b" 200 " in run(work())


@pytest.mark.parametrize(
    ("request_line", "status", "said"),
    [
        ("CONNECT example.org:443 HTTP/1.1", 403, "example.org is not a service"),
        ("CONNECT evil.queue.fal.run:443 HTTP/1.1", 403, "is not a service"),
        ("CONNECT 127.0.0.1:443 HTTP/1.1", 403, "127.0.0.1 is not a service"),
        ("CONNECT [::1]:443 HTTP/1.1", 403, "::1 is not a service"),
        ("CONNECT queue.fal.run:22 HTTP/1.1", 403, "port 22 is not let through"),
        ("GET http://queue.fal.run/ HTTP/1.1", 403, "only CONNECT"),
        ("GET / HTTP/1.1", 403, "only CONNECT"),
        ("CONNECT queue.fal.run HTTP/1.1", 400, "a host and a port"),
        ("CONNECT a\x0bb:443 HTTP/1.1", 400, "not a request"),
        ("\x16\x03\x01 TLS at once", 400, "not a request"),
    ],
)
def test_anything_else_is_refused_with_the_reason_in_status_line_and_body(
    request_line: str, status: int, said: str
) -> None:
    head, _, body = run(answer_to(f"{request_line}\r\n\r\n".encode())).partition(b"\r\n\r\n")

    first = head.partition(b"\r\n")[0].decode()
    assert first.startswith(f"HTTP/1.1 {status} ")
    assert said in first
    assert said in body.decode()


def test_headers_without_end_are_refused() -> None:
    endless = b"CONNECT queue.fal.run:443 HTTP/1.1\r\nX: " + b"x" * 40_000

    assert run(answer_to(endless)).startswith(b"HTTP/1.1 431 ")


def test_a_client_that_never_finishes_its_request_is_cut_off() -> None:
    said = run(answer_to(b"CONNECT queue.f", Limits(request_seconds=0.1)))

    assert said.startswith(b"HTTP/1.1 408 ")


def test_a_tunnel_in_which_nothing_moves_is_closed_and_one_that_moves_is_not() -> None:
    async def work() -> tuple[bytes, bytes, bytes]:
        async with proxy(Limits(idle_seconds=0.3)) as dial:
            silent, silent_writer = await dial()
            reader, writer = await dial()
            for each in (silent_writer, writer):
                each.write(HELLO)
            for each in (silent, reader):
                await each.readuntil(b"\r\n\r\n")
            moved = b""
            for _ in range(5):
                writer.write(b".")
                moved += await reader.readexactly(1)
                await asyncio.sleep(0.1)
            return moved, await silent.read(), await reader.read()

    assert run(work()) == (b".....", b"", b"")


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def flood(_: StreamReader, writer: StreamWriter) -> None:
        try:
            while True:
                writer.write(b"x" * (1 << 16))
                await writer.drain()
        except ConnectionError:
            ended.put_nowait("closed")
        finally:
            writer.close()

    async def work() -> str:
        async with proxy(Limits(stalled_seconds=0.2), flood) as dial:
            _, writer = await dial()
            writer.transport.pause_reading()
            writer.write(HELLO)
            return await ended.get()

    assert run(work()) == "closed"


def test_there_are_only_so_many_connections_and_a_closed_one_makes_room() -> None:
    async def work() -> list[bytes]:
        async with proxy(Limits(tunnels=2)) as dial:
            pairs = [await dial() for _ in range(3)]
            for _, writer in pairs:
                writer.write(HELLO)
            lines = [await reader.readline() for reader, _ in pairs]
            pairs[0][1].close()
            pairs[2][1].close()
            await asyncio.sleep(0.1)
            reader, writer = await dial()
            writer.write(HELLO)
            return [*lines, await reader.readline()]

    assert [line.split()[1] for line in run(work())] == [b"200", b"200", b"503", b"200"]


def test_a_server_that_is_down_is_said_to_be() -> None:
    async def work() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = taken.getsockname()
        stop, found = asyncio.Event(), asyncio.get_running_loop().create_future()
        service = asyncio.create_task(
            serve_connect(("127.0.0.1", 0), address, HOSTS, stop, ready=found.set_result)
        )
        reader, writer = await asyncio.open_connection(*await found)
        writer.write(HELLO)
        line = await reader.readline()
        stop.set()
        await service
        writer.close()
        return line

    assert run(work()).startswith(b"HTTP/1.1 502 ")


def test_stopping_ends_the_tunnels_that_are_open() -> None:
    async def work() -> bytes:
        async with proxy() as dial:
            reader, writer = await dial()
            writer.write(HELLO)
            await reader.readuntil(b"\r\n\r\n")
        return await reader.read()

    assert run(work()) == b""


def test_a_tunnel_in_which_nothing_is_said_at_first_is_closed() -> None:
    async def work() -> bytes:
        async with proxy(Limits(request_seconds=0.2)) as dial:
            reader, writer = await dial()
            writer.write(HELLO)
            await reader.readuntil(b"\r\n\r\n")
            return await reader.read()

    assert run(work()) == b""


def test_once_one_side_has_ended_the_other_one_ends_soon() -> None:
    ended = asyncio.Event()

    async def talk(reader: StreamReader, writer: StreamWriter) -> None:
        """Goes on and on."""
        with suppress(ConnectionError):
            while True:
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        ended.set()

    async def work() -> bytes:
        async with proxy(Limits(ending_seconds=0.2), talk) as dial:
            reader, writer = await dial()
            writer.write(HELLO + b"hello")
            await reader.readuntil(b"\r\n\r\n")
            writer.write_eof()
            said = await reader.read()
            await ended.wait()
            return said

    assert set(run(work())) == {ord(".")}


def test_one_address_has_only_so_many_tunnels_unless_it_is_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> list[bytes]:
        async with proxy(Limits(tunnels_of_one=2)) as dial:
            pairs = [await dial() for _ in range(3)]
            for _, writer in pairs:
                writer.write(HELLO)
            lines = [await reader.readline() for reader, _ in pairs]
            pairs[0][1].close()
            pairs[2][1].close()
            await asyncio.sleep(0.1)
            reader, writer = await dial()
            writer.write(HELLO)
            return [line.split()[1] for line in [*lines, await reader.readline()]]

    assert run(work()) == [b"200"] * 4
    monkeypatch.setattr("trainer.server.connect.is_loopback", lambda address: False)
    assert run(work()) == [b"200", b"200", b"503", b"200"]
