"""fal's storage: a client uploads a file, whole or in parts, and names its address in a request.

An address to upload to carries a token of its own, good once: JavaScript's client sends it no key.
Parts are kept apart until the client says which they are, and then become one file or nothing.
"""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainer.server.files import (
    OTHER_CONTENT,
    UPLOAD_SECONDS,
    NotExpected,
    StoredFile,
    TooLarge,
)
from trainer.server.refusals import Refusal
from trainer.server.security import has_key, read_json
from trainer.server.signing import KEY_NAME, webhook_key
from trainer.server.workshop import Workshop

FILE_NAME = "x-fal-file-name"
_MAX_PARTS = 10_000
_MAX_JSON = 2**20
_CHUNK = 2**20


class Token(BaseModel):
    """What uploads are authorised by."""

    token: str
    token_type: str = "Bearer"
    base_url: str
    expires_at: str = Field(description="ISO 8601, with its offset.")


class Announced(BaseModel):
    """A file to be uploaded."""

    file_name: str | None = None
    content_type: str | None = None


class TokenQuery(BaseModel):
    """What stands in an address to upload to."""

    token: str = ""


class Done(BaseModel):
    """Nothing more to say."""


class Initiated(BaseModel):
    """Where a file is uploaded to, and where it can be fetched then."""

    upload_url: str
    file_url: str


class Uploaded(BaseModel):
    """Where an uploaded file can be fetched."""

    access_url: str


class MultipartBegun(Uploaded):
    """An upload in parts."""

    uploadId: str


class Part(BaseModel):
    """A part that arrived."""

    partNumber: int
    etag: str


class Parts(BaseModel):
    """All parts of a file."""

    parts: list[Part]


async def token(request: Request, workshop: Workshop) -> Response:
    """Gives a client a token under which it uploads for a while."""
    expires = int(time.time() + UPLOAD_SECONDS)
    answer = Token(
        token=await run_in_threadpool(_token_until, expires, workshop),
        base_url=workshop.base_url(request),
        expires_at=datetime.fromtimestamp(expires, UTC).isoformat(),
    )
    return JSONResponse(answer.model_dump())


async def upload(request: Request, workshop: Workshop) -> Response:
    """Takes a file in the body."""
    file, token = await _expected(request, workshop, request.headers.get(FILE_NAME))
    await _taken(file.id, token, request, workshop)
    return JSONResponse({"access_url": _address(file, request, workshop)})


async def begin_multipart(request: Request, workshop: Workshop) -> Response:
    """Begins an upload in parts, as Python's client does it."""
    file, token = await _expected(request, workshop, request.headers.get(FILE_NAME))
    await run_in_threadpool(workshop.parts.sweep, workshop.files)
    address = _address(file, request, workshop)
    return JSONResponse({"access_url": address, "uploadId": token})


async def initiate(request: Request, workshop: Workshop) -> Response:
    """Says where to upload a file to."""
    file, token = await _announced(request, workshop)
    return _initiated(file, f"/storage/upload/{file.id}?token={token}", request, workshop)


async def initiate_multipart(request: Request, workshop: Workshop) -> Response:
    """Says where to upload the parts of a file to."""
    file, token = await _announced(request, workshop)
    await run_in_threadpool(workshop.parts.sweep, workshop.files)
    return _initiated(file, f"/storage/upload/{file.id}/parts?token={token}", request, workshop)


async def put_file(request: Request, workshop: Workshop) -> Response:
    """Takes a file at the address that was said."""
    id, token = _authorised(request)
    await _taken(id, token, request, workshop)
    return JSONResponse({})


async def put_part(request: Request, workshop: Workshop) -> Response:
    """Takes one part; its ETag is in a header for Python's client, in the body for JavaScript's."""
    id, token = _authorised(request)
    number = _number(request.path_params["number"])
    if not await run_in_threadpool(workshop.files.is_expected, id, token):
        raise _not_expected()
    _check_length(request, workshop.settings.max_upload_bytes)
    workshop.room.require()
    limit = workshop.settings.max_upload_bytes
    try:
        etag = await workshop.parts.put(id, number, request.stream(), workshop.files, limit)
    except TooLarge:
        raise _too_large(workshop) from None
    headers = {"ETag": f'"{etag}"'}
    return JSONResponse({"partNumber": number, "etag": etag}, headers=headers)


async def complete(request: Request, workshop: Workshop) -> Response:
    """Joins the parts, in the order of their numbers."""
    id, token = _authorised(request)
    if not await run_in_threadpool(workshop.files.is_expected, id, token):
        raise _not_expected()
    named = _named_parts(await read_json(request, _MAX_JSON))
    paths = workshop.parts.whole(id, named)
    limit = workshop.settings.max_upload_bytes
    try:
        file = await workshop.files.take(id, token, _joined(paths), limit=limit)
    except NotExpected:
        raise _not_expected() from None
    except TooLarge:
        raise _too_large(workshop) from None
    await run_in_threadpool(workshop.parts.remove, id, workshop.files)
    return JSONResponse({"access_url": _address(file, request, workshop)})


async def _announced(request: Request, workshop: Workshop) -> tuple[StoredFile, str]:
    workshop.room.require()
    body = await read_json(request, _MAX_JSON)
    texts = {name: body.get(name) for name in Announced.model_fields}
    for name, text in texts.items():
        if not (text is None or isinstance(text, str)):
            raise Refusal.of(name, "is no text")
    name, content_type = texts["file_name"] or "upload.bin", texts["content_type"]
    return await run_in_threadpool(workshop.files.expect, name, content_type or OTHER_CONTENT)


async def _expected(
    request: Request, workshop: Workshop, name: str | None
) -> tuple[StoredFile, str]:
    """Makes place for a file of a client that has a key, or a token that was given for one.

    Raises:
        Refusal: it has neither.
    """
    if not (has_key(request) or await run_in_threadpool(_has_token, request, workshop)):
        raise Refusal("unauthorized", "the token for uploads is none, or too old; ask for another")
    content_type = request.headers.get("content-type", OTHER_CONTENT)
    workshop.room.require()
    return await run_in_threadpool(workshop.files.expect, name or "upload.bin", content_type)


async def _taken(id: str, token: str, request: Request, workshop: Workshop) -> StoredFile:
    limit = workshop.settings.max_upload_bytes
    _check_length(request, limit)
    workshop.room.require()
    try:
        return await workshop.files.take(id, token, request.stream(), limit=limit)
    except NotExpected:
        raise _not_expected() from None
    except TooLarge:
        raise _too_large(workshop) from None


def _token_until(expires: int, workshop: Workshop) -> str:
    """A token that is good until a moment, in seconds since 1970; nothing is kept of it."""
    code = hmac.digest(_secret(workshop.settings.data.resolve()), str(expires).encode(), "sha256")
    return f"{expires}.{code.hex()}"


def _has_token(request: Request, workshop: Workshop) -> bool:
    given = request.headers.get("authorization", "").partition(" ")[2].strip()
    text = given.partition(".")[0]
    expires = int(text) if re.fullmatch("[0-9]{1,12}", text) else 0
    right = _token_until(expires, workshop)
    return expires > time.time() and hmac.compare_digest(given.encode(), right.encode())


@cache
def _secret(data: Path) -> bytes:
    """What tokens are made with: of the one secret file of a server, for this purpose alone."""
    webhook_key(data)
    return hmac.digest((data / KEY_NAME).read_bytes(), b"tokens for uploads", "sha256")


def _initiated(file: StoredFile, path: str, request: Request, workshop: Workshop) -> Response:
    answer = Initiated(
        upload_url=workshop.base_url(request) + path,
        file_url=_address(file, request, workshop),
    )
    return JSONResponse(answer.model_dump())


def _address(file: StoredFile, request: Request, workshop: Workshop) -> str:
    return workshop.base_url(request) + file.address


def _authorised(request: Request) -> tuple[str, str]:
    """The id of a file and the token that came with it."""
    places = request.path_params
    return places["id"], places.get("upload_id") or request.query_params.get("token", "")


def _number(text: str) -> int:
    number = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if not 1 <= number <= _MAX_PARTS:
        raise Refusal("malformed", f"got part `{text[:20]}`; allowed: 1 to {_MAX_PARTS}")
    return number


def _named_parts(body: Mapping[str, Any]) -> dict[int, str]:
    """Number to ETag of the parts that a client names.

    Raises:
        Refusal: they are no whole file.
    """
    parts = body.get("parts")
    if not isinstance(parts, list) or not parts or len(parts) > _MAX_PARTS:
        raise Refusal("malformed", f"`parts` must be a list of 1 to {_MAX_PARTS} parts")
    named: dict[int, str] = {}
    for part in parts:
        number = part.get("partNumber") if isinstance(part, dict) else None
        etag = part.get("etag") if isinstance(part, dict) else None
        if type(number) is not int or not isinstance(etag, str) or number in named:
            raise Refusal(
                "malformed", "each of `parts` has a `partNumber` of its own and an `etag`"
            )
        named[number] = etag.strip('"')
    missing = set(range(1, len(named) + 1)) - named.keys()
    if missing:
        raise Refusal("malformed", f"part {min(missing)} is missing")
    return named


async def _joined(paths: list[Path]) -> AsyncIterator[bytes]:
    for path in paths:
        with await run_in_threadpool(open, path, "rb") as file:
            while chunk := await run_in_threadpool(file.read, _CHUNK):
                yield chunk


def _check_length(request: Request, limit: int) -> None:
    """Refuses before anything is read."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise Refusal("too_large", f"the file has more than {limit} bytes")


def _too_large(workshop: Workshop) -> Refusal:
    most = workshop.settings.max_upload_mib
    return Refusal("too_large", f"the file has more than {most} MiB, which is what is taken here")


def _not_expected() -> Refusal:
    return Refusal("forbidden", "the upload is over, or was never begun; begin a new one")
