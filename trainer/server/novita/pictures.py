"""Novita's text to image: the request, and the pictures that it means here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from trainer.config import Note
from trainer.contracts import left_aside, without_nulls
from trainer.errors import InputError, Problem
from trainer.generation import GenerationRequest, PictureFormat, Trained
from trainer.known_models import known_model, known_models
from trainer.leaves import nearest
from trainer.resolve import Layer
from trainer.server.inputs import Inputs
from trainer.server.workshop import told_to_strangers

SERVICE = "Novita's text to image"

# Sampler to diffusers class, after the table of schedulers in diffusers' documentation.
_SAMPLERS: Mapping[str, str] = {
    "Euler a": "EulerAncestralDiscreteScheduler",
    "Euler": "EulerDiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM2": "KDPM2DiscreteScheduler",
    "DPM2 a": "KDPM2AncestralDiscreteScheduler",
    "DPM++ 2S a": "DPMSolverSinglestepScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++": "DPMSolverMultistepScheduler",
    "DPM++ SDE": "DPMSolverSinglestepScheduler",
    "DDIM": "DDIMScheduler",
    "PLMS": "PNDMScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
# What diffusers does not have, and the sampler that is nearest: these are DPM-Solver (Lu et al.
# 2022) in its single-step form with step sizes of their own.
_NEAREST = {"DPM fast": "DPM++ 2S a", "DPM adaptive": "DPM++ 2S a"}
_KARRAS = " Karras"
_WITH_KARRAS = ("LMS", "DPM2", "DPM2 a", "DPM++", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE")
# What applications send where they mean the model's own VAE.
_OWN_VAE = ("", "none", "automatic")
_SUFFIX = ".safetensors"
_RANDOM = 2**32


class Named(BaseModel):
    """A file of the service by its name; an empty one is none."""

    model_name: str = ""


class Lora(Named):
    """A LoRA."""

    strength: float = Field(1.0, ge=-2, le=2, description="s in W + s * ΔW.")


class HiresFix(BaseModel):
    """A second pass at a larger size."""

    target_width: int | None = None
    target_height: int | None = None
    strength: float | None = None
    upscaler: str | None = None


class Refiner(BaseModel):
    """A second model for the last steps."""

    switch_at: float | None = None


class Wanted(BaseModel):
    """The pictures that are asked for."""

    model_name: str = Field(min_length=1, description="Base model, by a name of this server's.")
    prompt: str = Field(min_length=1, max_length=4096, description="What the pictures show.")
    negative_prompt: str | None = Field(None, description="What they do not.")
    width: int = Field(512, ge=32, le=4096, description="In pixels.")
    height: int = Field(512, ge=32, le=4096, description="In pixels.")
    image_num: int = Field(1, ge=1, le=8, description="How many.")
    steps: int = Field(20, ge=1, le=100, description="Of denoising.")
    seed: int = Field(-1, ge=-1, le=2**63 - 1, description="-1: any.")
    clip_skip: int | None = Field(None, ge=1, le=12, description="As A1111 counts.")
    guidance_scale: float = Field(7.5, ge=1, le=30, description="Weight of the prompt.")
    sampler_name: str | None = Field(
        None, description="Sampler, as A1111 calls it. None: the model's own."
    )
    sd_vae: str | None = Field(None, description="VAE in place of the model's own.")
    loras: list[Lora] = Field([], max_length=5, description="Trained models.")
    embeddings: list[Named] = Field([], description="Not known here.")
    hires_fix: HiresFix | None = Field(None, description="Not done here.")
    refiner: Refiner | None = Field(None, description="Not done here.")


class Webhook(BaseModel):
    """Who is told of the end."""

    url: str = Field(pattern="^https?://", max_length=2048)


class Extra(BaseModel):
    """How the pictures are wanted."""

    response_image_type: PictureFormat = Field("png", description="Format of the files.")
    webhook: Webhook | None = Field(None, description="Told of the end.")
    enable_nsfw_detection: bool | None = Field(None, description="Not done here.")
    nsfw_detection_level: int | None = Field(None, description="Not done here.")
    custom_storage: dict[str, Any] | None = Field(None, description="Not used here.")
    enterprise_plan: dict[str, Any] | None = Field(None, description="Not used here.")


class Body(BaseModel):
    """A request for pictures."""

    extra: Extra = Extra()
    request: Wanted


RunOf = Callable[[str], str | None]
Locations = Literal["model_url", "vae_url"]


def generation_request(
    asked: Body, payload: Mapping[str, Any], inputs: Inputs, run_of: RunOf
) -> GenerationRequest:
    """The pictures that are meant.

    Args:
        payload: the request as it came.
        inputs: judges hub ids and paths.
        run_of: the run folder of a trained model, by its name.

    Raises:
        InputError: with everything in the request that this server does not have.
    """
    wanted, problems = asked.request, list[Problem]()
    model = _places(asked.request, inputs, problems)
    trained = []
    for number, lora in enumerate(wanted.loras):
        run = run_of(lora.model_name) if lora.model_name else None
        if run is not None:
            trained.append(Trained(run=run, strength=lora.strength))
        elif lora.model_name:
            message = f"got `{lora.model_name}`, which is no trained model of this server's"
            hint = "take a `model_name` from a training whose status is SUCCESS"
            problems.append(Problem(f"request.loras[{number}].model_name", message, hint))
    sampler, karras = _sampler(wanted.sampler_name)
    if sampler is None and wanted.sampler_name:
        message = f"got `{wanted.sampler_name}`; allowed: {', '.join(sampler_names())}"
        problems.append(Problem("request.sampler_name", message))
    if problems:
        raise InputError(problems)
    return GenerationRequest(
        model=model,
        trained=tuple(trained),
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        seed=secrets.randbelow(_RANDOM) if wanted.seed == -1 else wanted.seed,
        num_images=wanted.image_num,
        output_format=asked.extra.response_image_type,
        clip_skip=wanted.clip_skip,
        scheduler=sampler,
        karras=karras,
        notes=tuple(_notes(asked, without_nulls(payload))),
    )


def _notes(asked: Body, given: Mapping[str, Any]) -> Iterator[Note]:
    """What a request asks for and is not done, with the reason."""
    for name in (name for name in given if name not in Body.model_fields):
        yield Note(kind="ignored", field=name, message=f"{SERVICE} has no such field")
    yield from left_aside(given["request"], Wanted, {}, SERVICE)
    yield from left_aside(given.get("extra", {}), Extra, {}, SERVICE, within="extra")
    for field, message in _not_done(asked):
        yield Note(kind="ignored", field=field, message=message)


def _not_done(asked: Body) -> Iterator[tuple[str, str]]:
    wanted, extra = asked.request, asked.extra
    if any(embedding.model_name for embedding in wanted.embeddings):
        yield "request.embeddings", "what a training taught comes with its own model alone"
    if wanted.hires_fix is not None:
        yield "request.hires_fix", "pictures are made at their size in one pass"
    if wanted.refiner is not None and wanted.refiner.switch_at is not None:
        yield "request.refiner", "one model makes all steps"
    if wanted.sampler_name in _NEAREST:
        yield "request.sampler_name", f"the nearest here is `{_NEAREST[wanted.sampler_name]}`"
    if extra.enable_nsfw_detection or extra.nsfw_detection_level:
        yield "extra.enable_nsfw_detection", "pictures are not judged here"
    if extra.custom_storage:
        yield "extra.custom_storage", "pictures stay on this server"
    if (extra.enterprise_plan or {}).get("enabled"):
        yield "extra.enterprise_plan", "there is one queue for all"


def _places(wanted: Wanted, inputs: Inputs, problems: list[Problem]) -> dict[str, Any]:
    """Options of the base model and its VAE."""
    model = _options(wanted.model_name, "model_url", inputs, problems)
    if (wanted.sd_vae or "").lower() not in _OWN_VAE:
        assert wanted.sd_vae is not None
        vae = _options(wanted.sd_vae, "vae_url", inputs, problems)
        model |= {name: value for name, value in vae.items() if name == "vae_url"}
    return model


def _options(name: str, leaf: Locations, inputs: Inputs, problems: list[Problem]) -> dict[str, Any]:
    """The options that a name stands for; what is wrong with it joins the problems."""
    field = "request.model_name" if leaf == "model_url" else "request.sd_vae"
    known = known_model(name) or known_model(name.removesuffix(_SUFFIX))
    if known is not None and leaf in known.options:
        return dict(known.options)
    if known is not None:
        problems.append(told_to_strangers(known.problem(field), field))
        return {}
    if "/" not in name:
        message = f"got `{name}`; allowed: a name on this server's list, or a hub id"
        near = nearest(name.removesuffix(_SUFFIX), known_models())
        problems.append(Problem(field, message, near or "GET /v3/model lists the names"))
        return {}
    (layer,) = inputs.admitted([Layer("request", {leaf: name}, explicit=True)])
    problems += [Problem(field, problem.message, problem.hint) for problem in layer.problems]
    return dict(layer.values)


def _sampler(name: str | None) -> tuple[str | None, bool]:
    """The class of diffusers for a sampler, and whether its noise levels are Karras'."""
    if name is None or name not in sampler_names():
        return None, False
    plain = _NEAREST.get(name, name).removesuffix(_KARRAS)
    return _SAMPLERS[plain], name.endswith(_KARRAS)


def sampler_names() -> list[str]:
    """All samplers that a request may name."""
    return [*_SAMPLERS, *(f"{name}{_KARRAS}" for name in _WITH_KARRAS), *_NEAREST]
