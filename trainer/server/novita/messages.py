"""What goes to and fro on Novita's routes, in the service's words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.dialects import novita as dialect

TaskStatus = Literal["UNKNOWN", "QUEUING", "TRAINING", "SUCCESS", "CANCELED", "FAILED"]
PictureStatus = Literal[
    "TASK_STATUS_QUEUED", "TASK_STATUS_PROCESSING", "TASK_STATUS_SUCCEED", "TASK_STATUS_FAILED"
]
TaskType = Literal["subject", "style"]


_MOST_LISTED = 100
# Pictures stay as long as the server keeps their job; so long at least.
_PICTURE_SECONDS = 3600


class AssetRequest(BaseModel):
    """A picture that will be uploaded."""

    file_extension: Literal["png", "jpeg", "jpg", "webp"] = "png"


class Header(BaseModel):
    """The values of a header."""

    values: list[str]


class Asset(BaseModel):
    """Where a picture can be put."""

    assets_id: str
    upload_url: str
    method: Literal["PUT"] = "PUT"
    headers: dict[str, Header]


class Task(BaseModel):
    """A task that was taken."""

    task_id: str


class TaskQuery(BaseModel):
    """Which task is asked about."""

    task_id: str = Field(min_length=1)


class Training(Task):
    """Where a training stands; `ignored_options` is this project's own."""

    task_status: TaskStatus
    model_type: Literal["", "lora"] = ""
    models: list[dialect.TrainedModel] = []
    extra: dict[str, Any] = {}
    ignored_options: dict[str, str] | None = None


class ListQuery(BaseModel):
    """Which trainings are asked for."""

    model_config = ConfigDict(populate_by_name=True)
    limit: float = Field(_MOST_LISTED, gt=0, le=_MOST_LISTED, alias="pagination.limit")
    cursor: str = Field("c_0", pattern=r"^c_\d{1,15}$", alias="pagination.cursor")
    task_type: TaskType | None = None


class Listed(Task):
    """A training in a list."""

    task_name: str
    task_type: TaskType
    task_status: TaskStatus
    created_at: int = Field(description="Seconds since 1970.")
    models: list[dialect.TrainedModel]


class Pagination(BaseModel):
    """Where the next page begins; empty where there is none."""

    next_cursor: str = ""


class Trainings(BaseModel):
    """A page of trainings, newest first."""

    tasks: list[Listed]
    pagination: Pagination


class ModelQuery(BaseModel):
    """Which models are asked for."""

    model_config = ConfigDict(populate_by_name=True)
    limit: float = Field(_MOST_LISTED, gt=0, le=_MOST_LISTED, alias="pagination.limit")
    cursor: str = Field("c_0", pattern=r"^c_\d{1,15}$", alias="pagination.cursor")
    source: str | None = Field(None, alias="filter.source")
    visibility: str | None = Field(None, alias="filter.visibility")
    type: str | None = Field(None, alias="filter.type")
    query: str | None = Field(None, alias="filter.query")


class ModelType(BaseModel):
    """The kind of a model."""

    name: Literal["checkpoint", "lora"]
    display_name: str


class Model(BaseModel):
    """A model that pictures can be made with."""

    id: int
    name: str
    sd_name: str
    sd_name_in_api: str
    type: ModelType
    status: Literal[1] = 1
    source: Literal["training", "civitai"]
    visibility: Literal["public", "private"]
    base_model: str | None = None
    hash_sha256: str | None = None
    download_url: str | None = None
    is_nsfw: bool = False


class Models(BaseModel):
    """A page of models."""

    models: list[Model]
    pagination: Pagination


class Submitted(Task):
    """Pictures that will be made; the service's pages have the id in `data`, its client here."""

    code: Literal[0] = 0
    msg: str = ""
    data: Task


class PictureTask(Task):
    """Where pictures stand."""

    status: PictureStatus
    reason: str = ""
    task_type: Literal["TXT_TO_IMG"] = "TXT_TO_IMG"
    eta: int = Field(0, description="Seconds left.")
    progress_percent: int = 0


class Picture(BaseModel):
    """A picture."""

    image_url: str
    image_url_ttl: int = _PICTURE_SECONDS
    image_type: str


class PictureResult(BaseModel):
    """Pictures that are made, or will be."""

    task: PictureTask
    images: list[Picture] = []
    videos: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}


class Error(BaseModel):
    """Why a request is refused; `metadata` names the fields."""

    code: int
    reason: str
    message: str
    metadata: dict[str, str] = {}
