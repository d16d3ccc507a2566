"""BFL's routes: finetunes, pictures with them, and what became of both.

All regions of the service are one here.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainer.dialects import bfl as dialect
from trainer.errors import InputError, Missing
from trainer.server.bfl import pictures, tasks
from trainer.server.bfl.messages import (
    Credits,
    Deleted,
    Detail,
    Error,
    FinetuneDetails,
    FinetuneQuery,
    FinetuneRequest,
    Finetunes,
    Submitted,
    TaskQuery,
    TaskResult,
)
from trainer.server.bfl.pictures import WAYS, Asked, NoBase, Way, Webhooked
from trainer.server.bodies import checked, refused_input
from trainer.server.operations import Operation
from trainer.server.queue import Job, NewJob
from trainer.server.refusals import Reason, Refusal
from trainer.server.security import read_json
from trainer.server.signing import sign_with_secret
from trainer.server.webhooks import checked_webhook
from trainer.server.workshop import IDEMPOTENCY_KEY, Workshop

NAME = tasks.NAME
PREFIXES = ("/v1",)
SERVICE = dialect.SERVICE

_SIGNATURE = "X-BFL-Signature"
_ITERATIONS = "iterations"
# The service's own minimum; the owner's setting may be below it.
_FEWEST_ITERATIONS = 100
# Not kept with a job, or not told of.
_ARCHIVE, _WEBHOOK, _SECRET = "file_data", "webhook_url", "webhook_secret"
_NOT_READY = "Finetune not found or not ready"
_NO_FINETUNE = "Finetune not found or access denied"
_STATUSES: Mapping[Reason, int] = {"malformed": 422, "unauthorized": 403}
_LOOK_SECONDS = 0.2


class ServiceRefusal(Refusal):
    """A refusal for which the service has a sentence and a status of its own."""

    def __init__(self, reason: Reason, status: int, message: str) -> None:
        super().__init__(reason, message)
        self.service_status = status


async def finetune(request: Request, workshop: Workshop) -> Response:
    """Begins a finetune."""
    payload = await read_json(request)

    def submitted() -> Job:
        webhook, kept = _webhook(payload, workshop.base_url(request))
        asked = {name: value for name, value in kept.items() if name != _WEBHOOK}
        asked, over = _few_iterations(asked, workshop.settings.min_finetune_iterations)
        new = NewJob(
            *(NAME, "finetune", "training", kept),
            name=str(payload.get("finetune_comment", "")),
            webhook=webhook,
            idempotency_key=request.headers.get(IDEMPOTENCY_KEY),
        )
        return workshop.submit(new, lambda: workshop.training(NAME, asked, over))

    job = await run_in_threadpool(submitted)
    told = _submitted(job, workshop.base_url(request))
    return _answer(told.model_copy(update={"finetune_id": job.id}), exclude_none=True)


def makes_pictures(way: str) -> Callable[[Request, Workshop], Awaitable[Response]]:
    """The handler of one way of making pictures."""

    async def make(request: Request, workshop: Workshop) -> Response:
        payload = await read_json(request)
        job = await run_in_threadpool(_with_finetune, way, payload, request, workshop)
        return _answer(_submitted(job, workshop.base_url(request)), exclude_none=True)

    return make


async def result(request: Request, workshop: Workshop) -> Response:
    """Tells where a task stands."""
    id, base_url = request.query_params.get("id", ""), workshop.base_url(request)

    def told() -> TaskResult | None:
        job = _job(id, workshop)
        return None if job is None else tasks.task(job, workshop, base_url)

    found = await run_in_threadpool(told)
    if found is None:
        # The status too: what polls until the body says Ready would go on for ever.
        return _answer(TaskResult(id=id[:64], status=tasks.NOT_THERE), status=404)
    return _answer(found)


async def finetunes(request: Request, workshop: Workshop) -> Response:
    """Lists finetunes."""

    def told() -> Finetunes:
        _sweep(workshop)
        jobs = workshop.queue.listed(NAME, "training")
        return Finetunes(finetunes=[job.id for job in jobs if not job.cancel_requested])

    return _answer(await run_in_threadpool(told))


async def details(request: Request, workshop: Workshop) -> Response:
    """Tells what a finetune was asked to be."""
    id = request.query_params.get("finetune_id", "")

    def told() -> FinetuneDetails:
        job = _finetune(id, workshop)
        fields = {n: f for n, f in dialect.Input.model_fields.items() if not f.is_required()}
        defaults = {name: info.default for name, info in fields.items()}
        asked = {name: value for name, value in job.request.items() if value is not None}
        status = tasks.task(job, workshop, "").status
        told = {**defaults, **asked, "finetune_id": job.id, "status": status}
        told.pop(_ARCHIVE, None)
        return FinetuneDetails(finetune_details=told)

    return _answer(await run_in_threadpool(told))


async def delete(request: Request, workshop: Workshop) -> Response:
    """Ends a finetune where it still runs, and removes all of it once no picture needs it."""
    payload = await read_json(request)

    def deleted() -> Job:
        asked = checked(payload, FinetuneQuery, SERVICE)
        job = _finetune(asked.finetune_id, workshop)
        workshop.queue.request_cancel(job.id)
        _remove_unless_needed(job, workshop)
        return job

    job = await run_in_threadpool(deleted)
    told = Deleted(
        message="the finetune was deleted",
        deleted_finetune_id=job.id,
        timestamp=datetime.now(UTC).isoformat(),
    )
    return _answer(told, background=BackgroundTask(_remove_when_over, job, workshop))


async def credits(request: Request, workshop: Workshop) -> Response:
    """Tells what is left to spend."""
    return _answer(Credits())


def refused(refusal: Refusal) -> Response:
    """The service's answer to a refusal."""
    status = _STATUSES.get(refusal.reason, refusal.status)
    if isinstance(refusal, ServiceRefusal):
        status = refusal.service_status
    detail: str | list[Detail] = refusal.message
    if refusal.reason == "malformed":
        detail = [Detail(loc=["body"], msg=refusal.message, type="json_invalid")]
    if refusal.problems:
        detail = [
            Detail(
                loc=["body", *problem.field.split(".")],
                msg=f"{problem.message}; {problem.hint}" if problem.hint else problem.message,
                type="missing" if isinstance(problem, Missing) else "value_error",
            )
            for problem in refusal.problems
        ]
    return JSONResponse(Error(detail=detail).model_dump(), status, refusal.headers)


def announced(job: Job, workshop: Workshop) -> Mapping[str, Any]:
    """What a webhook is told of a task that is over."""
    assert job.webhook is not None
    return tasks.announcement(job, workshop, job.webhook["base_url"])


def signed(job: Job, body: bytes, workshop: Workshop) -> Mapping[str, str]:
    """The signature by the secret that came with the request, if one did."""
    secret = (job.webhook or {}).get("secret")
    return sign_with_secret(_SIGNATURE, secret, body) if secret else {}


def _with_finetune(
    name: str, payload: Mapping[str, Any], request: Request, workshop: Workshop
) -> Job:
    """Puts the making of a picture into the queue."""
    way, base_url = WAYS[name], workshop.base_url(request)
    asked = checked(payload, way.model, pictures.SERVICE)
    webhook, kept = _webhook(payload, base_url)
    trained = _job(asked.finetune_id, workshop)
    if trained is None or trained.kind != "training" or trained.state != "done":
        raise ServiceRefusal("invalid", 400, _NOT_READY)
    new = NewJob(
        *(NAME, name, "generation", kept),
        webhook=webhook,
        idempotency_key=request.headers.get(IDEMPOTENCY_KEY),
    )
    return workshop.submit(new, lambda: _picture(asked, payload, way, trained, workshop))


def _picture(
    asked: Asked, payload: Mapping[str, Any], way: Way, trained: Job, workshop: Workshop
) -> str:
    """The work of making a picture with a finetune."""
    try:
        wanted = pictures.generation_request(asked, payload, way, trained, workshop)
    except InputError as error:
        raise refused_input(error) from error
    except NoBase as error:
        raise ServiceRefusal("invalid", 400, error.message) from error
    return wanted.model_dump_json()


def _webhook(
    payload: Mapping[str, Any], base_url: str
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Whom to tell of a task's end, and the request without the secret.

    Raises:
        Refusal: nobody may be told there.
    """
    asked = checked({n: payload.get(n) for n in (_WEBHOOK, _SECRET)}, Webhooked, SERVICE)
    kept = {name: value for name, value in payload.items() if name != _SECRET}
    if asked.webhook_url is None:
        return None, kept
    url = checked_webhook(asked.webhook_url, _WEBHOOK)
    return {"url": url, "base_url": base_url, "secret": asked.webhook_secret}, kept


def _few_iterations(
    asked: dict[str, Any], fewest: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A request with as many iterations as the service takes, and the option that is meant."""
    wanted = asked.get(_ITERATIONS)
    if not isinstance(wanted, int) or not fewest <= wanted < _FEWEST_ITERATIONS:
        return asked, None
    return {**asked, _ITERATIONS: _FEWEST_ITERATIONS}, {field_leaf(_ITERATIONS): wanted}


def field_leaf(field: str) -> str:
    """The option that a field of a finetune is."""
    return dialect.RENAMED[field]


def _job(id: str, workshop: Workshop) -> Job | None:
    """A task that is not deleted."""
    job = workshop.queue.find(id)
    is_there = job is not None and job.protocol == NAME and not job.cancel_requested
    return job if is_there else None


def _finetune(id: str, workshop: Workshop) -> Job:
    job = _job(id, workshop)
    if job is None or job.kind != "training":
        raise ServiceRefusal("not_found", 404, _NO_FINETUNE)
    return job


async def _remove_when_over(job: Job, workshop: Workshop) -> None:
    """Removes a deleted finetune; where the server ends before, the next list does it."""
    while (found := await run_in_threadpool(workshop.queue.find, job.id)) is not None:
        if await run_in_threadpool(_remove_unless_needed, found, workshop):
            return
        await asyncio.sleep(_LOOK_SECONDS)


def _sweep(workshop: Workshop) -> None:
    """Removes deleted finetunes that have come to their end."""
    for job in workshop.queue.listed(NAME, "training"):
        if job.cancel_requested:
            _remove_unless_needed(job, workshop)


def _remove_unless_needed(job: Job, workshop: Workshop) -> bool:
    """Removes a finetune that is over and that no picture under way is made with."""
    folder = workshop.folders.of(job.id).root
    works = workshop.queue.works(under_way=True) if job.is_over else []
    if not job.is_over or any(str(folder.resolve()) in work for work in works):
        return False
    workshop.files.forget_job(job.id)
    shutil.rmtree(folder, ignore_errors=True)
    workshop.queue.forget([job.id])
    return True


def _submitted(job: Job, base_url: str) -> Submitted:
    hook = job.webhook
    return Submitted(
        id=job.id,
        polling_url=f"{base_url}/v1/get_result?id={job.id}",
        status=None if hook is None else "Pending",
        webhook_url=None if hook is None else hook["url"],
    )


def _answer(
    body: BaseModel,
    *,
    status: int = 200,
    exclude_none: bool = False,
    background: BackgroundTask | None = None,
) -> Response:
    content = body.model_dump(exclude_none=exclude_none)
    return JSONResponse(content, status, background=background)


OPERATIONS = (
    Operation(
        *("POST", "/v1/finetune", finetune, "Begin a finetune", NAME),
        body=FinetuneRequest,
        answer=Submitted,
        error=Error,
    ),
    Operation(
        *("GET", "/v1/get_result", result, "Tell where a task stands", NAME),
        query=TaskQuery,
        answer=TaskResult,
        other_statuses=(404,),
        error=Error,
    ),
    Operation(
        *("GET", "/v1/my_finetunes", finetunes, "List finetunes", NAME),
        answer=Finetunes,
        error=Error,
    ),
    Operation(
        *("GET", "/v1/finetune_details", details, "Tell what a finetune is", NAME),
        query=FinetuneQuery,
        answer=FinetuneDetails,
        error=Error,
    ),
    Operation(
        *("POST", "/v1/delete_finetune", delete, "Delete a finetune", NAME),
        body=FinetuneQuery,
        answer=Deleted,
        error=Error,
    ),
    Operation(
        *("GET", "/v1/credits", credits, "Tell what is left to spend", NAME),
        answer=Credits,
        error=Error,
    ),
    *(
        Operation(
            *("POST", f"/v1/{name}", makes_pictures(name), way.model.__doc__ or "", NAME),
            body=way.model,
            answer=Submitted,
            error=Error,
        )
        for name, way in WAYS.items()
    ),
)
