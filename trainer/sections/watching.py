"""What is looked at while a training runs: pictures of prompts, and pictures kept out of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic.config import JsonDict

from trainer.fields import WATCHING_ONLY, Section, Text, as_tuple

_PROMPTS_SCHEMA: JsonDict = {"type": "array", "items": {"type": "string", "minLength": 1}}


def _split_lines(value: object) -> object:
    """Texts, whether they come as a sequence or as the lines of one text; commas part none."""
    if isinstance(value, str):
        return tuple(line.strip() for line in value.splitlines() if line.strip())
    return as_tuple(value)


Prompts = Annotated[
    tuple[Text, ...], BeforeValidator(_split_lines), WithJsonSchema(_PROMPTS_SCHEMA)
]


class SampleConfig(Section):
    """What is looked at on the way: pictures of prompts, and pictures kept out of training."""

    validation_prompts: Prompts = Field(
        (),
        description="Make a picture of each before the first step, by the base model, and after "
        "the last, from the same noise; on the way as sample_steps says. None given: of the "
        "instance prompts, where sample_steps is set (ours; diffusers' validation_prompt).",
        json_schema_extra=WATCHING_ONLY,
    )
    sample_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between two looks at validation_prompts. None: first and last (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    sample_inference_steps: int | None = Field(
        None,
        ge=1,
        description="Denoising steps of these pictures. None: as the base model's pipeline (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    sample_guidance_scale: float | None = Field(
        None,
        ge=0,
        description="How closely these pictures follow their prompts. None: as the base model's "
        "pipeline (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    validation_images: int = Field(
        0,
        ge=0,
        description="Pictures of the subject that are never trained on: their loss, always of the "
        "same noise and timesteps, tells learning from learning by heart (ours).",
    )
    validation_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between two looks at validation_images. None: a tenth of the run "
        "(ours).",
        json_schema_extra=WATCHING_ONLY,
    )
