"""Paths as clients write them, made into those of the server's routes.

Double slashes and a slash at the end go. What was meant for a host of its own, where the request
came under that name, gets the path that this server has for it.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from trainer.server.hosts import path_here

# Beginnings that mean the same under every name.
_COMMON = ("/run/", "/files/", "/storage/", "/api/", "/.well-known/", "/healthz", "/openapi.json")


class TidyPaths:
    """Middleware that tidies the path of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] == "http":
            path = tidied(scope["path"], _host(scope))
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)


def tidied(path: str, host: str) -> str:
    """The path of this server for a path under a host name."""
    single = re.sub("/{2,}", "/", path)
    trimmed = single.rstrip("/") or "/"
    if trimmed.startswith(_COMMON):
        return trimmed
    return path_here(host, trimmed) or trimmed


def _host(scope: Scope) -> str:
    named = dict(scope["headers"]).get(b"host", b"")
    host: str = named.decode("latin-1").lower()
    return re.sub(r":\d+$", "", host)
