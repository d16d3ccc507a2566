"""BFL's five ways of making pictures with a finetune: the requests, and what they mean here.

Ultra and pro run on the model that the finetune was trained on. What is guided by depth, edges or
a hole has a base model of its own, which the owner's list must name.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from trainer.config import Note
from trainer.config_files import parse_yaml
from trainer.contracts import left_aside, without_nulls
from trainer.errors import InputError
from trainer.generation import GenerationRequest, Guide, PictureFormat, Trained
from trainer.known_models import known_model
from trainer.locations import content_of, is_web_address
from trainer.server.queue import Job
from trainer.server.signatures import FORMATS, is_picture
from trainer.server.webhooks import checked_webhook
from trainer.server.workshop import Workshop

SERVICE = "BFL's inference"

_RANDOM = 2**32
# Sides are multiples of this, as the service's own are.
_SIDE_STEP = 32
_AREA = 1024 * 1024
_WIDEST = 21 / 9
# Name of the model on the owner's list that measures depth.
DEPTH_ESTIMATOR = "depth-estimator"


class Webhooked(BaseModel):
    """Who is told of the end."""

    webhook_url: str | None = Field(None, max_length=2083, description="Told of the end.")
    webhook_secret: str | None = Field(None, description="Signs what is told.")


class Asked(Webhooked):
    """What all requests for pictures have."""

    finetune_id: str = Field(min_length=1, description="Of a finetune that is ready.")
    finetune_strength: float = Field(
        1.1, ge=0, le=2, description="s in W + s * ΔW; 0 is the base model."
    )
    prompt: str = Field("", max_length=10_000, description="What the picture shows.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="None: any.")
    output_format: PictureFormat = Field("jpeg", description="Format of the file.")
    prompt_upsampling: bool = Field(False, description="Not done here.")
    safety_tolerance: int = Field(2, ge=0, le=6, description="Not judged here.")


class Ultra(Asked):
    """A picture of some aspect ratio."""

    finetune_strength: float = Field(1.2, ge=0, le=2, description="s in W + s * ΔW.")
    aspect_ratio: str = Field(
        "16:9", pattern="^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$", description="21:9 to 9:21."
    )
    raw: bool = Field(False, description="Not done here.")
    image_prompt: str | None = Field(None, description="Not done here.")
    image_prompt_strength: float = Field(0.1, ge=0, le=1, description="Not done here.")


class Pro(Asked):
    """A picture of some size."""

    width: int = Field(1024, ge=256, le=1440, multiple_of=_SIDE_STEP, description="In pixels.")
    height: int = Field(768, ge=256, le=1440, multiple_of=_SIDE_STEP, description="In pixels.")
    steps: int = Field(40, ge=1, le=50, description="Of denoising.")
    guidance: float = Field(2.5, ge=1.5, le=5, description="Weight of the prompt.")
    image_prompt: str | None = Field(None, description="Not done here.")


class Depth(Asked):
    """A picture guided by a depth map."""

    prompt: str = Field(max_length=10_000, description="What the picture shows.")
    control_image: str | None = Field(
        None, description="Picture whose depth is measured: base64 or an address."
    )
    preprocessed_image: str | None = Field(
        None, description="Depth map, near things bright: base64 or an address."
    )
    steps: int = Field(50, ge=15, le=50, description="Of denoising.")
    guidance: float = Field(15, ge=1, le=100, description="Weight of the prompt.")


class Canny(Asked):
    """A picture guided by edges."""

    prompt: str = Field(max_length=10_000, description="What the picture shows.")
    control_image: str | None = Field(
        None, description="Picture whose edges are found: base64 or an address."
    )
    preprocessed_image: str | None = Field(
        None, description="Edges, white on black: base64 or an address."
    )
    canny_low_threshold: int = Field(50, ge=0, le=500, description="Of Canny's detector.")
    canny_high_threshold: int = Field(200, ge=0, le=500, description="Of Canny's detector.")
    steps: int = Field(50, ge=15, le=50, description="Of denoising.")
    guidance: float = Field(30, ge=1, le=100, description="Weight of the prompt.")


class Fill(Asked):
    """A picture with a hole to be filled."""

    image: str = Field(min_length=1, description="The picture: base64 or an address.")
    mask: str | None = Field(
        None, description="White is made anew. None: what is transparent in the picture."
    )
    steps: int = Field(50, ge=15, le=50, description="Of denoising.")
    guidance: float = Field(60, ge=1.5, le=100, description="Weight of the prompt.")


@dataclass(frozen=True)
class Way:
    """A way of making pictures.

    Args:
        model: the request.
        guide: kind of the guiding picture.
        base: name of the base model in the owner's list; without one it is the finetune's own.
    """

    model: type[Asked]
    guide: Guide | None = None
    base: str = ""


# The last part of the address to what it does.
WAYS: Mapping[str, Way] = {
    "flux-pro-1.1-ultra-finetuned": Way(Ultra),
    "flux-pro-finetuned": Way(Pro),
    "flux-pro-1.0-depth-finetuned": Way(Depth, "depth", "flux-pro-1.0-depth"),
    "flux-pro-1.0-canny-finetuned": Way(Canny, "canny", "flux-pro-1.0-canny"),
    "flux-pro-1.0-fill-finetuned": Way(Fill, "fill", "flux-pro-1.0-fill"),
}

_NOT_DONE: Mapping[str, str] = {
    "prompt_upsampling": "prompts are taken as they are",
    "safety_tolerance": "pictures are not judged here",
    "raw": "there is one way of processing",
    "image_prompt": "pictures are made from text alone",
    "image_prompt_strength": "pictures are made from text alone",
    "control_image": "the preprocessed_image guides",
}

Request = TypeVar("Request", bound=Asked)


class NoBase(Exception):
    """The base model of a way has no place on this server.

    Args:
        message: says how it gets one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def generation_request(
    asked: Asked, payload: Mapping[str, Any], way: Way, finetune: Job, workshop: Workshop
) -> GenerationRequest:
    """The picture that is meant.

    Args:
        payload: the request as it came.
        finetune: the training.
        workshop: keeps the pictures that a request has.

    Raises:
        InputError: a picture or a size in the request cannot be used.
        Refusal: a picture is where none may be fetched.
        NoBase: the base model is not there.
    """
    model = _base(way.base) if way.base else {}
    run = str(workshop.folders.of(finetune.id).run.root.resolve())
    trained = parse_yaml(finetune.work, "config.yaml").get("data", {})
    wanted = asked.model_dump()
    return GenerationRequest(
        model=model,
        trained=(Trained(run=run, strength=asked.finetune_strength),),
        prompt=asked.prompt,
        num_inference_steps=wanted.get("steps"),
        guidance_scale=wanted.get("guidance"),
        seed=secrets.randbelow(_RANDOM) if asked.seed is None else asked.seed,
        output_format=asked.output_format,
        notes=tuple(_notes(without_nulls(payload), way.model)),
        **_shape(wanted, trained),
        **(_guide(way.guide, wanted, workshop) if way.guide else {}),
    )


def _notes(given: Mapping[str, Any], model: type[Asked]) -> Iterator[Note]:
    """What a request asks for and is not done, with the reason."""
    is_guided = "preprocessed_image" not in given
    not_done = {
        name: reason
        for name, reason in _NOT_DONE.items()
        if name in model.model_fields
        and given.get(name) is not False
        and not (name == "control_image" and is_guided)
    }
    for note in left_aside(given, model, not_done, SERVICE):
        yield note.model_copy(update={"field": note.field.removeprefix("request.")})


def _base(name: str) -> dict[str, Any]:
    known = known_model(name)
    if known is not None and "model_url" in known.options:
        return dict(known.options)
    note = known.note if known is not None else ""
    raise NoBase(
        f"`{name}` has no place on this server: {note}; its owner can write "
        f"`{name}: {{model_url: …}}` into base_models.yaml"
    )


def _shape(wanted: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, int]:
    """Width and height; nothing where the guiding picture says them.

    Args:
        trained: the section of the finetune's configuration that has the trained size.
    """
    if "aspect_ratio" not in wanted:
        return {name: wanted[name] for name in ("width", "height") if name in wanted}
    across, down = map(int, wanted["aspect_ratio"].split(":"))
    ratio = across / down
    if not 1 / _WIDEST <= ratio <= _WIDEST:
        message = f"got `{wanted['aspect_ratio']}`; allowed: 21:9 to 9:21"
        raise InputError.of("aspect_ratio", message)
    width, height = trained.get("resolution_width"), trained.get("resolution_height")
    area = width * height if width and height else _AREA
    return {"width": _side(math.sqrt(area * ratio)), "height": _side(math.sqrt(area / ratio))}


def _side(length: float) -> int:
    return max(_SIDE_STEP, round(length / _SIDE_STEP) * _SIDE_STEP)


def _guide(guide: Guide, wanted: Mapping[str, Any], workshop: Workshop) -> dict[str, Any]:
    if guide == "fill":
        mask = wanted["mask"]
        return {
            "guide": guide,
            "guide_image": _kept(wanted["image"], "image", workshop),
            "guide_mask": None if mask is None else _kept(mask, "mask", workshop),
        }
    if wanted["preprocessed_image"] is not None:
        field = "preprocessed_image"
        return {"guide": guide, "guide_image": _kept(wanted[field], field, workshop)}
    if wanted["control_image"] is None:
        message = "is missing, and there is no preprocessed_image either"
        raise InputError.of("control_image", message, "give one of them")
    if guide == "depth":
        found: dict[str, Any] = {"depth_estimator": _depth_estimator()}
    else:
        limits = (wanted["canny_low_threshold"], wanted["canny_high_threshold"])
        found = {"canny_thresholds": limits}
    image = _kept(wanted["control_image"], "control_image", workshop)
    return {"guide": guide, "guide_image": image, **found}


def _depth_estimator() -> str:
    """The place of the model that measures depth.

    Raises:
        InputError: the owner's list has none.
    """
    known = known_model(DEPTH_ESTIMATOR)
    if known is None or "model_url" not in known.options:
        message = f"cannot guide: this server has no `{DEPTH_ESTIMATOR}`, which measures depth"
        hint = "give a depth map, near things bright, as preprocessed_image; the owner of the "
        hint += f"server can write `{DEPTH_ESTIMATOR}: {{model_url: …}}` into base_models.yaml"
        raise InputError.of("control_image", message, hint)
    return str(known.options["model_url"])


def _kept(location: str, field: str, workshop: Workshop) -> str:
    """Where the job reads a picture that a request has by its content or address.

    Raises:
        InputError: it is no picture, or may not be read.
        Refusal: it is where none may be fetched.
    """
    if is_web_address(location):
        place = workshop.inputs.data(location, field)
        return checked_webhook(place, field) if is_web_address(place) else place
    content = content_of(location, field)
    if not is_picture(content):
        message = f"is no picture; allowed: {FORMATS}"
        raise InputError.of(field, message, "give base64 or an address of one")
    return str(workshop.files.keep(content, field).resolve())
