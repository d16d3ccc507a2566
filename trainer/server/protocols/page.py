"""The page's routes: prepare, train, look on, fetch, try; jobs of every protocol are listed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from trainer.server.operations import Operation
from trainer.server.own import assets, run_files, standing, submissions
from trainer.server.own.form import form
from trainer.server.own.messages import (
    Checked,
    Error,
    Events,
    EventsQuery,
    Form,
    JobDetails,
    JobLine,
    Jobs,
    JobsQuery,
    Prepared,
    ReportAddress,
    Submission,
    Wanted,
)
from trainer.server.queue import Job, Kind, NewJob
from trainer.server.refusals import Refusal
from trainer.server.security import read_json
from trainer.server.workshop import IDEMPOTENCY_KEY, Workshop

NAME = standing.NAME
PREFIXES = ("/trainer", "/page")

_JOB = "/trainer/jobs/{id}"
_MOST_JSON = 2**24
_PRIVATE = {
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}
# What a report may do: show itself. It speaks of captions and prompts that strangers wrote.
_REPORT = {
    **_PRIVATE,
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; frame-ancestors 'self'",
}


async def choices(request: Request, _: Workshop) -> Response:
    """Tells what can be chosen."""
    return _answer(await run_in_threadpool(form))


async def check(request: Request, workshop: Workshop) -> Response:
    """Tells what a submission means, or what is wrong with it, whatever its pictures."""
    sent = submissions.received(await read_json(request, _MOST_JSON), Submission)
    return _answer(await run_in_threadpool(submissions.checked, sent, workshop))


async def prepare(request: Request, workshop: Workshop) -> Response:
    """Prepares pictures, to be looked at."""
    return await _submitted("preparation", request, workshop)


async def train(request: Request, workshop: Workshop) -> Response:
    """Begins a training."""
    return await _submitted("training", request, workshop)


async def jobs(request: Request, workshop: Workshop) -> Response:
    """Lists the jobs of all protocols, newest first."""
    try:
        asked = JobsQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise Refusal.of(name, "is no whole number, or out of range") from error

    def told() -> Jobs:
        found = workshop.queue.recent(limit=asked.limit + 1, offset=asked.offset)
        lines = [standing.line(job, workshop) for job in found[: asked.limit]]
        return Jobs(jobs=lines, more=len(found) > asked.limit)

    return _answer(await run_in_threadpool(told))


async def job(request: Request, workshop: Workshop) -> Response:
    """Tells all that is known of a job."""
    return _answer(
        await run_in_threadpool(lambda: standing.details(_job(request, workshop), workshop))
    )


async def events(request: Request, workshop: Workshop) -> Response:
    """Tells what a job has said since a place in its log."""
    since = request.query_params.get("since", "")

    def told() -> Events:
        # Before its log: of a job that is over all is said.
        job = _job(request, workshop)
        said = run_files.said_since(workshop.folders.of(job.id).run.events, since)
        return Events(
            job=standing.line(job, workshop),
            events=standing.without_paths(said.events, workshop),
            next=said.next,
            restarted=said.restarted,
            more=said.more,
        )

    return _answer(await run_in_threadpool(told))


async def prepared(request: Request, workshop: Workshop) -> Response:
    """Tells how pictures were prepared."""

    def told() -> Prepared:
        found = run_files.prepared(workshop.folders.of(_job(request, workshop).id).run)
        return Prepared.model_validate(standing.without_paths(found.model_dump(), workshop))

    return _answer(await run_in_threadpool(told))


async def picture(request: Request, workshop: Workshop) -> Response:
    """A picture of a run folder."""

    def found() -> Response:
        run = workshop.folders.of(_job(request, workshop).id).run
        place = run_files.picture_in(run, request.path_params["path"])
        if place is None:
            raise Refusal("not_found", "there is no such picture")
        return FileResponse(place[0], media_type=place[1], headers=_PRIVATE)

    return await run_in_threadpool(found)


async def report(request: Request, workshop: Workshop) -> Response:
    """Gives the report of a job an address for an hour: a frame has no key."""

    def given() -> ReportAddress:
        job = _job(request, workshop)
        if not workshop.folders.of(job.id).run.report.is_file():
            raise Refusal("not_found", "there is no report of this job")
        return ReportAddress(address=f"/page/reports/{workshop.tickets.give(job.id)}")

    return _answer(await run_in_threadpool(given))


async def shown_report(request: Request, workshop: Workshop) -> Response:
    """A report, in which nothing runs."""
    id = workshop.tickets.thing(request.path_params["ticket"])
    path = None if id is None else workshop.folders.of(id).run.report
    if path is None or not await run_in_threadpool(path.is_file):
        raise Refusal("not_found", "the address of the report was good for an hour")
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=_REPORT)


async def cancel(request: Request, workshop: Workshop) -> Response:
    """Ends a job: at once in the queue, soon where it runs."""

    def ended() -> JobLine:
        before = workshop.queue.request_cancel(_job(request, workshop).id)
        if before is None or before.is_over:
            raise Refusal("ended", "the job is over already")
        return standing.line(_job(request, workshop), workshop)

    return _answer(await run_in_threadpool(ended))


async def generate(request: Request, workshop: Workshop) -> Response:
    """Makes pictures with what a training gave."""
    wanted = submissions.received(await read_json(request, _MOST_JSON), Wanted)

    def submitted() -> JobLine:
        trained = _job(request, workshop)
        kept = {standing.TRAINED: trained.id, "wanted": wanted.model_dump()}
        new = NewJob(
            *(NAME, "pictures", "generation", kept),
            name=trained.name,
            idempotency_key=request.headers.get(IDEMPOTENCY_KEY),
        )
        work = partial(submissions.generation, wanted, trained, workshop)
        return standing.line(workshop.submit(new, work), workshop)

    return _answer(await run_in_threadpool(submitted))


def refused(refusal: Refusal) -> Response:
    """What is wrong, in one text and by field."""
    body = Error(detail=refusal.message, problems=submissions.told(refusal.problems))
    return JSONResponse(body.model_dump(), refusal.status, refusal.headers)


def announced(job: Job, workshop: Workshop) -> Mapping[str, Any]:
    """What a webhook is told of a job that is over: the page has none."""
    return standing.line(job, workshop).model_dump()


def signed(job: Job, body: bytes, workshop: Workshop) -> Mapping[str, str]:
    """No headers: the page has no webhook."""
    return {}


async def _submitted(kind: Kind, request: Request, workshop: Workshop) -> Response:
    payload = await read_json(request, _MOST_JSON)
    sent = submissions.received(payload, Submission)

    def submitted() -> JobLine:
        name = sent.options.get("output_name")
        new = NewJob(
            *(NAME, kind, kind, payload),
            name=name if isinstance(name, str) else "",
            idempotency_key=request.headers.get(IDEMPOTENCY_KEY),
        )
        job = workshop.submit(new, lambda: submissions.configuration(sent, workshop))
        return standing.line(job, workshop)

    return _answer(await run_in_threadpool(submitted))


def _job(request: Request, workshop: Workshop) -> Job:
    """The job that an address names, of whatever protocol.

    Raises:
        Refusal: there is none.
    """
    id = request.path_params["id"]
    found = workshop.queue.find(id)
    if found is None:
        raise Refusal("not_found", f"there is no job `{id[:64]}`")
    return found


def _answer(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(mode="json"))


OPERATIONS = (
    *assets.OPERATIONS,
    Operation(
        *("GET", "/page/reports/{ticket}", shown_report, "A report, by its ticket", NAME),
        error=Error,
        media="text/html",
    ),
    Operation(
        *("GET", "/trainer/form", choices, "Tell what can be chosen", NAME),
        answer=Form,
        error=Error,
    ),
    Operation(
        *("POST", "/trainer/checks", check, "Tell what a submission means", NAME),
        body=Submission,
        answer=Checked,
        error=Error,
    ),
    Operation(
        *("POST", "/trainer/preparations", prepare, "Prepare pictures, to be looked at", NAME),
        body=Submission,
        answer=JobLine,
        error=Error,
    ),
    Operation(
        *("POST", "/trainer/trainings", train, "Begin a training", NAME),
        body=Submission,
        answer=JobLine,
        error=Error,
    ),
    Operation(
        *("GET", "/trainer/jobs", jobs, "List the jobs of all protocols", NAME),
        query=JobsQuery,
        answer=Jobs,
        error=Error,
    ),
    Operation(
        *("GET", _JOB, job, "Tell all that is known of a job", NAME),
        answer=JobDetails,
        error=Error,
    ),
    Operation(
        *("GET", f"{_JOB}/events", events, "Tell what a job has said since", NAME),
        query=EventsQuery,
        answer=Events,
        error=Error,
    ),
    Operation(
        *("GET", f"{_JOB}/prepared", prepared, "Tell how pictures were prepared", NAME),
        answer=Prepared,
        error=Error,
    ),
    Operation(
        *("GET", f"{_JOB}/pictures/{{path:path}}", picture, "A picture of a run", NAME),
        error=Error,
        media="image/*",
        other_statuses=(206,),
    ),
    Operation(
        *("POST", f"{_JOB}/report", report, "Give the report an address for an hour", NAME),
        answer=ReportAddress,
        error=Error,
    ),
    Operation(
        *("POST", f"{_JOB}/cancel", cancel, "End a job", NAME),
        answer=JobLine,
        error=Error,
    ),
    Operation(
        *("POST", f"{_JOB}/generations", generate, "Make pictures with a result", NAME),
        body=Wanted,
        answer=JobLine,
        error=Error,
    ),
)
