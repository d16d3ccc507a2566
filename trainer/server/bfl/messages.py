"""What goes to and fro on BFL's routes, in the service's words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from trainer.dialects import bfl as dialect
from trainer.server.bfl.pictures import Webhooked

Status = Literal["Task not found", "Pending", "Ready", "Error"]


class FinetuneRequest(dialect.Input, Webhooked):
    """A finetuning request, and who is told of its end."""


class Submitted(BaseModel):
    """A task that was taken; `status` and `webhook_url` where somebody is told of its end."""

    id: str
    polling_url: str
    finetune_id: str | None = Field(None, description="Of a finetune: its id once more.")
    status: Literal["Pending"] | None = None
    webhook_url: str | None = None


class TaskQuery(BaseModel):
    """Which task is asked about."""

    id: str = Field(min_length=1)


class TaskResult(BaseModel):
    """Where a task stands; `ignored_options` is this project's own."""

    id: str
    status: Status
    result: dict[str, Any] | None = None
    progress: float | None = Field(None, description="0 to 1, while it runs.")
    details: dict[str, Any] | None = None
    preview: dict[str, Any] | None = None
    ignored_options: dict[str, str] | None = None


class Finetunes(BaseModel):
    """Ids, newest first."""

    finetunes: list[str]


class FinetuneQuery(BaseModel):
    """Which finetune is asked about."""

    finetune_id: str = Field(min_length=1)


class FinetuneDetails(BaseModel):
    """What was asked for, but for the archive, and where it stands."""

    finetune_details: dict[str, Any]


class Deleted(BaseModel):
    """A finetune that is no more."""

    status: Literal["success"] = "success"
    message: str
    deleted_finetune_id: str
    timestamp: str = Field(description="ISO 8601.")


class Credits(BaseModel):
    """What is left to spend: nothing is charged here."""

    credits: float = 1_000_000.0


class Detail(BaseModel):
    """One thing that is wrong with a request."""

    loc: list[str | int]
    msg: str
    type: str


class Error(BaseModel):
    """Why a request is refused."""

    detail: str | list[Detail]
