"""Where tasks stand, in BFL's words: finetunes and pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from trainer.dialects import bfl as dialect
from trainer.dialects import field_of
from trainer.errors import Problem
from trainer.generation import GenerationRequest
from trainer.job import Result, ResultFile
from trainer.server.bfl import pictures
from trainer.server.bfl.messages import Status, TaskResult
from trainer.server.ignoring import ignored_in
from trainer.server.queue import Job, State
from trainer.server.workshop import Workshop, failure

NAME = "bfl"
NOT_THERE = "Task not found"

_STATUS: Mapping[State, Status] = {
    "queued": "Pending",
    "running": "Pending",
    "done": "Ready",
    "failed": "Error",
    "cancelled": "Error",
}
# What a request for pictures calls what a generation calls so.
_PICTURE_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guide_mask": "mask",
    "depth_estimator": "control_image",
}
# What may guide a picture; the first that a request has does.
_GUIDES = ("image", "preprocessed_image", "control_image")
# Whatever else a picture is made with comes with the finetune.
_REST = "finetune_id"


def task(job: Job, workshop: Workshop, base_url: str) -> TaskResult:
    """Where a task stands.

    Args:
        base_url: the address of this server, for links to files.
    """
    told = TaskResult(id=job.id, status=_STATUS[job.state])
    if job.state == "running":
        told.progress = workshop.progress_of(job).share
    elif job.is_over:
        _end(told, job, workshop, base_url)
    return told


def announcement(job: Job, workshop: Workshop, base_url: str) -> dict[str, Any]:
    """What a webhook is told of a task that is over."""
    told = task(job, workshop, base_url)
    ended = datetime.fromtimestamp(job.ended or job.created, UTC).isoformat()
    common = {"id": job.id, "status": told.status, "timestamp": ended}
    if told.status == "Ready":
        return {**common, "result": told.result, "message": "the task is done"}
    error = (told.details or {}).get("error", "")
    return {**common, "error": error, "message": error}


def _end(told: TaskResult, job: Job, workshop: Workshop, base_url: str) -> None:
    result = workshop.result(job)
    if job.state == "cancelled":
        told.details = {"error": "the task was cancelled"}
    elif job.state == "failed" or result is None:
        told.status, told.details = "Error", _failure(job, result)
    else:

        def url_for(file: ResultFile) -> str:
            return base_url + workshop.file_of(job, file).address

        if job.kind == "training":
            output = dialect.to_output(result, url_for)
            told.result = output.result.model_dump(exclude_none=True)
            told.ignored_options = output.ignored_options
        else:
            told.result = _sample(job, result, url_for)
    if job.kind == "generation":
        told.ignored_options = ignored_in(job, result, lambda name: _field(job, name)) or None


def _sample(job: Job, result: Result, url_for: Any) -> dict[str, Any]:
    work = GenerationRequest.model_validate_json(job.work)
    picture = result.file("picture")
    began, ended = job.started or job.created, job.ended or job.created
    return {
        "sample": None if picture is None else url_for(picture),
        "prompt": work.prompt,
        "seed": work.seed,
        "start_time": began,
        "end_time": ended,
        "duration": ended - began,
    }


def _failure(job: Job, result: Result | None) -> dict[str, Any]:
    """Why a task failed, with the fields at fault in the request's own names."""
    error = failure(result)
    if result is None or error is None:
        return {"error": "the result of this task is gone"}
    problems = [Problem(_field(job, p.field), p.message, p.hint) for p in result.problems]
    told: dict[str, Any] = {"error": "\n".join(map(str, problems)) or error.message}
    if problems:
        told["problems"] = [{"field": p.field, "message": p.message} for p in problems]
    if error.hint:
        told["hint"] = error.hint
    return told


def _field(job: Job, name: str) -> str:
    if job.kind == "training":
        return field_of(NAME, name)
    fields = pictures.WAYS[job.app].model.model_fields
    if name in ("width", "height") and name not in fields:
        # Without a picture that guides it is the ratio, also where that is the default.
        return _guide_of(job, fields) or "aspect_ratio"
    if name == "guide_image":
        return _guide_of(job, fields)
    first = name.partition(".")[0]
    return _PICTURE_FIELDS.get(first, name if first in fields else _REST)


def _guide_of(job: Job, fields: Collection[str]) -> str:
    """The field that guides a picture; empty where none does."""
    given = (name for name in _GUIDES if name in fields and job.request.get(name) is not None)
    return next(given, "")
