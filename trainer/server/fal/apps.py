"""The apps of fal that are here: the dialects with an owner in their name, and pictures.

Some names train by a guide and make pictures at fal: there the body tells what is meant.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, RootModel

from trainer.config import LEAVES, Note
from trainer.config_files import parse_yaml
from trainer.contracts import faults_in, left_aside, without_nulls
from trainer.dialects import dialect_names, layers_of, load_dialect
from trainer.errors import InputError, Missing, Problem
from trainer.generation import GenerationRequest, Trained
from trainer.server.queue import Job, Kind
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop

NAME = "fal"

# fal's defaults of the apps that make pictures. Where there is none, the pipeline's own is taken.
PICTURES: Mapping[str, Mapping[str, Any]] = {
    "fal-ai/flux-lora": {
        "image_size": "landscape_4_3",
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
    },
    "fal-ai/sdxl-lora": {},
    "fal-ai/sd15-lora": {},
}
# Which dialect takes an archive under a name whose own takes pictures one by one.
_ARCHIVES = {"fal-ai/flux-lora": "fal-ai/flux-lora-fast-training"}
_TRAINING = ("training_images", "images_data_url")

_SIZES = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
_NOT_USED = {
    "enable_safety_checker": "there is no safety checker here",
    "acceleration": "pictures are made as the pipeline does it",
}
_WORDS = {
    "image_size": f"one of {', '.join(_SIZES)}, or width and height from 64 to 4096",
    "loras": "a list of {path, scale}, each path the address of a result of this server",
}
# Where clients put the address of a webhook by mistake: into the model's own input.
_WEBHOOK_FIELDS = ("webhookUrl", "webhook_url", "fal_webhook")
_ELSEWHERE = "was trained on another base model than the app's, which the pictures are made with"
_RESULT = re.compile(r"/files/([0-9a-f]{32})(?:/.*)?")


class ImageSize(BaseModel):
    """Width and height."""

    model_config = ConfigDict(strict=True)
    width: int = Field(512, ge=64, le=4096, description="In pixels.")
    height: int = Field(512, ge=64, le=4096, description="In pixels.")


class LoraWeight(BaseModel):
    """What was trained, and how strongly it acts."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    path: str = Field(description="Address of a result of this server.")
    scale: float = Field(1.0, ge=0, le=4, description="Strength.")


SizeName = Literal[
    "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"
]


class PictureInput(BaseModel):
    """A request for pictures."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    prompt: str = Field(description="What the pictures show.")
    negative_prompt: str | None = Field(None, description="What they do not show.")
    image_size: ImageSize | SizeName | None = Field(None, description="None: the model's own.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=200, description="Steps of denoising. None: as the model has it."
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="Guidance. None: as the model has it."
    )
    loras: list[LoraWeight] = Field([], max_length=16, description="What was trained.")
    num_images: int = Field(1, ge=1, le=16, description="How many.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="None: a random one.")
    output_format: Literal["jpeg", "png", "webp"] = Field("jpeg", description="Of the files.")
    sync_mode: bool = Field(False, description="Pictures as data: URIs in the answer.")
    enable_safety_checker: bool = Field(True, description="Not used: there is none here.")
    acceleration: str = Field("none", description="Not used.")


class Picture(BaseModel):
    """One picture."""

    url: str
    width: int
    height: int
    content_type: str


class PictureOutput(BaseModel):
    """Pictures that were made."""

    images: list[Picture]
    timings: dict[str, float]
    seed: int
    has_nsfw_concepts: list[bool]
    prompt: str
    ignored_options: dict[str, str] | None = None


def apps() -> list[str]:
    """The names of all apps."""
    return [name for name in dialect_names() if "/" in name]


def dialect_of(app: str, payload: Mapping[str, Any]) -> str:
    """The dialect that a training request is in."""
    if payload.get("training_images") is None and payload.get("images_data_url") is not None:
        return _ARCHIVES.get(app, app)
    return app


def input_of(app: str) -> type[BaseModel]:
    """What an app takes."""
    trains = load_dialect(app).Input
    if app not in PICTURES:
        return trains
    forms: list[type[BaseModel]] = [trains, PictureInput]
    if app in _ARCHIVES:
        forms.append(load_dialect(_ARCHIVES[app]).Input)
    return _any_of(app, "Input", forms)


def output_of(app: str) -> type[BaseModel]:
    """What an app answers."""
    trained = load_dialect(app).Output
    return _any_of(app, "Output", [trained, PictureOutput]) if app in PICTURES else trained


def work_of(app: str, kind: Kind, payload: Mapping[str, Any], workshop: Workshop) -> str:
    """What a request means, as a job works on it.

    Raises:
        Refusal: with every field at fault.
    """
    if kind == "generation":
        return _pictures(app, payload, workshop).model_dump_json()
    return workshop.training(dialect_of(app, payload), payload)


def notes_on(payload: Mapping[str, Any]) -> list[Note]:
    """What a request asked for in vain and a training does not say itself."""
    return [
        Note(
            kind="warning",
            field=f"request.{name}",
            message="calls nobody: a webhook is given beside the input, which is `fal_webhook` in "
            "the address",
        )
        for name in _WEBHOOK_FIELDS
        if name in payload
    ]


def _any_of(app: str, kind: str, forms: list[type[BaseModel]]) -> type[BaseModel]:
    """A model whose value is in one of several forms."""
    union: Any = forms[0]
    for form in forms[1:]:
        union = union | form
    words = re.findall(r"[a-z0-9]+", app.partition("/")[2])
    name = "".join(word.capitalize() for word in words) + kind
    return type(name, (RootModel[union],), {"__doc__": f"{kind} of `{app}`."})


def kind_of(app: str, payload: Mapping[str, Any]) -> Kind:
    """Whether a request is for a training or for pictures.

    Raises:
        Refusal: that cannot be told.
    """
    if app not in PICTURES or any(payload.get(name) is not None for name in _TRAINING):
        return "training"
    if payload.get("prompt") is not None:
        return "generation"
    hint = "give `training_images` to train, or `prompt` to make pictures"
    problems = [Missing(name, "is missing", hint) for name in ("training_images", "prompt")]
    raise Refusal("invalid", f"`{app}` trains and makes pictures; {hint}", problems=problems)


def _pictures(app: str, payload: Mapping[str, Any], workshop: Workshop) -> GenerationRequest:
    known = {name: value for name, value in payload.items() if name in PictureInput.model_fields}
    given = {**PICTURES[app], **without_nulls(known)}
    problems = [fault.problem(app) for fault in faults_in(given, PictureInput, _WORDS)]
    if problems:
        raise Refusal("invalid", "\n".join(map(str, problems)), problems=problems)
    asked = PictureInput.model_validate(given)
    base = _base(app, workshop)
    runs = _runs(app, asked, workshop)
    elsewhere = [number for number, run in enumerate(runs) if run.base != base["model_url"]]
    width, height = _size(asked)
    return GenerationRequest(
        # Else the base model as the runs have it, with its VAE.
        model={} if runs and not elsewhere else base,
        trained=tuple(run.trained for run in runs),
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        seed=secrets.randbits(32) if asked.seed is None else asked.seed,
        num_images=asked.num_images,
        output_format=asked.output_format,
        notes=(
            *notes_on(payload),
            *left_aside(without_nulls(payload), PictureInput, _NOT_USED, app),
            *(
                Note(kind="warning", field=f"request.loras[{number}].path", message=_ELSEWHERE)
                for number in elsewhere
            ),
        ),
    )


def _size(asked: PictureInput) -> tuple[int | None, int | None]:
    if isinstance(asked.image_size, ImageSize):
        return asked.image_size.width, asked.image_size.height
    return (None, None) if asked.image_size is None else _SIZES[asked.image_size]


def _base(app: str, workshop: Workshop) -> dict[str, Any]:
    """The base model of an app, as options of the model section, the owner's before others.

    Raises:
        Refusal: it has no place on this machine's lists.
    """
    try:
        layers = [*layers_of(app, {}), *workshop.overrides]
    except InputError as error:
        raise Refusal("invalid", error.message, problems=error.problems) from error
    values = {name: value for layer in layers for name, value in layer.values.items()}
    return {name: value for name, value in values.items() if LEAVES[name].section == "model"}


@dataclass(frozen=True)
class _Run:
    """A run whose result is a LoRA here.

    Args:
        base: `model_url` of what it was trained on.
    """

    trained: Trained
    base: str


def _runs(app: str, asked: PictureInput, workshop: Workshop) -> list[_Run]:
    """The runs that a request names.

    Raises:
        Refusal: one is none of this server's, or was trained on what another app draws with.
    """
    problems: list[Problem] = []
    runs: list[_Run] = []
    for number, lora in enumerate(asked.loras):
        field, job = f"loras[{number}].path", _job_of(lora.path, workshop)
        if job is None:
            message = "is no result of a training on this server"
            hint = "give the address of a file that a training here answered"
            problems.append(Problem(field, message, hint))
            continue
        base = parse_yaml(job.work, "config.yaml")["model"]["model_url"]
        other = _other_app(app, base, workshop)
        if other is not None:
            message = f"was trained on the base model of `{other}`, not of `{app}`"
            problems.append(Problem(field, message, f"ask `{other}` for these pictures"))
        folder = str(workshop.folders.of(job.id).run.root.resolve())
        runs.append(_Run(Trained(run=folder, strength=lora.scale), base))
    if problems:
        raise Refusal("invalid", "\n".join(map(str, problems)), problems=problems)
    return runs


def _other_app(app: str, base: str, workshop: Workshop) -> str | None:
    """The app that makes pictures with this base model, where this one does not."""
    if _base(app, workshop)["model_url"] == base:
        return None
    others = (other for other in PICTURES if other != app)
    return next((o for o in others if _base(o, workshop)["model_url"] == base), None)


def _job_of(address: str, workshop: Workshop) -> Job | None:
    """The training whose result lies at an address; its id is enough, whatever the host."""
    try:
        found = _RESULT.fullmatch(urlsplit(address).path)
    except ValueError:
        return None
    file = workshop.files.find(found.group(1)) if found else None
    job = workshop.queue.find(file.job) if file and file.job else None
    return job if job is not None and job.kind == "training" else None
