"""The one way to outside addresses: over http and https, to public hosts only, see `network`.

Every redirect of a download is checked like its first address; a message that is posted follows
none. Proxies, cookies and credentials are not used, and what comes is written as it comes; a
server that is too slow is given up. What is downloaded into which file, and what is posted, is not
known here.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import httpcore2
import httpx2

from trainer.durable import shown_size, unit_of, write_all
from trainer.errors import InputError
from trainer.network import AddressRefused, PinnedBackend, checked_url, shown_url

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10
READ_SECONDS = 30
# A server that lets a byte trickle now and then would keep a run for ever: it must begin to give
# within so many seconds of waiting, and after as many more give so much in each, on average.
PATIENCE_SECONDS = 60
LEAST_BYTES_PER_SECOND = 1000
# For a posted message, until its answer begins.
POST_SECONDS = 15

_PIECE_BYTES = 2**14
_YIELD_BYTES = 2**20
_YIELD_SECONDS = 1.0

_REDIRECTS = (301, 302, 303, 307, 308)
# What a status says to the user: what is wrong, and what to do.
_STATUSES = {
    401: ("the server refuses access", "give a link that is public and has not expired"),
    403: ("the server refuses access", "give a link that is public and has not expired"),
    404: ("there is nothing at this address", "check the address"),
    410: ("there is nothing at this address any more", "check the address"),
    429: ("the server has had too many requests", "try again later"),
}


@dataclass
class _Patience:
    """How long a server is waited for; time that goes elsewhere does not count.

    Args:
        answered: whether what comes is content, for which more time is given.
        waited: seconds.
        received: bytes.
        most: seconds before anything is answered, instead of `PATIENCE_SECONDS`.
    """

    answered: bool = False
    waited: float = 0.0
    received: int = 0
    most: float | None = None

    @contextmanager
    def waiting(self, most: float | None) -> Iterator[float]:
        """Gives the seconds that the server has, at most these, and counts those it takes.

        Raises:
            httpcore2.ReadTimeout: it has none left.
        """
        earned = self.received / LEAST_BYTES_PER_SECOND if self.answered else 0
        given = PATIENCE_SECONDS if self.most is None else self.most
        left = max(given, earned) - self.waited
        if left <= 0:
            raise httpcore2.ReadTimeout("the server is too slow")
        began = time.monotonic()
        try:
            yield left if most is None else min(most, left)
        finally:
            self.waited += time.monotonic() - began


class _PatientBackend(httpcore2.NetworkBackend):
    """Connections on which no server is waited for longer than there is patience."""

    def __init__(self, inner: httpcore2.NetworkBackend, patience: _Patience) -> None:
        self._inner = inner
        self._patience = patience

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        with self._patience.waiting(timeout) as seconds:
            stream = self._inner.connect_tcp(host, port, seconds, local_address, socket_options)
        return _PatientStream(stream, self._patience)


class _PatientStream(httpcore2.NetworkStream):
    """One of these connections."""

    def __init__(self, inner: httpcore2.NetworkStream, patience: _Patience) -> None:
        self._inner = inner
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._patience.waiting(timeout) as seconds:
            content = self._inner.read(max_bytes, seconds)
        self._patience.received += len(content)
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with self._patience.waiting(timeout) as seconds:
            self._inner.write(buffer, seconds)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        with self._patience.waiting(timeout) as seconds:
            stream = self._inner.start_tls(ssl_context, server_hostname, seconds)
        return _PatientStream(stream, self._patience)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def download(
    url: str,
    field: str,
    target: BinaryIO,
    *,
    limit: int,
    backend: httpcore2.NetworkBackend | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Writes what is at an address to a file, and says now and then how far it is.

    A packed transfer is not asked for, and not unpacked where a server packs all the same.

    Args:
        url: http or https.
        field: the option that holds the address.
        target: opened unbuffered, a full disk shows here and not when the file is closed.
        limit: bytes.
        backend: makes the connections; `PinnedBackend` unless given.

    Yields:
        Bytes written so far, and how many there are, or nothing where the server does not say.

    Raises:
        InputError: the address is refused or gives no content.
        DiskError: the content cannot be written.
    """
    shown = shown_url(url)
    patience = _Patience()
    try:
        with ExitStack() as stack:
            pool = stack.enter_context(
                httpcore2.ConnectionPool(
                    ssl_context=httpx2.create_ssl_context(),
                    network_backend=_PatientBackend(backend or PinnedBackend(), patience),
                )
            )
            response = _answer(pool, url, stack)
            patience.answered, patience.waited, patience.received = True, 0.0, 0
            yield from _written(response, shown, target, limit)
    except AddressRefused as refusal:
        message = f"`{shown}` cannot be downloaded: {refusal.reason}"
        raise InputError.of(field, message, refusal.hint) from refusal


def post(
    url: str,
    content: bytes,
    headers: Mapping[str, str],
    *,
    backend: httpcore2.NetworkBackend | None = None,
) -> int:
    """Posts a message, and leaves unread what is answered.

    Args:
        url: http or https.
        content: the message.
        headers: beside those that say how long it is and where it goes.
        backend: makes the connections; `PinnedBackend` unless given.

    Returns:
        The status of the answer.

    Raises:
        AddressForbidden: the address may not be reached.
        AddressRefused: nothing answers there in time.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(
            httpcore2.ConnectionPool(
                ssl_context=httpx2.create_ssl_context(),
                network_backend=_PatientBackend(
                    backend or PinnedBackend(), _Patience(most=POST_SECONDS)
                ),
            )
        )
        length = {"Content-Length": str(len(content))}
        # In pieces, so that a receiver that takes them slowly is given up too.
        pieces = [content[at : at + _PIECE_BYTES] for at in range(0, len(content), _PIECE_BYTES)]
        response = _asked(
            pool,
            checked_url(url),
            stack,
            method="POST",
            headers={**headers, **length},
            body=iter(pieces),
        )
        return response.status


def _answer(pool: httpcore2.ConnectionPool, url: str, stack: ExitStack) -> httpcore2.Response:
    """The response at the end of all redirects, its content still to come."""
    address = checked_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        response = _asked(pool, address, stack)
        place = _header(response, b"location")
        if response.status not in _REDIRECTS or place is None:
            break
        response.close()
        address = _redirected(address, place)
    else:
        raise AddressRefused(
            f"it redirects more than {MAX_REDIRECTS} times", "give the address of the file itself"
        )
    if response.status != 200:
        later = ("the server cannot give it now", "try again later")
        other = ("the server gives no file", "check the address")
        reason, hint = _STATUSES.get(response.status, later if response.status >= 500 else other)
        raise AddressRefused(f"{reason} (HTTP {response.status})", hint)
    return response


def _asked(
    pool: httpcore2.ConnectionPool,
    address: httpx2.URL,
    stack: ExitStack,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: Iterator[bytes] | None = None,
) -> httpcore2.Response:
    seconds = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS}
    try:
        return stack.enter_context(
            pool.stream(
                method,
                httpcore2.URL(
                    scheme=address.raw_scheme,
                    host=address.raw_host,
                    port=address.port,
                    target=address.raw_path,
                ),
                headers=[
                    # httpcore's own has no brackets about an IPv6 address.
                    (b"Host", address.netloc),
                    ("Accept", "*/*"),
                    ("Accept-Encoding", "identity"),
                    ("User-Agent", "trainer"),
                    *(headers or {}).items(),
                ],
                content=body,
                extensions={"timeout": seconds},
            )
        )
    except httpcore2.TimeoutException as error:
        raise AddressRefused(
            f"the server `{address.host}` does not answer", "check the address or try again later"
        ) from error
    except httpcore2.ProtocolError as error:
        raise AddressRefused(
            f"`{address.host}` does not answer as a web server does ({error})", "check the address"
        ) from error
    except httpcore2.NetworkError as error:
        raise AddressRefused(
            f"no connection to `{address.host}` ({error})", "check the address and the network"
        ) from error


def _redirected(address: httpx2.URL, place: bytes) -> httpx2.URL:
    try:
        target = str(address.join(_text_of(place)))
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressRefused("it redirects to no valid address", "check the address") from error
    try:
        return checked_url(target)
    except AddressRefused as refusal:
        raise AddressRefused(
            f"it redirects to `{shown_url(target)}`: {refusal.reason}", refusal.hint
        ) from refusal


def _text_of(header: bytes) -> str:
    """ASCII, as it should be, or what servers write instead."""
    try:
        return header.decode()
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _written(
    response: httpcore2.Response, shown: str, target: BinaryIO, limit: int
) -> Iterator[tuple[int, int | None]]:
    """Writes the content of a response, and says how far it is."""
    length = _header(response, b"content-length")
    total = None if length is None else int(length)
    if total is not None and total > limit:
        raise _too_large(limit)
    done = said = 0
    said_at = time.monotonic()
    yield 0, total
    try:
        for chunk in response.iter_stream():
            done += len(chunk)
            if done > limit:
                raise _too_large(limit)
            write_all(target, chunk, f"the download of `{shown}`", total)
            now = time.monotonic()
            if done - said >= _YIELD_BYTES or now - said_at >= _YIELD_SECONDS:
                said, said_at = done, now
                yield done, total
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise AddressRefused(
            f"the download stopped after {_progress(done, total)}",
            "try again, or download it and give the file",
        ) from error
    if done != said:
        yield done, total


def _too_large(limit: int) -> AddressRefused:
    size = f"{limit >> 30} GiB" if limit >= 2**30 else f"{limit >> 20} MiB"
    return AddressRefused(f"it is larger than {size}", "give fewer or smaller files")


def _header(response: httpcore2.Response, name: bytes) -> bytes | None:
    found = [value for key, value in response.headers if key.lower() == name]
    return found[0] if found else None


def _progress(done: int, total: int | None) -> str:
    if total is None:
        return shown_size(done)
    unit, name = unit_of(total)
    return f"{round(done / unit, 1):g} of {round(total / unit, 1):g} {name}"
