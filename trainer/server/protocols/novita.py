"""Novita's routes: pictures for trainings, trainings of subjects and styles, text to image.

Its client takes status 200 alone for success, and sends null for every field that is not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainer.dialects import novita as dialect
from trainer.errors import InputError, Problem
from trainer.server.bodies import checked, refused_input
from trainer.server.files import NotExpected, TooLarge
from trainer.server.novita import pictures, tasks
from trainer.server.novita.messages import (
    Asset,
    AssetRequest,
    Error,
    Header,
    ListQuery,
    ModelQuery,
    Models,
    PictureResult,
    Submitted,
    Task,
    TaskQuery,
    TaskType,
    Training,
    Trainings,
)
from trainer.server.novita.refusing import ServiceRefusal, refused
from trainer.server.novita.uploads import MOST_PICTURE_BYTES, pictures_only
from trainer.server.operations import Operation
from trainer.server.queue import Job, NewJob
from trainer.server.security import read_json
from trainer.server.webhooks import checked_webhook
from trainer.server.workshop import IDEMPOTENCY_KEY, Workshop

__all__ = ["NAME", "OPERATIONS", "PREFIXES", "announced", "refused", "signed"]

NAME = tasks.NAME
PREFIXES = ("/v3",)
SERVICE = "Novita's training"
_TEXT_TO_IMAGE = "txt2img"


async def create_asset(request: Request, workshop: Workshop) -> Response:
    """Makes place for a picture."""
    asked = checked(await read_json(request), AssetRequest, SERVICE)
    kind = asked.file_extension.replace("jpg", "jpeg")
    await run_in_threadpool(workshop.room.require)
    file, token = await run_in_threadpool(workshop.files.expect, f"picture.{kind}", f"image/{kind}")
    base_url = workshop.base_url(request)
    url = f"{base_url}/v3/assets/training_dataset/{file.id}?token={token}"
    host = Header(values=[urlsplit(base_url).netloc])
    return _answer(Asset(assets_id=file.id, upload_url=url, headers={"Host": host}))


async def upload(request: Request, workshop: Workshop) -> Response:
    """Takes a picture, whatever its kind is said to be."""
    id, token = request.path_params["assets_id"], request.query_params.get("token", "")
    limit = min(MOST_PICTURE_BYTES, workshop.settings.max_upload_bytes)
    try:
        await workshop.files.take(id, token, pictures_only(request.stream()), limit=limit)
    except NotExpected:
        message = "nothing is expected here any more; ask for a new upload_url"
        raise ServiceRefusal("not_found", "ASSET_NOT_FOUND", 404, message) from None
    except TooLarge:
        message = f"the picture has more than {limit} bytes"
        raise ServiceRefusal("too_large", "IMAGE_FILE_EXCEEDS_MAX_SIZE", 400, message) from None
    return Response(status_code=200)


async def create_subject(request: Request, workshop: Workshop) -> Response:
    """Begins the training of a subject."""
    return await _create(request, workshop, "subject")


async def create_style(request: Request, workshop: Workshop) -> Response:
    """Begins the training of a style."""
    return await _create(request, workshop, "style")


async def training(request: Request, workshop: Workshop) -> Response:
    """Tells where a training stands; its client asks about styles as about subjects."""
    id, base_url = request.query_params.get("task_id", ""), workshop.base_url(request)

    def told() -> Training:
        return tasks.training(_task(id, "training", workshop), workshop, base_url)

    return _answer(await run_in_threadpool(told))


async def trainings(request: Request, workshop: Workshop) -> Response:
    """Lists trainings."""
    asked = checked(request.query_params, ListQuery, SERVICE)

    def told() -> Trainings:
        jobs = workshop.queue.listed(NAME, "training")
        jobs = [job for job in jobs if asked.task_type in (None, job.app)]
        page, pagination = tasks.page(jobs, asked.cursor, asked.limit)
        return Trainings(tasks=[tasks.listed(job) for job in page], pagination=pagination)

    return _answer(await run_in_threadpool(told))


async def models(request: Request, workshop: Workshop) -> Response:
    """Lists base models and trained ones."""
    asked = checked(request.query_params, ModelQuery, SERVICE)
    base_url = workshop.base_url(request)

    def told() -> Models:
        all_models = [*tasks.trained_models(workshop, base_url), *tasks.base_models()]
        found = [model for model in all_models if tasks.is_wanted(model, asked)]
        page, pagination = tasks.page(found, asked.cursor, asked.limit)
        return Models(models=page, pagination=pagination)

    return _answer(await run_in_threadpool(told))


async def create_pictures(request: Request, workshop: Workshop) -> Response:
    """Begins to make pictures."""
    payload = await read_json(request)
    base_url, key = workshop.base_url(request), request.headers.get(IDEMPOTENCY_KEY)

    def submitted() -> Job:
        asked = checked(payload, pictures.Body, pictures.SERVICE)
        hook = asked.extra.webhook
        if hook is not None:
            checked_webhook(hook.url, "extra.webhook.url")
        new = NewJob(
            *(NAME, _TEXT_TO_IMAGE, "generation", payload),
            webhook=None if hook is None else {"url": hook.url, "base_url": base_url},
            idempotency_key=key,
        )
        return workshop.submit(new, lambda: _pictures(asked, payload, workshop))

    job = await run_in_threadpool(submitted)
    return _answer(Submitted(task_id=job.id, data=Task(task_id=job.id)))


async def picture_result(request: Request, workshop: Workshop) -> Response:
    """Tells where pictures stand."""
    id, base_url = request.query_params.get("task_id", ""), workshop.base_url(request)

    def told() -> PictureResult:
        return tasks.pictures(_task(id, "generation", workshop), workshop, base_url)

    return _answer(await run_in_threadpool(told))


def announced(job: Job, workshop: Workshop) -> Mapping[str, Any]:
    """What a webhook is told of pictures that are made."""
    assert job.webhook is not None
    told = tasks.pictures(job, workshop, job.webhook["base_url"])
    return {"event_type": "ASYNC_TASK_RESULT", "payload": told.model_dump()}


def signed(job: Job, body: bytes, workshop: Workshop) -> Mapping[str, str]:
    """Nothing: the service does not sign."""
    return {}


async def _create(request: Request, workshop: Workshop, task_type: TaskType) -> Response:
    payload = await read_json(request)
    # The address says it.
    payload.pop("task_type", None)
    base_url, key = workshop.base_url(request), request.headers.get(IDEMPOTENCY_KEY)

    def submitted() -> Job:
        def work() -> str:
            located = _with_locations(payload, workshop, base_url)
            return workshop.training(f"{NAME}-{task_type}", located)

        name = str(payload.get("name", ""))
        new = NewJob(NAME, task_type, "training", payload, name=name, idempotency_key=key)
        return workshop.submit(new, work)

    return _answer(Task(task_id=(await run_in_threadpool(submitted)).id))


def _pictures(asked: pictures.Body, payload: Mapping[str, Any], workshop: Workshop) -> str:
    """The work of making pictures."""
    try:
        wanted = pictures.generation_request(
            asked, payload, workshop.inputs, lambda name: tasks.run_of(name, workshop)
        )
    except InputError as error:
        raise refused_input(error) from error
    return wanted.model_dump_json()


def _with_locations(
    payload: Mapping[str, Any], workshop: Workshop, base_url: str
) -> dict[str, Any]:
    """The request with the addresses of pictures in the place of their ids.

    Raises:
        Refusal: with each id that is none.
    """
    items = payload.get("image_dataset_items")
    if not isinstance(items, list):
        return dict(payload)
    placed, problems = [], []
    for number, item in enumerate(items):
        id = item.get("assets_id") if isinstance(item, dict) else None
        file = workshop.files.find(str(id)) if isinstance(id, str | int) else None
        is_there = file is not None and not file.is_expected and file.job is None
        if file is not None and is_there:
            placed.append({**item, "assets_id": f"{base_url}{file.address}"})
            continue
        # What is no id at all is for the dialect to refuse.
        placed.append(item)
        if id:
            message = f"got `{str(id)[:64]}`, and no picture was uploaded under this id"
            hint = "POST /v3/assets/training_dataset gives an id and where to PUT the picture"
            field = f"image_dataset_items[{number}].assets_id"
            problems.append(Problem(field, message, hint))
    if problems:
        raise refused_input(InputError(problems))
    return {**payload, "image_dataset_items": placed}


def _task(id: str, kind: Literal["training", "generation"], workshop: Workshop) -> Job:
    job = workshop.queue.find(id)
    if job is None or (job.protocol, job.kind) != (NAME, kind):
        message = f"there is no task `{id[:64]}`"
        raise ServiceRefusal("not_found", "TASK_NOT_FOUND", 404, message)
    return job


def _answer(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(exclude_none=True))


OPERATIONS = (
    Operation(
        *("POST", "/v3/assets/training_dataset", create_asset, "Make place for a picture", NAME),
        body=AssetRequest,
        answer=Asset,
        error=Error,
    ),
    Operation(
        *("PUT", "/v3/assets/training_dataset/{assets_id}", upload, "Upload a picture", NAME),
        takes_bytes=True,
        error=Error,
    ),
    Operation(
        *("POST", "/v3/training/subject", create_subject, "Train a subject", NAME),
        body=dialect.Input,
        answer=Task,
        error=Error,
    ),
    Operation(
        *("POST", "/v3/training/style", create_style, "Train a style", NAME),
        body=dialect.Input,
        answer=Task,
        error=Error,
    ),
    Operation(
        *("GET", "/v3/training/subject", training, "Tell where a training stands", NAME),
        query=TaskQuery,
        answer=Training,
        error=Error,
    ),
    Operation(
        *("GET", "/v3/training/style", training, "Tell where a training stands", NAME),
        query=TaskQuery,
        answer=Training,
        error=Error,
    ),
    Operation(
        *("GET", "/v3/training", trainings, "List trainings", NAME),
        query=ListQuery,
        answer=Trainings,
        error=Error,
    ),
    Operation(
        *("GET", "/v3/model", models, "List models", NAME),
        query=ModelQuery,
        answer=Models,
        error=Error,
    ),
    Operation(
        *("POST", "/v3/async/txt2img", create_pictures, "Make pictures", NAME),
        body=pictures.Body,
        answer=Submitted,
        error=Error,
    ),
    Operation(
        *("GET", "/v3/async/task-result", picture_result, "Tell where pictures stand", NAME),
        query=TaskQuery,
        answer=PictureResult,
        error=Error,
    ),
)
