"""The page itself: files of this package, served to whoever may reach the server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from trainer.server.operations import Operation, Told
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"
# Nobody frames the page: a click on it is meant for it.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    content: bytes
    content_type: str
    etag: str


async def index(request: Request, _: Workshop) -> Response:
    """Shows the page."""
    return _answer(request, _INDEX)


async def asset(request: Request, _: Workshop) -> Response:
    """A part of the page."""
    return _answer(request, request.path_params["name"])


@cache
def assets() -> dict[str, Asset]:
    """All files of the page, by name."""
    found = {}
    for entry in files("trainer.server").joinpath("page").iterdir():
        content_type = _CONTENT_TYPES.get("." + entry.name.rpartition(".")[2])
        if content_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[entry.name] = Asset(content, content_type, etag)
    return found


def _answer(request: Request, name: str) -> Response:
    found = assets().get(name)
    if found is None:
        raise Refusal("not_found", f"the page has no part `{name[:100]}`")
    headers = {**HEADERS, "ETag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.content_type, headers=headers)


OPERATIONS = (
    Operation("GET", "/", index, "The page", "page", error=Told, media="text/html"),
    Operation(
        *("GET", "/page/{name}", asset, "A part of the page", "page"),
        error=Told,
        media="*/*",
        other_statuses=(304,),
    ),
)
