"""Where jobs stand, in Novita's words: trainings, the models they made, and pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trainer.dialects import field_of
from trainer.dialects import novita as dialect
from trainer.errors import Problem
from trainer.generation import GenerationRequest
from trainer.job import Result, ResultFile
from trainer.known_models import known_models
from trainer.server.ignoring import ignored_in
from trainer.server.novita.messages import (
    Listed,
    Model,
    ModelQuery,
    ModelType,
    Pagination,
    Picture,
    PictureResult,
    PictureStatus,
    PictureTask,
    TaskStatus,
    Training,
)
from trainer.server.novita.pictures import Wanted
from trainer.server.queue import Job, State
from trainer.server.workshop import Workshop, failure

NAME = "novita"

Item = TypeVar("Item")

_TASK_STATUS: Mapping[State, TaskStatus] = {
    "queued": "QUEUING",
    "running": "TRAINING",
    "done": "SUCCESS",
    "failed": "FAILED",
    "cancelled": "CANCELED",
}
_PICTURE_STATUS: Mapping[State, PictureStatus] = {
    "queued": "TASK_STATUS_QUEUED",
    "running": "TASK_STATUS_PROCESSING",
    "done": "TASK_STATUS_SUCCEED",
    "failed": "TASK_STATUS_FAILED",
    "cancelled": "TASK_STATUS_FAILED",
}
# What a request for pictures calls what a generation calls so. Options of the base model that are
# neither here nor fields come with its name.
_PICTURE_FIELDS = {
    "model": "request.model_name",
    "vae_url": "request.sd_vae",
    "trained": "request.loras",
    "num_inference_steps": "request.steps",
    "scheduler": "request.sampler_name",
    "karras": "request.sampler_name",
    "num_images": "request.image_num",
    "output_format": "extra.response_image_type",
}


def training(job: Job, workshop: Workshop, base_url: str) -> Training:
    status, result = _TASK_STATUS[job.state], workshop.result(job)
    if job.state == "done" and result is not None:
        output = dialect.to_output(result, lambda file: _url(file, job, workshop, base_url))
        told = {**output.model_dump(exclude_none=True), "task_id": job.id, "models": _served(job)}
        return Training.model_validate(told)
    extra: dict[str, Any] = _progress(job, workshop)
    if job.state == "failed":
        extra["reason"] = _reason(result, lambda leaf: field_of(NAME, leaf))
    return Training(task_id=job.id, task_status=status, extra=extra)


def listed(job: Job) -> Listed:
    return Listed(
        task_id=job.id,
        task_name=job.name,
        task_type="style" if job.app == "style" else "subject",
        task_status=_TASK_STATUS[job.state],
        created_at=int(job.created),
        models=_served(job),
    )


def _served(job: Job) -> list[dialect.TrainedModel]:
    """The model of a training: served in the very moment of its success."""
    return [dialect.TrainedModel(model_name=model_name(job))] if job.state == "done" else []


def model_name(job: Job) -> str:
    digits = hashlib.sha256(job.id.encode()).hexdigest()[:10].upper()
    return f"model_{int(job.ended or job.created)}_{digits}.safetensors"


def run_of(name: str, workshop: Workshop) -> str | None:
    """The run folder of the trained model with this name."""
    wanted = name if name.endswith(".safetensors") else f"{name}.safetensors"
    for job in workshop.queue.listed(NAME, "training"):
        if job.state == "done" and model_name(job) == wanted:
            return str(workshop.folders.of(job.id).run.root.resolve())
    return None


def _progress(job: Job, workshop: Workshop) -> dict[str, Any]:
    progress = workshop.progress_of(job)
    return {
        "progress_percent": int(100 * progress.share),
        "eta_relative": round(progress.seconds_left or 0),
    }


def pictures(job: Job, workshop: Workshop, base_url: str) -> PictureResult:
    work = GenerationRequest.model_validate_json(job.work)
    result = workshop.result(job)
    progress = _progress(job, workshop)
    made = result.files if result is not None and job.state == "done" else ()
    task = PictureTask(
        task_id=job.id,
        status=_PICTURE_STATUS[job.state],
        eta=progress["eta_relative"],
        progress_percent=100 if job.state == "done" else progress["progress_percent"],
    )
    if job.state == "cancelled":
        task.reason = "the task was cancelled"
    elif job.state == "failed":
        task.reason = _reason(result, _picture_field)
    told = [
        Picture(image_url=_url(file, job, workshop, base_url), image_type=work.output_format)
        for file in made
        if file.role == "picture"
    ]
    extra: dict[str, Any] = {"seed": work.seed}
    aside = ignored_in(job, result, _picture_field)
    return PictureResult(
        task=task,
        images=told,
        extra=extra | ({"ignored_options": aside} if aside else {}),
    )


def _picture_field(name: str) -> str:
    first = name.partition(".")[0]
    own = f"request.{name}" if first in Wanted.model_fields else _PICTURE_FIELDS["model"]
    return _PICTURE_FIELDS.get(first, own)


def _reason(result: Result | None, name_of: Callable[[str], str]) -> str:
    """Why a job failed, in the request's own names."""
    if result is not None and result.problems:
        problems = (Problem(name_of(p.field), p.message, p.hint) for p in result.problems)
        return "\n".join(map(str, problems))
    error = failure(result)
    return "the result is gone" if error is None else error.message


def _url(file: ResultFile, job: Job, workshop: Workshop, base_url: str) -> str:
    return base_url + workshop.file_of(job, file).address


def page(items: list[Item], cursor: str, limit: float) -> tuple[list[Item], Pagination]:
    start = int(cursor.removeprefix("c_"))
    end = start + max(1, int(limit))
    return items[start:end], Pagination(next_cursor=f"c_{end}" if end < len(items) else "")


def trained_models(workshop: Workshop, base_url: str) -> list[Model]:
    done = [job for job in workshop.queue.listed(NAME, "training") if job.state == "done"]
    return [_trained_model(job, workshop, base_url) for job in done]


def _trained_model(job: Job, workshop: Workshop, base_url: str) -> Model:
    result, name = workshop.result(job), model_name(job)
    lora = None if result is None else result.file("kohya_lora") or result.file("diffusers_lora")
    base = job.request.get("base_model")
    return Model(
        id=job.number,
        name=job.name,
        sd_name=name,
        sd_name_in_api=name,
        type=ModelType(name="lora", display_name="LoRA"),
        source="training",
        visibility="private",
        base_model=base if isinstance(base, str) else None,
        hash_sha256=None if lora is None else lora.sha256,
        download_url=None if lora is None else _url(lora, job, workshop, base_url),
    )


def base_models() -> list[Model]:
    return [
        Model(
            # Numbers of trainings count from 1; a base model's stays the same whatever is listed.
            id=2**32 + int(hashlib.sha256(name.encode()).hexdigest()[:8], 16),
            name=name,
            sd_name=f"{name}.safetensors",
            sd_name_in_api=f"{name}.safetensors",
            type=ModelType(name="checkpoint", display_name="Checkpoint"),
            source="civitai",
            visibility="public",
        )
        for name, known in known_models().items()
        if "model_url" in known.options
    ]


def is_wanted(model: Model, asked: ModelQuery) -> bool:
    filters = (
        (asked.source, model.source),
        (asked.visibility, model.visibility),
        (asked.type, model.type.name),
    )
    is_named = (asked.query or "").lower() in f"{model.name} {model.sd_name}".lower()
    return is_named and all(wanted in (None, "", own) for wanted, own in filters)
