"""The bodies that fal's clients read, and how a refusal looks to them.

Keys that only one client needs stand in all answers: Python's fails with a bare `KeyError` where
`queue_position`, `logs` or `cancel_url` is missing, JavaScript's shows `message` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from trainer.errors import Missing, Problem
from trainer.server.queue import Job
from trainer.server.refusals import Reason, Refusal

REQUEST_ID = "x-fal-request-id"
ERROR_TYPE = "X-Fal-Error-Type"

# fal's words for what went wrong, where it has one.
_ERROR_TYPES: Mapping[Reason, str] = {
    "malformed": "bad_request",
    "internal": "internal_error",
}
# Fields that are not in the body.
_PLACES = {
    "fal_webhook": "query",
    "fal_max_queue_length": "query",
    "idempotency-key": "header",
    "x-fal-queue-priority": "header",
    "x-fal-request-timeout": "header",
}


class LogEntry(BaseModel):
    """One line of a job's log."""

    message: str
    level: Literal["STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"]
    source: Literal["USER"] = "USER"
    timestamp: str = Field(description="ISO 8601.")


class Addresses(BaseModel):
    """A request and where to ask about it."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class Submitted(Addresses):
    """A request that was taken."""

    status: Literal["IN_QUEUE"] = "IN_QUEUE"
    gateway_request_id: str
    queue_position: int
    logs: list[LogEntry] | None = None
    metrics: dict[str, float | None] = {}
    training_id: str | None = Field(
        None, description="The request's id, where it is a training; of the guide's train_model."
    )


class Status(Addresses):
    """Where a request stands; `COMPLETED` is the only end, of failures too."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    queue_position: int | None = Field(None, description="Requests before this one, in the queue.")
    logs: list[LogEntry] | None = Field(description="All lines, or null where not asked for.")
    metrics: dict[str, float | None] | None = None
    error: str | None = None
    error_type: str | None = None


class Cancelled(BaseModel):
    """What came of a wish to cancel."""

    status: Literal["OK", "CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class Detail(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int]
    msg: str
    type: str


class ErrorBody(BaseModel):
    """Why something was not done."""

    detail: str | list[Detail]
    message: str
    error_type: str | None = None
    ignored_options: dict[str, str] | None = Field(
        None, description="Of failed pictures: options without an effect; this project's own."
    )


def addresses(job: Job, base_url: str) -> dict[str, str]:
    """A request's id and where to ask about it."""
    address = f"{base_url}/{job.app}/requests/{job.id}"
    return {
        "request_id": job.id,
        "response_url": address,
        "status_url": f"{address}/status",
        "cancel_url": f"{address}/cancel",
    }


def refused(refusal: Refusal) -> Response:
    """fal's answer to a refusal."""
    if refusal.reason == "invalid":
        problems = refusal.problems or (Problem("", refusal.message),)
        return JSONResponse(invalid(problems), refusal.status, headers=refusal.headers)
    return error(
        refusal.status,
        refusal.message,
        error_type=_ERROR_TYPES.get(refusal.reason),
        headers=refusal.headers,
    )


def error(
    status: int,
    text: str,
    *,
    error_type: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error that lies in no field."""
    typed = {ERROR_TYPE: error_type} if error_type else {}
    return JSONResponse(error_body(text, error_type), status, headers={**typed, **(headers or {})})


def error_body(text: str, error_type: str | None = None) -> dict[str, Any]:
    """The body of an error that lies in no field; JavaScript's client shows `message`."""
    body = {"detail": text, "message": text}
    return {**body, "error_type": error_type} if error_type else body


def invalid(problems: Sequence[Problem]) -> dict[str, Any]:
    """The body of an error in fields, as pydantic shapes it; values are not echoed."""
    details = [
        {
            "loc": _location(problem.field),
            "msg": _text(problem),
            "type": "missing" if isinstance(problem, Missing) else "value_error",
        }
        for problem in problems
    ]
    return {"detail": details, "message": "\n".join(map(str, problems))}


def _text(problem: Problem) -> str:
    return f"{problem.message}; {problem.hint}" if problem.hint else problem.message


def _location(field: str) -> list[str | int]:
    """Where a field is: `loras[0].path` in the body is `body`, `loras`, 0, `path`."""
    parts = re.findall(r"[^.\[\]]+", field) if re.fullmatch(r"\w+([.\[].*)?", field) else [field]
    steps = [int(part) if part.isdigit() else part for part in parts if part]
    return [_PLACES.get(field, "body"), *steps]
