"""Pictures, captions, geometry and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from trainer.fields import (
    PREPARATION_STEPS,
    PhotoClass,
    PreparationStep,
    PreparationSteps,
    Section,
    Text,
    as_tuple,
    capitalized,
    clash,
    stripped,
)


class Concept(Section):
    """One subject of a training with several.

    An option left at None is the run's own option of that name.
    """

    images_data_url: Text = Field(description="Its pictures: folder, archive or data: URI.")
    token: Annotated[Text | None, BeforeValidator(stripped)] = Field(
        None,
        pattern="^[^,]+$",
        description="Its identifier among token_abstraction. None: the identifier at its place.",
    )
    instance_prompt: Text | None = Field(
        None,
        description="Caption of its pictures without one. None: the run's, about this token.",
    )
    captions_file_url: Text | None = Field(None, description="Captions of its pictures.")
    repeats: int = Field(1, ge=1, description="Times that an epoch shows each of its pictures.")
    with_prior_preservation: bool | None = Field(
        None, description="Train on pictures of its class beside."
    )
    prior_loss_weight: float | None = Field(
        None, ge=0, description="Weight of its class pictures' loss."
    )
    photo_class: Annotated[PhotoClass | None, BeforeValidator(capitalized)] = Field(
        None, description="Its class."
    )
    class_prompt: Text | None = Field(None, description="Caption of its class pictures.")
    class_images_url: Text | None = Field(None, description="Pictures of its class.")
    num_class_images: int | None = Field(
        None, ge=1, description="Class pictures made where class_images_url gives none."
    )


# The JSON Schema of the list, written out: nothing in a configuration refers to definitions.
CONCEPTS_SCHEMA = {
    "anyOf": [
        {"type": "array", "minItems": 1, "items": Concept.model_json_schema()},
        {"type": "null"},
    ]
}


class DataConfig(Section):
    """Pictures, captions and geometry."""

    images_data_url: Text | None = Field(
        None,
        description="Training pictures: folder, .zip, .tar, .tar.gz, http(s) URL or data: URI; "
        "required unless concepts are given (fal).",
    )
    concepts: Annotated[
        tuple[Concept, ...] | None, BeforeValidator(as_tuple), WithJsonSchema(CONCEPTS_SCHEMA)
    ] = Field(
        None,
        min_length=1,
        description="Several subjects in one training, instead of images_data_url: each with "
        "images_data_url, and where it differs from the rest of the configuration token, "
        "instance_prompt, captions_file_url, repeats, photo_class, class_prompt, "
        "class_images_url, num_class_images, with_prior_preservation and prior_loss_weight (ours).",
    )
    captions_file_url: Text | None = Field(
        None,
        description="JSON lines with `file_name` and a caption column; matched by path, or by "
        "base name where that is unique. Same-stem .txt files are read without it (fal).",
    )
    caption_column: Text = Field("text", description="Caption key in captions_file_url (fal).")
    instance_prompt: Text = Field(
        "A photograph of a TOK",
        description="Caption of every picture that has none of its own (fal).",
    )
    skip_caption_generation: bool = Field(
        True,
        description="Do not write captions with a captioning model for pictures without one; "
        "fal's default is false (fal).",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of examples trained with an empty caption, drawn each step (fal).",
    )
    resolution_width: int | None = Field(
        None,
        ge=32,
        multiple_of=8,
        description="Trained width in pixels. None: the base model's own size (fal).",
    )
    resolution_height: int | None = Field(
        None,
        ge=32,
        multiple_of=8,
        description="Trained height in pixels. None: the base model's own size (fal).",
    )
    priority: Literal["speed", "quality", "high_res_only"] | None = Field(
        None,
        description="Resolutions to train at, instead of a width and height, as shares of the base "
        "model's own: speed half its side, 512 for FLUX.1; quality half, three quarters and all "
        "of it; high_res_only all of it. None: one resolution (BFL).",
    )
    enable_bucket: bool | None = Field(
        None,
        description="Train each picture at the size nearest to its own aspect, of the same area. "
        "None: where neither width nor height is given (kohya).",
    )
    preparation_order: PreparationSteps = Field(
        PREPARATION_STEPS,
        description="Order in which pictures are cut to their face, have faces redrawn and are "
        "resized, comma-separated; a step that is left out takes its usual place. A picture that "
        "is resized before it is cut to its face is cut to its window before (Novita).",
    )
    resize_width: int | None = Field(
        None,
        ge=32,
        le=8192,
        description="Width of the window that the resize of preparation_order brings pictures to, "
        "from where they come to the trained one at the end. None: the trained width (Novita).",
    )
    resize_height: int | None = Field(
        None,
        ge=32,
        le=8192,
        description="Height of that window. None: the trained height (Novita).",
    )
    center_crop: bool = Field(
        True,
        description="Take the middle window instead of a random one each time; fal's default is "
        "false (fal).",
    )
    face_aware_cropping: bool = Field(
        False, description="Put the window over the largest face; fal's default is true (fal)."
    )
    random_flip: bool = Field(
        False, description="Mirror half of the examples left to right, drawn each step (fal)."
    )
    random_crop_offset_x: int = Field(
        0, ge=0, description="Move the window by up to this many pixels left or right (fal)."
    )
    random_crop_offset_y: int = Field(
        0, ge=0, description="Move the window by up to this many pixels up or down (fal)."
    )
    random_rotation_start: int = Field(
        0, ge=-180, le=180, description="Smallest rotation in degrees; fal's default is -2 (fal)."
    )
    random_rotation_end: int = Field(
        0, ge=-180, le=180, description="Largest rotation in degrees; fal's default is 2 (fal)."
    )
    cache_latents: bool = Field(
        True,
        description="Encode each picture once, for later runs too, and sample from its stored "
        "posterior; flips are stored as twins, other random geometry cannot be cached; fal's "
        "default of false counts only there (fal).",
    )

    @model_validator(mode="after")
    def _each_step_once(self) -> DataConfig:
        steps = self.preparation_order
        if len(set(steps)) < len(steps):
            raise clash("preparation_order", ", ".join(steps), "each step once")
        return self

    @model_validator(mode="after")
    def _rotation_range(self) -> DataConfig:
        if self.random_rotation_start > self.random_rotation_end:
            allowed = f"at most random_rotation_end, {self.random_rotation_end}"
            raise clash("random_rotation_start", self.random_rotation_start, allowed)
        return self


def in_order(steps: Sequence[PreparationStep]) -> tuple[PreparationStep, ...]:
    """All steps in the order of these; one that is left out takes its usual place.

    That is the first for the cut, after the cut for the restoration, and the last for the resize.
    """
    ordered = list(steps)
    if "face_crop_region" not in ordered:
        ordered.insert(0, "face_crop_region")
    if "face_restore" not in ordered:
        ordered.insert(ordered.index("face_crop_region") + 1, "face_restore")
    if "resize" not in ordered:
        ordered.append("resize")
    return tuple(ordered)


class MaskConfig(Section):
    """Which pixels of a picture the loss counts."""

    clip_seg_mask_prompt: str = Field(
        "",
        description="What to keep of each picture, in words; empty: the whole picture; fal's "
        "default is head (fal).",
    )
    clip_seg_mask_temperature: float = Field(
        1.0, gt=0, description="Softness of the mask: larger is flatter (fal)."
    )
    clip_seg_mask_bias: float = Field(
        0.001, ge=0, le=1, description="Weight that every pixel keeps before normalising (fal)."
    )
    class_image_mask_style: Literal["none", "normal", "invert"] = Field(
        "normal", description="Mask on the class pictures of prior preservation (fal)."
    )
    segmenter: Literal["clipseg", "luminance"] = Field(
        "clipseg",
        description="What finds clip_seg_mask_prompt in a picture: the model CLIPSeg, or for "
        "trials the brightness of each pixel, whatever the prompt (ours).",
    )
    clipseg_url: Text = Field(
        "CIDAS/clipseg-rd64-refined",
        description="CLIPSeg's weights: hub id or local folder (ours).",
    )
    use_given_masks: bool = Field(
        True,
        description="Take masks that come with the pictures before any others: masks/NAME.png, "
        "NAME_mask.png or a picture's alpha channel; white counts, black does not (ours).",
    )
