"""The proxy that unchanged clients ask for a hosted service, and that leads them to this server.

With `HTTPS_PROXY` set a client says `CONNECT queue.fal.run:443` here and then speaks TLS through
the tunnel, which ends at our own https address whatever name was asked for. No other name and no
other port is let through, and no plain request is passed on: nobody can reach a third machine from
here. Knows bytes and names, and nothing of what is said inside the tunnels.
"""

from __future__ import annotations

import asyncio
import re
import socket
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from trainer.server.settings import is_loopback

_REQUEST = re.compile(rb"([A-Z]+) (\S{1,300}) HTTP/1\.[01]\r\n")
_AUTHORITY = re.compile(r"\[?([A-Za-z0-9._:-]+?)\]?:(\d{1,5})")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What one client may take.

    Args:
        tunnels: connections at a time, those that have not asked yet among them.
        tunnels_of_one: of one address that is not this machine's.
        request_bytes: the request with all its headers.
        request_seconds: for that to arrive, and then for the first byte in the tunnel.
        stalled_seconds: for the receiving side to take what waits for it.
        idle_seconds: without a byte either way. Long, since an answer may be as far away as the
            end of a training; a peer that is gone is noticed by the system's probes before.
        ending_seconds: for one side to say the rest, once the other has ended.
    """

    tunnels: int = 256
    tunnels_of_one: int = 64
    request_bytes: int = 16 * 1024
    request_seconds: float = 10
    stalled_seconds: float = 60
    idle_seconds: float = 24 * 3600
    ending_seconds: float = 30


class _Refused(Exception):
    """A request that gets an answer and no tunnel."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


async def serve_connect(
    listen: tuple[str, int],
    target: tuple[str, int],
    hosts: Collection[str],
    stop: asyncio.Event,
    *,
    limits: Limits | None = None,
    ready: Callable[[tuple[str, int]], object] = lambda address: None,
) -> None:
    """Answers CONNECT until told to stop, then closes what is open.

    Args:
        listen: where to listen; port 0 takes a free one.
        target: our own https address, where every tunnel ends.
        hosts: the names that may be asked for, in lower case, always with port 443.
        stop: ends the service when set.
        limits: against clients that are many or slow.
        ready: is told the address once it is listened on.

    Raises:
        OSError: the address cannot be listened on.
    """
    proxy = _Proxy(target, frozenset(hosts), limits or Limits())
    server = await asyncio.start_server(
        proxy.accept, *listen, limit=proxy.limits.request_bytes, backlog=512
    )
    ready(server.sockets[0].getsockname()[:2])
    try:
        await stop.wait()
    finally:
        server.close()
        for task in proxy.tasks:
            task.cancel()
        await asyncio.gather(*proxy.tasks, return_exceptions=True)
        await server.wait_closed()


class _Proxy:
    """The connections of one listening address."""

    def __init__(self, target: tuple[str, int], hosts: frozenset[str], limits: Limits) -> None:
        self.target = target
        self.hosts = hosts
        self.limits = limits
        self.tasks: set[asyncio.Task[None]] = set()
        self.clients: Counter[str] = Counter()

    def accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """One connection from its request to its end."""
        client: str = (writer.get_extra_info("peername") or ("",))[0]
        self.clients[client] += 1
        # A client that breaks off, at whatever moment, is nothing to report.
        with suppress(OSError):
            try:
                await self._answer(reader, writer, client)
            except _Refused as refusal:
                await self._refuse(reader, writer, refusal)
            finally:
                self.clients[client] -= 1
                if not self.clients[client]:
                    del self.clients[client]
                _close(writer)

    async def _answer(self, reader: StreamReader, writer: StreamWriter, client: str) -> None:
        if len(self.tasks) > self.limits.tunnels:
            raise _Refused(503, f"more than {self.limits.tunnels} connections at a time")
        if self.clients[client] > self.limits.tunnels_of_one and not is_loopback(client):
            raise _Refused(503, f"more than {self.limits.tunnels_of_one} connections of one client")
        self._check(await self._request(reader))
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                far_reader, far_writer = await asyncio.open_connection(*self.target, limit=_CHUNK)
        except OSError as error:
            raise _Refused(502, "the server behind this proxy does not answer") from error
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for end in (writer, far_writer):
                _probe(end)
            await _join((reader, writer), (far_reader, far_writer), self.limits)
        finally:
            _close(far_writer)

    async def _request(self, reader: StreamReader) -> bytes:
        """The request with its headers.

        Raises:
            _Refused: it is too long, or does not come to its end in time.
        """
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                return await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:
            raise _Refused(
                431, f"more than {self.limits.request_bytes} bytes of headers"
            ) from error
        except TimeoutError as error:
            raise _Refused(408, f"no request in {self.limits.request_seconds:g} seconds") from error
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError from error

    def _check(self, request: bytes) -> None:
        """Lets one of the services through.

        Raises:
            _Refused: another method, name or port, or no HTTP.
        """
        parts = _REQUEST.match(request)
        if parts is None:
            raise _Refused(400, "this is not a request to a proxy")
        if parts[1] != b"CONNECT":
            raise _Refused(403, "only CONNECT is answered here, no other request is passed on")
        authority = _AUTHORITY.fullmatch(parts[2].decode("latin-1"))
        if authority is None:
            raise _Refused(400, "CONNECT wants a host and a port")
        host = authority[1].lower().rstrip(".")
        if host not in self.hosts:
            raise _Refused(403, f"{host} is not a service that this proxy stands for")
        if authority[2] != "443":
            raise _Refused(403, f"port {authority[2]} is not let through, only 443")

    async def _refuse(self, reader: StreamReader, writer: StreamWriter, refusal: _Refused) -> None:
        """Answers with the reason twice: clients show the status line or the body."""
        text = f"{refusal.reason}\n".encode()
        head = [
            f"HTTP/1.1 {refusal.status} {refusal.reason}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(text)}",
            "Connection: close",
        ]
        async with asyncio.timeout(self.limits.request_seconds):
            writer.write("\r\n".join([*head, "", ""]).encode() + text)
            await writer.drain()
            writer.write_eof()
            # Closing on what is not read yet would reset the connection and lose the answer.
            rest = self.limits.request_bytes * 4
            while rest > 0 and (chunk := await reader.read(_CHUNK)):
                rest -= len(chunk)


async def _join(
    near: tuple[StreamReader, StreamWriter],
    far: tuple[StreamReader, StreamWriter],
    limits: Limits,
) -> None:
    """Moves bytes between two connections until both sides have ended, or one of them fails.

    Raises:
        ConnectionError: a side broke off.
        TimeoutError: nothing moved for too long, or one side goes on for long after the other.
    """
    now = asyncio.get_running_loop().time
    is_ending = False
    async with asyncio.timeout(min(limits.request_seconds, limits.idle_seconds)) as patience:

        async def move(reader: StreamReader, writer: StreamWriter) -> None:
            nonlocal is_ending
            while chunk := await reader.read(_CHUNK):
                if not patience.expired() and not is_ending:
                    patience.reschedule(now() + limits.idle_seconds)
                writer.write(chunk)
                async with asyncio.timeout(limits.stalled_seconds):
                    await writer.drain()
            # One side is done speaking and may still listen.
            if not patience.expired() and not is_ending:
                patience.reschedule(now() + limits.ending_seconds)
            is_ending = True
            with suppress(OSError):
                writer.write_eof()

        ways = ((near[0], far[1]), (far[0], near[1]))
        tasks = [asyncio.create_task(move(reader, writer)) for reader, writer in ways]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _probe(writer: StreamWriter) -> None:
    """Lets the system find out when the peer of a quiet connection is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _close(writer: StreamWriter) -> None:
    """Closes a connection, and throws away what a peer that stopped reading did not take."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()
