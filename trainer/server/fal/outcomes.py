"""How a job ended, in fal's words: the same for result, synchronous run, status and webhook."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from PIL import Image

from trainer.dialects import field_of, load_dialect
from trainer.errors import Problem, TrainerError
from trainer.generation import GenerationRequest
from trainer.job import Result, ResultFile
from trainer.server.dispatch import LATE
from trainer.server.fal import answers, apps
from trainer.server.fal.answers import ERROR_TYPE, LogEntry
from trainer.server.ignoring import ignored_in
from trainer.server.queue import Job
from trainer.server.workshop import Workshop, failure

_CANCELLED, _INVALID, _LATE, _FAILED = 499, 422, 504, 500
# What a request for pictures calls what a generation calls so.
_PICTURE_FIELDS = {"width": "image_size", "height": "image_size", "trained": "loras"}
# What fits no field of one: the base model, which the app's name says.
_WHOLE = ""


@dataclass(frozen=True)
class Outcome:
    """An end.

    Args:
        status: of HTTP.
        body: of the answer.
        error: what went wrong, in one text. Empty: nothing.
        error_type: fal's word for it.
        headers: of the answer.
    """

    status: int
    body: Mapping[str, Any]
    error: str = ""
    error_type: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def outcome(job: Job, workshop: Workshop, base_url: str) -> Outcome:
    """How a job that is over ended.

    Args:
        base_url: the address of this server, for links to files.
    """
    if job.state == "cancelled":
        return _failed(_CANCELLED, "the request was cancelled", "client_cancelled")
    result = workshop.result(job)
    if result is None:
        return _failed(_FAILED, "the result of this request is gone", "internal_error")
    error = failure(result)
    if error is None:
        return Outcome(200, _output(job, result, workshop, base_url))
    failed = _failure(job, result, error)
    if job.kind == "generation" and (aside := ignored_in(job, result, _picture_field)):
        return replace(failed, body={**failed.body, "ignored_options": aside})
    return failed


def _failure(job: Job, result: Result, error: TrainerError) -> Outcome:
    if result.problems:
        return _invalid(job, result)
    if result.error_kind == LATE:
        # Without this header clients take the status for passing, and ask again and again.
        headers = {"X-Fal-Request-Timeout-Type": "user"}
        return _failed(_LATE, error.message, "request_timeout", headers)
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return _failed(_FAILED, text, "internal_error")


def log_of(job: Job, workshop: Workshop) -> list[LogEntry]:
    """All lines of a job's log."""
    moment = datetime.fromtimestamp(job.created, UTC).isoformat()
    # Pictures are told of by their job.
    notes = apps.notes_on(job.request) if job.kind == "training" else []
    own = [
        LogEntry(
            message=f"{note.kind}: {note.field} {note.message}", level="WARN", timestamp=moment
        )
        for note in notes
    ]
    return own + [
        LogEntry(
            message=workshop.without_paths(line.message), level=line.level, timestamp=line.time
        )
        for line in workshop.progress_of(job).lines
    ]


def seconds_of(job: Job) -> float | None:
    """How long a job that is over ran."""
    if job.started is None or job.ended is None:
        return None
    return max(0.0, job.ended - job.started)


def _failed(
    status: int, text: str, error_type: str, headers: Mapping[str, str] | None = None
) -> Outcome:
    body = answers.error_body(text, error_type)
    return Outcome(status, body, text, error_type, {ERROR_TYPE: error_type, **(headers or {})})


def _invalid(job: Job, result: Result) -> Outcome:
    """Input that the job itself found wrong."""
    problems = [Problem(_field(job, p.field), p.message, p.hint) for p in result.problems]
    body = answers.invalid(problems)
    return Outcome(_INVALID, body, body["message"], "bad_request")


def _field(job: Job, name: str) -> str:
    """What the request calls an option."""
    if job.kind == "generation":
        return _picture_field(name)
    return field_of(apps.dialect_of(job.app, job.request), name)


def _picture_field(name: str) -> str:
    known = _PICTURE_FIELDS.get(name.partition(".")[0], name)
    is_field = known.partition(".")[0] in apps.PictureInput.model_fields
    return known if is_field else _WHOLE


def _output(job: Job, result: Result, workshop: Workshop, base_url: str) -> dict[str, Any]:
    if job.kind == "generation":
        return _pictures(job, result, workshop, base_url)

    def url_for(file: ResultFile) -> str:
        return base_url + workshop.file_of(job, file).address

    dialect = load_dialect(apps.dialect_of(job.app, job.request))
    return dialect.to_output(result, url_for).model_dump(mode="json", exclude_none=True)


def _pictures(job: Job, result: Result, workshop: Workshop, base_url: str) -> dict[str, Any]:
    asked = GenerationRequest.model_validate_json(job.work)
    in_answer = job.request.get("sync_mode") is True
    files = [file for file in result.files if file.role == "picture"]
    pictures = [_picture(job, file, workshop, "" if in_answer else base_url) for file in files]
    output = apps.PictureOutput(
        images=pictures,
        timings={"inference": seconds_of(job) or 0.0},
        seed=asked.seed,
        has_nsfw_concepts=[False] * len(pictures),
        prompt=asked.prompt,
        ignored_options=ignored_in(job, result, _picture_field) or None,
    )
    return output.model_dump(mode="json", exclude_none=True)


def _picture(job: Job, file: ResultFile, workshop: Workshop, base_url: str) -> apps.Picture:
    """A picture by its address, or in the answer itself where there is no base address."""
    stored = workshop.file_of(job, file)
    with Image.open(stored.path) as opened:
        width, height = opened.size
    url = base_url + stored.address
    if not base_url:
        content = base64.b64encode(stored.path.read_bytes()).decode()
        url = f"data:{file.content_type};base64,{content}"
    return apps.Picture(url=url, width=width, height=height, content_type=file.content_type)
