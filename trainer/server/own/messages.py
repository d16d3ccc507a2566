"""What the page sends and is answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.server.queue import Kind, State


class Problem(BaseModel):
    """One thing that is wrong with what was sent."""

    field: str
    message: str
    hint: str


class Error(BaseModel):
    """Why something is refused."""

    detail: str
    problems: list[Problem] = []


class Note(BaseModel):
    """What there is to know of an option."""

    kind: str
    field: str
    message: str


class SentPicture(BaseModel):
    """One uploaded picture."""

    model_config = ConfigDict(strict=True, extra="forbid")
    address: str = Field(min_length=1, max_length=2048, description="Of the upload.")
    caption: str | None = Field(None, max_length=10_000, description="None: the instance prompt.")


class Submission(BaseModel):
    """What is to be trained, or prepared to be looked at."""

    model_config = ConfigDict(strict=True, extra="forbid")
    pictures: list[SentPicture] = Field([], max_length=5000, description="Uploads, one by one.")
    archive: str | None = Field(None, min_length=1, description="Upload of all, packed.")
    presets: list[str] = Field([], max_length=8, description="Names; a later one goes over.")
    options: dict[str, Any] = Field({}, description="By the names of a configuration file.")


class Wanted(BaseModel):
    """Pictures to be made with what a training gave."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    prompt: str = Field(min_length=1, max_length=4096, description="What they show.")
    negative_prompt: str | None = Field(None, max_length=4096, description="What they do not.")
    strength: float = Field(1.0, ge=-4, le=4, description="s in W + s * ΔW; 0: the base model.")
    seed: int = Field(0, ge=0, le=2**53, description="Picture n is made from (seed, n).")
    num_images: int = Field(1, ge=1, le=8, description="How many.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=200, description="Of denoising. None: as the model has it."
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="Weight of the prompt. None: as the model has it."
    )
    width: int | None = Field(None, ge=32, le=4096, description="In pixels. None: the model's own.")
    height: int | None = Field(None, ge=32, le=4096, description="In pixels, likewise.")


class Checked(BaseModel):
    """What a submission means, or what is wrong with it."""

    values: dict[str, Any] = Field(
        {}, description="Every option, without those that say where pictures are."
    )
    notes: list[Note] = []
    problems: list[Problem] = []


class Option(BaseModel):
    """One option of the form."""

    name: str
    allowed: str = Field(description="In words.")
    description: str
    default: Any
    choices: list[str] | None
    types: list[str] = Field(description="Of JSON.")
    minimum: float | None
    maximum: float | None


class Section(BaseModel):
    """The options that belong together."""

    name: str
    description: str
    options: list[Option]


class Preset(BaseModel):
    """A named starting point."""

    name: str
    description: str
    values: dict[str, Any]


class Model(BaseModel):
    """A base model that has a name here."""

    name: str
    note: str


class Form(BaseModel):
    """All that can be chosen."""

    subjects: list[str]
    presets: list[Preset]
    models: list[Model]
    sections: list[Section]


class JobLine(BaseModel):
    """A job in a list. Times are seconds since 1970."""

    id: str
    protocol: str
    app: str
    kind: Kind
    state: State
    name: str
    cancel_requested: bool
    created: float
    started: float | None
    ended: float | None
    position: int | None = Field(description="Jobs that go before it, where it waits.")
    step: int
    total: int
    seconds_left: float | None


class Jobs(BaseModel):
    """The newest jobs, and whether there are older ones."""

    jobs: list[JobLine]
    more: bool


class Verdict(BaseModel):
    """What one reader said of a file."""

    reader: str
    status: str


class File(BaseModel):
    """A file of a result."""

    role: str
    meaning: str = Field(description="What it is, in words.")
    name: str
    size: int
    content_type: str
    address: str
    verdicts: list[Verdict]


class Failure(BaseModel):
    """Why a job failed."""

    message: str
    hint: str
    problems: list[Problem]


class Trial(BaseModel):
    """Pictures that were asked for with a training's result."""

    id: str
    state: State
    wanted: Wanted


class JobDetails(JobLine):
    """All that is known of a job.

    Args:
        request: what the page sent for it, where it did.
        options: those that somebody set on purpose.
        sampled: what `trainer sample` left in the run folder.
    """

    request: dict[str, Any] | None
    options: dict[str, Any]
    notes: list[Note]
    ignored_options: dict[str, str]
    failure: Failure | None
    files: list[File]
    trials: list[Trial]
    sampled: dict[str, Any] | None
    has_report: bool
    has_prepared: bool


class Events(BaseModel):
    """What a job has said since a place in its log, and where it stands."""

    job: JobLine
    events: list[dict[str, Any]]
    next: str = Field(description="The place to ask from next.")
    restarted: bool = Field(description="Whether these are its events from the beginning.")
    more: bool = Field(description="Whether there is more already.")


class EventsQuery(BaseModel):
    """From where on."""

    since: str = ""


class JobsQuery(BaseModel):
    """Which part of the list."""

    limit: int = Field(50, ge=1, le=200)
    offset: int = Field(0, ge=0, le=2**31)


class Face(BaseModel):
    """A face that was found, in pixels of the whole picture."""

    left: float
    top: float
    width: float
    height: float


class PreparedPicture(BaseModel):
    """A picture as it is trained. Sizes are (height, width) in pixels."""

    name: str
    size: list[int]
    trained_size: list[int]
    trained_box: list[float]
    faces: list[Face]
    caption: str
    caption_origin: str
    repeats: int
    remarks: list[dict[str, str]]
    each_time: list[str]
    mask: str | None
    thumbnail: str | None = Field(description="Path below the job's pictures.")
    mask_view: str | None


class PreparedSet(BaseModel):
    """The pictures of one subject or class."""

    name: str
    level: Literal["ok", "look", "act"]
    advice: list[dict[str, str]]
    notes: list[Note]
    pictures: list[PreparedPicture]
    left_out: list[dict[str, str]]
    sheets: list[str]


class Prepared(BaseModel):
    """What the preparation left."""

    sets: list[PreparedSet]


class ReportAddress(BaseModel):
    """Where the report can be looked at for an hour."""

    address: str
