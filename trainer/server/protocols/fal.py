"""fal's protocol: queue, synchronous runs, storage, keys of webhooks, the JavaScript route."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, RootModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainer.server.fal import answers, apps, outcomes, proxy, requests, storage
from trainer.server.fal.answers import ErrorBody
from trainer.server.fal.signing import signature
from trainer.server.operations import Operation
from trainer.server.queue import Job
from trainer.server.refusals import Refusal
from trainer.server.signing import WebhookKey, webhook_key
from trainer.server.workshop import Workshop

NAME = apps.NAME
PREFIXES = ("",)

_REQUEST = "/{owner}/{alias}/requests/{request_id}"
# People write addresses without the app.
_WITHOUT_APP = "/requests/{request_id}"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# Who receivers of webhooks are told sent them: this server has no accounts.
_USER = "local"


class Keys(BaseModel):
    """The keys that webhooks are signed with, as JWKS."""

    keys: list[dict[str, str]]


class Output(RootModel[dict[str, Any]]):
    """What an app answers; its shape is the app's own."""


def refused(refusal: Refusal) -> Response:
    """fal's answer to a refusal."""
    return answers.refused(refusal)


def announced(job: Job, workshop: Workshop) -> Mapping[str, Any]:
    """What a webhook is told of a job that is over."""
    base_url = (job.webhook or {}).get("base_url", "")
    end = outcomes.outcome(job, workshop, base_url)
    told = {"request_id": job.id, "gateway_request_id": job.id, "payload": end.body}
    if not end.error:
        return {**told, "status": "OK"}
    return {**told, "status": "ERROR", "error": f"Invalid status code: {end.status}"}


def signed(job: Job, body: bytes, workshop: Workshop) -> Mapping[str, str]:
    """The headers by which a webhook knows that it is told by this server."""
    return signature(_key(workshop), job.id, _USER, int(time.time()), body)


async def keys(request: Request, workshop: Workshop) -> Response:
    """The keys that webhooks are signed with."""
    key = await run_in_threadpool(_key, workshop)
    return JSONResponse(key.jwks())


def _key(workshop: Workshop) -> WebhookKey:
    return webhook_key(workshop.settings.data.resolve())


def _operations() -> Iterator[Operation]:
    names = apps.apps()
    for app in names:
        body, output = apps.input_of(app), apps.output_of(app)
        yield Operation(
            "POST",
            f"/{app}",
            requests.submits(app),
            f"Submit a request for {app}",
            NAME,
            body=body,
            query=requests.SubmitQuery,
            answer=answers.Submitted,
            error=ErrorBody,
        )
        yield Operation(
            "POST",
            f"/run/{app}",
            requests.runs(app),
            f"Run {app}, and answer with its result",
            NAME,
            body=body,
            answer=output,
            error=ErrorBody,
        )
    for owner in sorted({app.partition("/")[0] for app in names}):
        for path in (f"/{owner}/{{alias:path}}", f"/run/{owner}/{{alias:path}}"):
            yield Operation("POST", path, requests.unknown_app, "No app", NAME, is_listed=False)
    yield from _of_requests(_REQUEST, is_listed=True)
    yield from _of_requests(_WITHOUT_APP, is_listed=False)
    yield from _STORAGE
    for method in _METHODS:
        yield Operation(
            method, proxy.PATH, proxy.proxy, "Ask as JavaScript does", NAME, is_listed=False
        )
    yield Operation(
        "GET",
        "/.well-known/jwks.json",
        keys,
        "The keys that webhooks are signed with",
        NAME,
        answer=Keys,
        error=ErrorBody,
    )


def _of_requests(path: str, *, is_listed: bool) -> Iterator[Operation]:
    yield Operation(
        "GET",
        f"{path}/status",
        requests.status,
        "Where a request stands",
        NAME,
        query=requests.StatusQuery,
        answer=answers.Status,
        error=ErrorBody,
        other_statuses=(202,),
        is_listed=is_listed,
    )
    yield Operation(
        "GET",
        f"{path}/status/stream",
        requests.stream,
        "Where a request stands, as it changes",
        NAME,
        query=requests.StatusQuery,
        error=ErrorBody,
        media="text/event-stream",
        is_listed=is_listed,
    )
    yield Operation(
        "GET",
        path,
        requests.result,
        "What a request led to",
        NAME,
        answer=Output,
        error=ErrorBody,
        is_listed=is_listed,
    )
    yield Operation(
        "PUT",
        f"{path}/cancel",
        requests.cancel,
        "Cancel a request",
        NAME,
        answer=answers.Cancelled,
        error=ErrorBody,
        other_statuses=(202, 400, 404),
        is_listed=is_listed,
    )


_PARTS_OF_PYTHON = "/files/{id}/{name}/multipart/{upload_id}"
_PARTS_OF_JAVASCRIPT = "/storage/upload/{id}/parts"

_STORAGE = (
    Operation(
        "POST",
        "/storage/auth/token",
        storage.token,
        "Get a token for uploads",
        NAME,
        answer=storage.Token,
        error=ErrorBody,
    ),
    Operation(
        "POST",
        "/files/upload",
        storage.upload,
        "Upload a file",
        NAME,
        takes_bytes=True,
        answer=storage.Uploaded,
        error=ErrorBody,
    ),
    Operation(
        "POST",
        "/files/upload/multipart",
        storage.begin_multipart,
        "Begin an upload in parts",
        NAME,
        answer=storage.MultipartBegun,
        error=ErrorBody,
    ),
    Operation(
        "POST",
        "/storage/upload/initiate",
        storage.initiate,
        "Ask for an address to upload to",
        NAME,
        body=storage.Announced,
        answer=storage.Initiated,
        error=ErrorBody,
    ),
    Operation(
        "POST",
        "/storage/upload/initiate-multipart",
        storage.initiate_multipart,
        "Ask for an address to upload parts to",
        NAME,
        body=storage.Announced,
        answer=storage.Initiated,
        error=ErrorBody,
    ),
    Operation(
        "PUT",
        "/storage/upload/{id}",
        storage.put_file,
        "Upload to an address that was asked for",
        NAME,
        query=storage.TokenQuery,
        takes_bytes=True,
        answer=storage.Done,
        error=ErrorBody,
    ),
    *(
        operation
        for path, query in ((_PARTS_OF_PYTHON, None), (_PARTS_OF_JAVASCRIPT, storage.TokenQuery))
        for operation in (
            Operation(
                "PUT",
                f"{path}/{{number}}",
                storage.put_part,
                "Upload a part",
                NAME,
                query=query,
                takes_bytes=True,
                answer=storage.Part,
                error=ErrorBody,
            ),
            Operation(
                "POST",
                f"{path}/complete",
                storage.complete,
                "Join the parts",
                NAME,
                body=storage.Parts,
                query=query,
                answer=storage.Uploaded,
                error=ErrorBody,
            ),
        )
    ),
)

OPERATIONS = tuple(_operations())
