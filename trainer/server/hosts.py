"""The hosted services' host names that this server answers for: one table for all who ask.

Read by the certificates, the CONNECT proxy, the list of Host names that are let in, the route
for JavaScript clients, and the server where it puts a host's paths among its own.
"""

from __future__ import annotations

from enum import StrEnum
from ipaddress import ip_address
from urllib.parse import urlsplit

from trainer.server.settings import ServerSettings


class Role(StrEnum):
    """What a host is to its clients."""

    QUEUE = "queue"
    RUN = "run"
    REST = "rest"
    CDN = "cdn"
    API = "api"
    """A whole service on one host; its paths tell it from the others."""


PREFIXES = {Role.QUEUE: "", Role.RUN: "/run", Role.REST: "", Role.CDN: "", Role.API: ""}
"""Where the paths of a host with this role begin here. Submitting and running are the same POST
on two hosts, so that one of them needs a prefix."""

SERVICE_HOSTS = {
    "queue.fal.run": Role.QUEUE,
    "fal.run": Role.RUN,
    # fal_client 1.0 goes on to these where the two above cannot be reached.
    "queue.falrun.com": Role.QUEUE,
    "falrun.com": Role.RUN,
    "rest.fal.ai": Role.REST,
    # fal_client before 0.13, and the older keys of webhooks.
    "rest.alpha.fal.ai": Role.REST,
    "v3.fal.media": Role.CDN,
    # fal_client 0.13 goes on to this one where the one above cannot be reached.
    "fal.media": Role.CDN,
    "api.bfl.ai": Role.API,
    "api.us1.bfl.ai": Role.API,
    "api.eu1.bfl.ai": Role.API,
    "api.us.bfl.ai": Role.API,
    "api.eu.bfl.ai": Role.API,
    "api.bfl.ml": Role.API,
    "api.novita.ai": Role.API,
}
"""Host name to role; names are lower case."""

PROXY_ROUTE_ROLES = frozenset({Role.QUEUE, Role.RUN, Role.REST})
"""The roles that a JavaScript client may name in the header of the proxy route."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def own_hosts(settings: ServerSettings) -> set[str]:
    """The names under which clients reach this server, as `plain_host` spells them."""
    public = urlsplit(settings.public_url or "").hostname
    services = SERVICE_HOSTS if settings.tls else ()
    named = (*LOCAL_NAMES, settings.host, public, *settings.allowed_hosts, *services)
    return {plain_host(name) for name in named if name}


def plain_host(host: str) -> str:
    """An IP address in its usual spelling; a name in lower case, without the root's dot."""
    bare = host.lower().strip("[]")
    try:
        return str(ip_address(bare))
    except ValueError:
        return bare.rstrip(".")


def path_here(host: str, path: str) -> str | None:
    """Where a service's path lies on this server.

    Args:
        host: the name that the client asked for, without a port.
        path: begins with a slash.

    Returns:
        The path, or nothing where the host is none of the services'.
    """
    role = SERVICE_HOSTS.get(host.lower())
    return None if role is None else PREFIXES[role] + path
