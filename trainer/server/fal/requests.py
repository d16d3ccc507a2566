"""fal's queue: submit, status, stream of statuses, result, cancel, and the run that waits."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trainer.server.fal import answers, apps, outcomes
from trainer.server.fal.answers import REQUEST_ID, LogEntry, Status, Submitted
from trainer.server.queue import Job, NewJob
from trainer.server.refusals import Refusal
from trainer.server.security import body_is_done, read_json
from trainer.server.webhooks import checked_webhook
from trainer.server.workshop import IDEMPOTENCY_KEY, Workshop

Handler = Callable[[Request, Workshop], Awaitable[Response]]

PRIORITY = "x-fal-queue-priority"
START_TIMEOUT = "x-fal-request-timeout"
WEBHOOK = "fal_webhook"
MAX_QUEUE = "fal_max_queue_length"

_PRIORITIES = {"normal": 0, "low": 1}
_YES = ("1", "true", "yes", "on")
_LOOK_SECONDS = 0.2
# Clients and proxies give up on a stream that is silent; JavaScript's after 15 seconds.
_PING_SECONDS = 10.0
# No reason phrase and nobody to read it: what servers log where a client went away.
_CLIENT_GONE = 499


class SubmitQuery(BaseModel):
    """What stands in the address of a submission."""

    fal_webhook: str | None = Field(None, description="Address that is told of the end.")
    fal_max_queue_length: int | None = Field(
        None, ge=0, description="Refuse the request where more wait."
    )


class StatusQuery(BaseModel):
    """What stands in the address of a question for the status."""

    logs: str | None = Field(None, description="`1` or `true`: with the log.")


def submits(app: str) -> Handler:
    """The handler that takes requests for an app."""

    async def submit(request: Request, workshop: Workshop) -> Response:
        job = await _submitted(app, request, workshop)
        submitted = Submitted(
            **answers.addresses(job, workshop.base_url(request)),
            gateway_request_id=job.id,
            queue_position=await run_in_threadpool(workshop.queue.position, job),
            training_id=job.id if job.kind == "training" else None,
        )
        content = submitted.model_dump(mode="json")
        if submitted.training_id is None:
            del content["training_id"]
        return _answer(job, content)

    return submit


def runs(app: str) -> Handler:
    """The handler that takes requests for an app and answers when they are over.

    A client that goes away ends its job, since nobody else knows of it; with an idempotency key it
    can come back, and the job goes on.
    """

    async def run(request: Request, workshop: Workshop) -> Response:
        job = await _submitted(app, request, workshop)
        while not job.is_over:
            if await request.is_disconnected():
                if job.idempotency_key is None:
                    await run_in_threadpool(workshop.queue.request_cancel, job.id)
                return Response(status_code=_CLIENT_GONE)
            await asyncio.sleep(_LOOK_SECONDS)
            job = await _found(job.id, workshop)
        return await _ended(job, request, workshop)

    return run


async def unknown_app(request: Request, workshop: Workshop) -> Response:
    """Says which apps there are."""
    asked = request.url.path.removeprefix("/run").strip("/")
    names = ", ".join(f"`{name}`" for name in apps.apps())
    raise Refusal("not_found", f"there is no app `{asked[:100]}` here; there are: {names}")


async def status(request: Request, workshop: Workshop) -> Response:
    """Where a request stands: 202 before its end, 200 then; one client reads nothing else."""
    job = await _found(request.path_params["request_id"], workshop)
    base_url, with_logs = workshop.base_url(request), _wants_logs(request)
    content = await run_in_threadpool(_status, job, workshop, base_url, with_logs)
    return _answer(job, _as_content(content), 200 if job.is_over else 202)


async def stream(request: Request, workshop: Workshop) -> Response:
    """The statuses of a request as they change, with the new lines of its log alone.

    Clients add lines up here, and do not where they poll. `COMPLETED` is the last event.
    """
    job = await _found(request.path_params["request_id"], workshop)
    events = _events(job, workshop, workshop.base_url(request), _wants_logs(request))
    headers = {REQUEST_ID: job.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def result(request: Request, workshop: Workshop) -> Response:
    """What a request led to, without an envelope."""
    job = await _found(request.path_params["request_id"], workshop)
    if not job.is_over:
        text = "Request is still in progress"
        raise Refusal("unfinished", text, headers={REQUEST_ID: job.id})
    return await _ended(job, request, workshop)


async def cancel(request: Request, workshop: Workshop) -> Response:
    """Ends a request: at once in the queue, soon where it runs."""
    id = request.path_params["request_id"]
    try:
        job = await _found(id, workshop)
    except Refusal as refusal:
        content = answers.error_body(refusal.message)
        return JSONResponse({"status": "NOT_FOUND", **content}, refusal.status)
    before = await run_in_threadpool(workshop.queue.request_cancel, job.id)
    if before is None or before.is_over:
        content = answers.error_body("the request is over already")
        return _answer(job, {"status": "ALREADY_COMPLETED", **content}, 400)
    if before.state == "queued":
        return _answer(job, {"status": "OK"})
    return _answer(job, {"status": "CANCELLATION_REQUESTED"}, 202)


async def _submitted(app: str, request: Request, workshop: Workshop) -> Job:
    """Puts what is asked for into the queue.

    Raises:
        Refusal: it is not taken.
    """
    priority, start_within = _priority(request), _start_within(request)
    longest = _longest_queue(request)
    url = request.query_params.get(WEBHOOK)
    webhook = None
    if url is not None:
        checked_webhook(url, WEBHOOK)
        webhook = {"url": url, "base_url": workshop.base_url(request)}
    key = request.headers.get(IDEMPOTENCY_KEY)
    # JavaScript's client sends nothing at all for no input.
    payload = (
        await read_json(request, workshop.settings.max_body_bytes) if _has_body(request) else {}
    )

    def submitted() -> Job:
        kind = apps.kind_of(app, payload)
        new = NewJob(
            protocol=apps.NAME,
            app=app,
            kind=kind,
            request=payload,
            priority=priority,
            webhook=webhook,
            idempotency_key=key,
        )

        def work() -> str:
            waiting = workshop.queue.counts().get("queued", 0)
            if longest is not None and waiting > longest:
                message = f"{waiting} jobs wait already; `{MAX_QUEUE}` is {longest}"
                raise Refusal("queue_full", message)
            return apps.work_of(app, kind, payload, workshop)

        return workshop.submit(new, work, start_within=start_within)

    try:
        return await run_in_threadpool(submitted)
    finally:
        body_is_done(request)


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or (
        "transfer-encoding" in request.headers
    )


def _priority(request: Request) -> int:
    asked = request.headers.get(PRIORITY, "normal")
    if asked not in _PRIORITIES:
        raise Refusal.of(PRIORITY, f"got `{asked[:40]}`; allowed: {', '.join(_PRIORITIES)}")
    return _PRIORITIES[asked]


def _longest_queue(request: Request) -> int | None:
    """Before how many waiting jobs the request is to be refused."""
    text = request.query_params.get(MAX_QUEUE)
    if text is not None and not re.fullmatch("[0-9]{1,9}", text):
        raise Refusal.of(MAX_QUEUE, f"got `{text[:40]}`; allowed: a whole number, at least 0")
    return None if text is None else int(text)


def _start_within(request: Request) -> float | None:
    """Seconds in which the job must begin."""
    text = request.headers.get(START_TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refusal.of(START_TIMEOUT, f"got `{text[:40]}`; allowed: seconds, above 0")
    return seconds


async def _found(id: str, workshop: Workshop) -> Job:
    return await run_in_threadpool(workshop.job, id, apps.NAME)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs", "").lower() in _YES


def _status(job: Job, workshop: Workshop, base_url: str, with_logs: bool) -> Status:
    addresses = answers.addresses(job, base_url)
    if job.state == "queued":
        position = workshop.queue.position(job)
        return Status(status="IN_QUEUE", queue_position=position, logs=None, **addresses)
    logs = outcomes.log_of(job, workshop) if with_logs else None
    if not job.is_over:
        return Status(status="IN_PROGRESS", logs=logs, **addresses)
    end = outcomes.outcome(job, workshop, base_url)
    return Status(
        status="COMPLETED",
        logs=logs,
        metrics={"inference_time": outcomes.seconds_of(job)},
        error=end.error or None,
        error_type=end.error_type or None,
        **addresses,
    )


def _as_content(status: Status) -> dict[str, Any]:
    """The status without what is of other states; `logs` is always there."""
    return {"logs": None, **status.model_dump(mode="json", exclude_none=True)} | (
        {"metrics": status.metrics} if status.metrics else {}
    )


async def _ended(job: Job, request: Request, workshop: Workshop) -> Response:
    base_url = workshop.base_url(request)
    end = await run_in_threadpool(outcomes.outcome, job, workshop, base_url)
    return _answer(job, dict(end.body), end.status, dict(end.headers))


async def _events(
    job: Job, workshop: Workshop, base_url: str, with_logs: bool
) -> AsyncIterator[str]:
    said: Status | None = None
    lines: list[LogEntry] = []
    told = time.monotonic()
    while True:
        found = await run_in_threadpool(workshop.queue.find, job.id)
        if found is None:
            return
        now = await run_in_threadpool(_status, found, workshop, base_url, with_logs)
        known, lines = len(lines), now.logs or []
        fresh = lines[known:]
        now = now.model_copy(update={"logs": None if now.logs is None else fresh})
        if fresh or said is None or now != said.model_copy(update={"logs": now.logs}):
            said, told = now, time.monotonic()
            yield f"data: {_json(now)}\n\n"
        elif time.monotonic() - told > _PING_SECONDS:
            told = time.monotonic()
            yield ": ping\n\n"
        if now.status == "COMPLETED":
            return
        await asyncio.sleep(_LOOK_SECONDS)


def _json(status: Status) -> str:
    return bytes(JSONResponse(_as_content(status)).body).decode()


def _answer(
    job: Job,
    content: dict[str, Any],
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    return JSONResponse(content, status, headers={REQUEST_ID: job.id, **(headers or {})})
