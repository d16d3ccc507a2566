"""The one way to outside addresses: downloads over http and https that reach public hosts only.

Every host name is resolved once, all its addresses are checked, and the connection goes to a
checked address; so it is with every redirect. Proxies, cookies and credentials are not used, and
what comes is written as it comes; a server that is too slow is given up. What is downloaded, and
into which file, is not known here.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, BinaryIO

import httpcore2
import httpx2

from trainer.durable import shown_size, unit_of, write_all
from trainer.errors import InputError

# Hosts that this machine's owner allows although they are private; a request cannot.
ALLOWED_HOSTS = "TRAINER_ALLOWED_HOSTS"

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10
READ_SECONDS = 30
# A server that lets a byte trickle now and then would keep a run for ever: it must begin to give
# within so many seconds of waiting, and after as many more give so much in each, on average.
PATIENCE_SECONDS = 60
LEAST_BYTES_PER_SECOND = 1000

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

# Not public, though not every Python version says so: ways to an IPv4 address inside an IPv6
# address, multicast, and the address under which one cloud offers its machines their secrets.
_NOT_PUBLIC = tuple(
    ip_network(text)
    for text in (
        *("100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
_IPV6_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")

Resolver = Callable[[str, int], Sequence[str]]


class _Refusal(Exception):
    """Why an address is not downloaded.

    Args:
        reason: goes on after "cannot be downloaded: ".
        hint: the next action.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def shown_url(url: str) -> str:
    """An address as messages show it: without user name, password, query and fragment.

    The query of a signed address is a key.
    """
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        return f"{url.partition(':')[0][:10]}://…"
    host = f"[{address.host}]" if ":" in address.host else address.host
    port = "" if address.port is None else f":{address.port}"
    shown = f"{address.scheme}://{host}{port}{address.path}"
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it hides in another one."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        embedded = ip.ipv4_mapped
        if ip in _NAT64:
            embedded = IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip not in _IPV6_UNICAST:
            return False
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


def resolve(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a host, as the system knows them.

    Raises:
        OSError: there is no such host.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


class PinnedBackend(httpcore2.NetworkBackend):
    """Connects to checked addresses only.

    TLS above it still verifies the host name.

    Args:
        resolver: gives the addresses of a host.
        inner: makes the connection to one address.
    """

    def __init__(
        self, resolver: Resolver = resolve, inner: httpcore2.NetworkBackend | None = None
    ) -> None:
        self._resolver = resolver
        self._inner = inner or httpcore2.SyncBackend()
        allowed = os.environ.get(ALLOWED_HOSTS, "").lower().split(",")
        self._allowed = {host.strip().strip("[]") for host in allowed} - {""}

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        """A connection to the first checked address of the host that answers."""
        failure: httpcore2.ConnectError | httpcore2.ConnectTimeout | None = None
        for address in self._checked(host, port):
            try:
                return self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore2.ConnectError("the host has no address")

    def _checked(self, host: str, port: int) -> Sequence[str]:
        try:
            addresses = self._resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise _Refusal(
                f"there is no host `{host}`, or no network",
                "check the address and the connection to the network",
            ) from error
        if host.lower().rstrip(".") not in self._allowed:
            for address in addresses:
                if address not in self._allowed and not is_public(address):
                    raise _Refusal(
                        f"`{host}` is not on the public internet",
                        "give a public address or a local file; the owner of this machine can "
                        f"name the host in {ALLOWED_HOSTS}",
                    )
        return addresses


@dataclass
class _Patience:
    """How long a server is waited for; time that goes elsewhere does not count.

    Args:
        answered: whether what comes is content, for which more time is given.
        waited: seconds.
        received: bytes.
    """

    answered: bool = False
    waited: float = 0.0
    received: int = 0

    @contextmanager
    def waiting(self, most: float | None) -> Iterator[float]:
        """Gives the seconds that the server has, at most these, and counts those it takes.

        Raises:
            httpcore2.ReadTimeout: it has none left.
        """
        earned = self.received / LEAST_BYTES_PER_SECOND if self.answered else 0
        left = max(PATIENCE_SECONDS, earned) - self.waited
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
    """One of these connections; requests are short, only what comes is counted."""

    def __init__(self, inner: httpcore2.NetworkStream, patience: _Patience) -> None:
        self._inner = inner
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._patience.waiting(timeout) as seconds:
            content = self._inner.read(max_bytes, seconds)
        self._patience.received += len(content)
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, timeout)

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
    except _Refusal as refusal:
        message = f"`{shown}` cannot be downloaded: {refusal.reason}"
        raise InputError.of(field, message, refusal.hint) from refusal


def _answer(pool: httpcore2.ConnectionPool, url: str, stack: ExitStack) -> httpcore2.Response:
    """The response at the end of all redirects, its content still to come."""
    address = _checked_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        response = _asked(pool, address, stack)
        place = _header(response, b"location")
        if response.status not in _REDIRECTS or place is None:
            break
        response.close()
        address = _redirected(address, place)
    else:
        raise _Refusal(
            f"it redirects more than {MAX_REDIRECTS} times", "give the address of the file itself"
        )
    if response.status != 200:
        later = ("the server cannot give it now", "try again later")
        other = ("the server gives no file", "check the address")
        reason, hint = _STATUSES.get(response.status, later if response.status >= 500 else other)
        raise _Refusal(f"{reason} (HTTP {response.status})", hint)
    return response


def _asked(
    pool: httpcore2.ConnectionPool, address: httpx2.URL, stack: ExitStack
) -> httpcore2.Response:
    seconds = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS}
    try:
        return stack.enter_context(
            pool.stream(
                "GET",
                httpcore2.URL(
                    scheme=address.raw_scheme,
                    host=address.raw_host,
                    port=address.port,
                    target=address.raw_path,
                ),
                headers={
                    # httpcore's own has no brackets about an IPv6 address.
                    "Host": address.netloc,
                    "Accept": "*/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "trainer",
                },
                extensions={"timeout": seconds},
            )
        )
    except httpcore2.TimeoutException as error:
        raise _Refusal(
            f"the server `{address.host}` does not answer", "check the address or try again later"
        ) from error
    except httpcore2.ProtocolError as error:
        raise _Refusal(
            f"`{address.host}` does not answer as a web server does ({error})", "check the address"
        ) from error
    except httpcore2.NetworkError as error:
        raise _Refusal(
            f"no connection to `{address.host}` ({error})", "check the address and the network"
        ) from error


def _checked_url(url: str) -> httpx2.URL:
    """An address that may be asked, as far as its text says."""
    hint = "give an http:// or https:// address"
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise _Refusal("it is no valid address", hint) from error
    if address.port is not None and not 0 < address.port < 2**16:
        raise _Refusal("it is no valid address", hint)
    if address.scheme not in ("http", "https") or not address.host:
        raise _Refusal("it is no web address", hint)
    if address.userinfo:
        raise _Refusal(
            "it holds a user name or password, which are not sent",
            "give a public or signed link, or download it and give the file",
        )
    return address


def _redirected(address: httpx2.URL, place: bytes) -> httpx2.URL:
    try:
        target = str(address.join(_text_of(place)))
    except (httpx2.InvalidURL, ValueError) as error:
        raise _Refusal("it redirects to no valid address", "check the address") from error
    try:
        return _checked_url(target)
    except _Refusal as refusal:
        raise _Refusal(
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
        raise _Refusal(
            f"the download stopped after {_progress(done, total)}",
            "try again, or download it and give the file",
        ) from error
    if done != said:
        yield done, total


def _too_large(limit: int) -> _Refusal:
    size = f"{limit >> 30} GiB" if limit >= 2**30 else f"{limit >> 20} MiB"
    return _Refusal(f"it is larger than {size}", "give fewer or smaller files")


def _header(response: httpcore2.Response, name: bytes) -> bytes | None:
    found = [value for key, value in response.headers if key.lower() == name]
    return found[0] if found else None


def _progress(done: int, total: int | None) -> str:
    if total is None:
        return shown_size(done)
    unit, name = unit_of(total)
    return f"{round(done / unit, 1):g} of {round(total / unit, 1):g} {name}"
