"""The route of JavaScript's client: what it would ask of fal, it asks here, by a header.

Only fal's own hosts are understood, and nothing is fetched from anywhere: the request is answered
by this server's own routes.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer.server.hosts import PROXY_ROUTE_ROLES, SERVICE_HOSTS, path_here
from trainer.server.refusals import Refusal
from trainer.server.security import answers_for
from trainer.server.tidying import tidied
from trainer.server.workshop import Workshop

TARGET = "x-fal-target-url"
PATH = "/api/fal/proxy"

# What a request got on its way through the routes, and gets anew on the next.
_OF_ROUTING = ("path_params", "endpoint", "route", "app_root_path")


async def proxy(request: Request, workshop: Workshop) -> Response:
    """Answers what is asked of one of fal's hosts."""
    path, query = _target(request.headers.get(TARGET, ""))
    answers_for(request, path)
    scope = {key: value for key, value in request.scope.items() if key not in _OF_ROUTING}
    scope["path"], scope["raw_path"] = path, path.encode()
    scope["query_string"] = query.encode()
    # Without the header, so that nothing leads here a second time.
    scope["headers"] = [pair for pair in scope["headers"] if pair[0] != TARGET.encode()]
    return _Elsewhere(request.app.router, scope)


class _Elsewhere(Response):
    """An answer that another route gives, as it comes."""

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        super().__init__()
        self._app = app
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the other route answer."""
        await self._app(self._scope, receive, send)


def _target(address: str) -> tuple[str, str]:
    """Path and query on this server.

    Raises:
        Refusal: it is no address of fal's.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _refusal() from None
    plain = parts.scheme == "https" and port in (None, 443) and "@" not in parts.netloc
    if not plain or SERVICE_HOSTS.get(host) not in PROXY_ROUTE_ROLES or not address.isascii():
        raise _refusal()
    asked = unquote(parts.path) or "/"
    return tidied(path_here(host, asked) or asked, ""), parts.query


def _refusal() -> Refusal:
    return Refusal("malformed", "Invalid request")
