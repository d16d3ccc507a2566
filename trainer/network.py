"""Which outside addresses may be reached: those of public hosts, and what the owner allows.

Every host name is resolved once, all its addresses are checked, and the connection goes to a
checked address. What is asked there is not known here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpcore2
import httpx2

# Hosts that this machine's owner allows although they are private; a request cannot.
ALLOWED_HOSTS = "TRAINER_ALLOWED_HOSTS"

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


class AddressRefused(Exception):
    """Why an address is not reached.

    Args:
        reason: goes on after "cannot be downloaded: ".
        hint: the next action.
    """

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class AddressForbidden(AddressRefused):
    """It may not be reached, now or later."""


def shown_url(url: str) -> str:
    """An address as messages show it: without user name, password, query and fragment.

    The query of a signed address is a key.
    """
    shown = without_keys(url)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def without_keys(url: str) -> str:
    """An address without what may be a key, whole: user name, password, query and fragment."""
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        return f"{url.partition(':')[0][:10]}://…"
    host = f"[{address.host}]" if ":" in address.host else address.host
    port = "" if address.port is None else f":{address.port}"
    return f"{address.scheme}://{host}{port}{address.path}"


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


def allowed_hosts() -> set[str]:
    """The private hosts that the owner of this machine allows."""
    named = os.environ.get(ALLOWED_HOSTS, "").lower().split(",")
    return {host.strip().strip("[]") for host in named} - {""}


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
        self._allowed = allowed_hosts()

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
            raise AddressRefused(
                f"there is no host `{host}`, or no network",
                "check the address and the connection to the network",
            ) from error
        if host.lower().rstrip(".") not in self._allowed:
            for address in addresses:
                if address not in self._allowed and not is_public(address):
                    raise AddressForbidden(
                        f"`{host}` is not on the public internet",
                        "give a public address or a local file; the owner of this machine can "
                        f"name the host in {ALLOWED_HOSTS}",
                    )
        return addresses


def checked_url(url: str) -> httpx2.URL:
    """An address that may be asked, as far as its text says.

    Raises:
        AddressForbidden: it may not.
    """
    hint = "give an http:// or https:// address"
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressForbidden("it is no valid address", hint) from error
    if address.port is not None and not 0 < address.port < 2**16:
        raise AddressForbidden("it is no valid address", hint)
    if address.scheme not in ("http", "https") or not address.host:
        raise AddressForbidden("it is no web address", hint)
    if address.userinfo:
        raise AddressForbidden(
            "it holds a user name or password, which are not sent",
            "give a public or signed link, or download it and give the file",
        )
    return address
