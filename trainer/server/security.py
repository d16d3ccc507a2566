"""The guard before all routes: who may ask, under which name, from which page, and how much.

Judges requests by their headers and paths alone; what a request means is not known here. It is
the outermost layer, answers every refusal in the shape of the service that was meant, and lets no
failure out that tells of this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.server.access_log import note_request
from trainer.server.hosts import own_hosts, plain_host
from trainer.server.protocols import protocol_of
from trainer.server.refusals import Refusal
from trainer.server.settings import MEBIBYTE, ServerSettings, is_loopback
from trainer.server.strict_json import parsed
from trainer.server.throttling import (
    MeasuredAnswer,
    MeasuredBody,
    Memory,
    Rates,
    TooSlow,
    too_large,
)
from trainer.server.tidying import tidied

NO_KEY = "no API key was given; send `Authorization: Key <key>`, `Bearer <key>` or `X-Key: <key>`"
WRONG_KEY = "the API key is not one of this server's"

# Where `has_key` finds what the guard saw.
_HAS_KEY = "trainer.has_key"
# Where handlers tell the guard more.
_BODY = "trainer.body"
_PATHS = "trainer.paths"
# So many of the largest bodies may be in memory together.
_BODIES = 2
_READING = ("GET", "HEAD", "OPTIONS")
_METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
_PUBLIC = ("/", "/healthz", "/openapi.json", "/.well-known/jwks.json")
_FILES, _SMALL = "/files/", MEBIBYTE
_SHOWN = (_FILES, "/page/")
# Larger bodies are parsed in a thread.
_READ_AT_ONCE = 2**16
# Where uploads are brought, and ended: under addresses with a token, which their handlers judge.
_UPLOADS = ("/files/", "/storage/", "/v3/")
# Paths whose JSON holds no pictures.
_SMALL_JSON = ("/storage/", "/v3/")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::\d{1,5})?")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}")

log = logging.getLogger("trainer.server")

Refused = Callable[[str, Refusal], Response]


def refused_by_protocol(path: str, refusal: Refusal) -> Response:
    """The answer to a refusal in the shape of the service that a path belongs to."""
    return protocol_of(path).refused(refusal)


def has_key(request: Request) -> bool:
    """Whether a request came with one of the server's keys, or needs none.

    Asked by those that take uploads: the guard leaves them to judge a token of their own.
    """
    return bool(request.scope[_HAS_KEY])


async def read_json(request: Request, limit: int | None = None) -> dict[str, Any]:
    """The JSON object in a request.

    Args:
        limit: bytes, where less is enough than the guard lets in.

    Raises:
        Refusal: it is none, or too large.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if limit is not None and len(body) > limit:
            raise too_large(limit)
    if len(body) <= _READ_AT_ONCE:
        return parsed(body)
    return await run_in_threadpool(parsed, body)


def body_is_done(request: Request) -> None:
    """Tells the guard that nothing of a body is needed any more, where the answer takes long."""
    # A handler may stand without a guard.
    if _BODY in request.scope:
        request.scope[_BODY].done()


def answers_for(request: Request, path: str) -> None:
    """Tells the guard which path a request is answered for, where another one stands in it."""
    request.scope[_PATHS].append(path)


class Guard:
    """Middleware outside of all others.

    Args:
        app: what is guarded.
        settings: of the server.
        refused: makes the answer to a refusal, from the path and the refusal.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, refused: Refused = refused_by_protocol
    ) -> None:
        self._app = app
        self._settings = settings
        self._refused = refused
        self._keys = [_digest(key.get_secret_value()) for key in settings.keys]
        self._rates = Rates(settings.requests_per_second)
        self._hosts = own_hosts(settings)
        self._memory = Memory(_BODIES * settings.max_body_bytes)
        self._origins = {origin.lower().rstrip("/") for origin in settings.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began = time.perf_counter()
        measured = MeasuredAnswer(send, self._settings.client_seconds)
        answer = _Answer(measured, self._added_headers(Headers(scope=scope)))
        scope = {**scope, _PATHS: [scope["path"]]}
        try:
            with _Bugs(answer) as bugs:
                await self._answered(scope, receive, answer)
            if bugs.found:
                message = f"the server has a fault; its log tells more of request {answer.id}"
                await self._refuse(scope, Refusal("internal", message), answer)
        finally:
            note_request(scope, scope[_PATHS], id=answer.id, status=answer.status, began=began)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            asked = _asked(scope)
            self._check_host(asked)
            if asked.is_preflight:
                await self._preflight(asked)(scope, receive, answer)
                return
            self._check_origin(asked)
            caller = self._caller(asked)
            if asked.writes:
                self._rates.take(caller or asked.client)
            limit = self._limit(asked)
            if asked.declared_bytes > limit:
                raise too_large(limit)
            body = MeasuredBody(
                receive,
                limit,
                self._settings.client_seconds,
                memory=None if asked.has_own_token else self._memory,
                declared=asked.declared_bytes,
            )
            scope = {**scope, _HAS_KEY: caller is not None, _BODY: body}
            try:
                await self._app(scope, body, answer)
            finally:
                body.done()
        except (ClientDisconnect, TooSlow):
            # There is nobody left to answer.
            return
        except Refusal as refusal:
            if answer.has_begun:
                raise
            await self._refuse(scope, refusal, answer)

    async def _refuse(self, scope: Scope, refusal: Refusal, answer: _Answer) -> None:
        response = self._refused(tidied(scope["path"], ""), refusal)
        response.headers.update(refusal.headers)
        await response(scope, _nothing, answer)

    def _check_host(self, asked: _Asked) -> None:
        """Lets in the names that the owner knows: a page elsewhere may lend its name to us."""
        allowed = asked.host in self._hosts or is_loopback(asked.host)
        # An address is nobody's name.
        if not allowed and asked.host != asked.reached:
            message = (
                f"this server is not called `{asked.host[:100]}`; its owner can add the name to "
                "`allowed_hosts` (--allowed-hosts)"
            )
            raise Refusal("forbidden", message)

    def _check_origin(self, asked: _Asked) -> None:
        if not asked.writes or asked.origin in self._origins:
            return
        foreign = asked.origin is not None and asked.origin not in asked.own_origins
        if foreign or asked.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            message = (
                f"pages of `{(asked.origin or 'other places')[:100]}` may not ask this server; its "
                "owner can add them to `allowed_origins` (--allowed-origins)"
            )
            raise Refusal("forbidden", message)

    def _caller(self, asked: _Asked) -> str | None:
        """Who asks, as the rates know them; nothing for those that are let in without a key.

        Raises:
            Refusal: a key is needed.
        """
        if not self._keys:
            if not asked.is_from_here:
                message = "this server has no API key, and serves only the machine it runs on"
                raise Refusal("unauthorized", message)
            _check_content_type(asked)
            return asked.client
        given = _given_keys(asked.headers)
        for key in given:
            digest = _digest(key)
            # All are compared, so that the time tells nothing of their order.
            if any([hmac.compare_digest(digest, own) for own in self._keys]):
                return digest.hex()
        if asked.is_public or asked.has_own_token:
            return None
        # With tls there is a proxy, through which anybody seems to be here.
        if asked.path == "/metrics" and asked.is_from_here and not self._settings.tls:
            return None
        headers = {"WWW-Authenticate": "Key"}
        raise Refusal("unauthorized", WRONG_KEY if given else NO_KEY, headers=headers)

    def _limit(self, asked: _Asked) -> int:
        if asked.has_own_token:
            return self._settings.max_upload_bytes
        if asked.method != "POST" or asked.path.startswith(_SMALL_JSON):
            return min(_SMALL, self._settings.max_body_bytes)
        return self._settings.max_body_bytes

    def _preflight(self, asked: _Asked) -> Response:
        """What a browser wants to know before a page may ask."""
        if asked.origin not in self._origins:
            message = "this page may not ask this server; see `allowed_origins`"
            raise Refusal("forbidden", message)
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": "600"}
        wanted = asked.headers.get("access-control-request-headers", "")
        if _HEADER_NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
        if asked.headers.get("access-control-request-private-network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=headers)

    def _added_headers(self, headers: Headers) -> Mapping[str, str]:
        added = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        origin = headers.get("origin")
        if self._origins:
            added["Vary"] = "Origin"
        if origin is not None and origin.lower() in self._origins:
            added["Access-Control-Allow-Origin"] = origin
            added["Access-Control-Expose-Headers"] = "x-fal-request-id, retry-after, etag"
        return added


@dataclass(frozen=True)
class _Asked:
    """A request as far as its head tells.

    Args:
        method: of HTTP.
        path: of this server, tidied.
        headers: all.
        host: its name or address, lower case, no port or brackets.
        reached: the address at which it arrived.
        client: the address it came from; empty where that is a socket of this machine.
        own_origins: of pages that this server itself has under that name.
    """

    method: str
    path: str
    headers: Headers
    host: str
    reached: str
    client: str
    own_origins: Sequence[str]

    @property
    def writes(self) -> bool:
        """Whether it may change something."""
        return self.method not in _READING

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks what a page may ask."""
        return self.method == "OPTIONS" and "access-control-request-method" in self.headers

    @property
    def origin(self) -> str | None:
        """Of the page whose script asks."""
        origin = self.headers.get("origin")
        return None if origin is None else origin.lower()

    @property
    def is_public(self) -> bool:
        """Whether it needs no key: files are known by random ids."""
        return not self.writes and (self.path in _PUBLIC or self.path.startswith(_SHOWN))

    @property
    def has_own_token(self) -> bool:
        """Whether it brings an upload, or ends one: its handler judges the token in its address."""
        if self.method == "PUT":
            return self.path.startswith(_UPLOADS)
        ends_upload = self.path.startswith("/storage/") and self.path.endswith("/complete")
        return self.method == "POST" and (self.path.startswith(_FILES) or ends_upload)

    @property
    def is_from_here(self) -> bool:
        """Whether it comes from this machine, also through a proxy on it."""
        forwarded = ",".join(self.headers.getlist("x-forwarded-for"))
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        addresses = [self.client, *hops] if self.client else hops
        return all(is_loopback(address) for address in addresses)

    @property
    def declared_bytes(self) -> int:
        """Of its body, where the client says so."""
        length = self.headers.get("content-length", "")
        return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _asked(scope: Scope) -> _Asked:
    """The head of a request.

    Raises:
        Refusal: it does not name this server once.
    """
    headers = Headers(scope=scope)
    named = [value.lower() for value in headers.getlist("host")]
    found = _HOST.fullmatch(named[0]) if len(named) == 1 else None
    if found is None:
        raise Refusal("malformed", "the request must name the server in one `Host` header")
    server, client = scope.get("server"), scope.get("client")
    return _Asked(
        method=scope["method"],
        path=tidied(scope["path"], found[1]),
        headers=headers,
        host=plain_host(found[1]),
        reached=server[0] if server else "",
        client=client[0] if client else "",
        own_origins=(f"http://{named[0]}", f"https://{named[0]}"),
    )


def _check_content_type(asked: _Asked) -> None:
    """Refuses what any page can make a browser send unasked: such a request has no header of ours.

    Raises:
        Refusal: it is no JSON, and nobody says who asks.
    """
    if asked.method != "POST" or asked.has_own_token or _given_keys(asked.headers):
        return
    declared = asked.headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    is_empty = asked.declared_bytes == 0 and "transfer-encoding" not in asked.headers and not kind
    if not is_json and not is_empty:
        message = "the body must be JSON; send `Content-Type: application/json`"
        raise Refusal("malformed", message)


def _given_keys(headers: Headers) -> list[str]:
    """The keys in a request: after `Key` or `Bearer`, and in `X-Key`."""
    given = [value.strip() for value in headers.getlist("x-key")]
    for value in headers.getlist("authorization"):
        scheme, _, key = value.strip().partition(" ")
        if scheme.lower() in ("key", "bearer"):
            given.append(key.strip())
    return [key for key in given if key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class _Answer:
    """The way back to the client: adds headers, and remembers how the answer began.

    Args:
        send: to the client.
        added: headers that every answer has.
    """

    def __init__(self, send: Send, added: Mapping[str, str]) -> None:
        self._send = send
        self._added = added
        self.id = secrets.token_hex(6)
        # What servers write where the client left before an answer.
        self.status = 499
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update({**self._added, "X-Request-Id": self.id})
            if "json" in headers.get("content-type", ""):
                headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


class _Bugs:
    """A block whose failures are written to the log; those before an answer are left to answer."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self.found = False

    def __enter__(self) -> _Bugs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("request %s failed", self._answer.id, exc_info=error)
        self.found = not self._answer.has_begun
        return self.found


async def _nothing() -> Any:
    """A refusal reads nothing."""
    return {"type": "http.disconnect"}
