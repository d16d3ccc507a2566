"""fal-ai/flux-lora-fast-training: its request, its machine defaults, and its answer.

From the types of the service's own client. They name no learning rate, rank or mask prompt: there
stands what fal's other trainers and their results have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trainer import dialects
from trainer.config import Note, TrainingConfig
from trainer.contracts import judged
from trainer.job import Result, ResultFile, Role
from trainer.resolve import Layer

NAMES: Mapping[str, Mapping[str, Any]] = {
    "fal_lora": {},
    "flux-lora-fast-training": {},
    "fal-ai/flux-lora-fast-training": {},
}
SERVICE = "fal-ai/flux-lora-fast-training"

# Service field to leaf, and service field to the reason why it is not taken. Everything else is
# placed by its name. Three fields together decide over the mask, see `_mask_prompt`.
RENAMED: Mapping[str, str] = {
    "trigger_word": "instance_prompt",
    "steps": "max_train_steps",
    "create_masks": "clip_seg_mask_prompt",
    "is_style": "caption_mode",
    "is_input_format_already_preprocessed": "clip_seg_mask_prompt",
}
FIELDS = dialects.named(RENAMED, {"token_abstraction": "trigger_word"})
NOT_USED: Mapping[str, str] = {
    "data_archive_format": "the first bytes of an archive tell what it is",
}

BASE = "black-forest-labs/FLUX.1-dev"
# The service masks the face of people; the sister service's prompt for that.
MASK_PROMPT = "head"
# The caption of a picture without one where no trigger is wanted.
WITHOUT_TRIGGER = "a photo"
_STYLE, _SUBJECT = "style", "plain"
_ONLY: Mapping[str, Any] = {"use_lora": True, "train_text_encoder_ti": False}
# A file of the service holds rank 16.
_DEFAULTS: Mapping[str, Any] = {
    **_ONLY,
    "model_url": BASE,
    "rank": 16,
    "learning_rate": 1e-4,
    "skip_caption_generation": True,
    "debug_dataset": True,
}
_WORDS = {
    "images_data_url": "the address of an archive of pictures, a path or a data: URI",
    "trigger_word": "text, not blank",
}


class Input(BaseModel):
    """A training request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    images_data_url: str = Field(
        min_length=1, description="Archive of pictures with .txt captions of the same name."
    )
    trigger_word: str | None = Field(
        None,
        pattern=r"^$|\S",
        description="Caption of pictures without one. None or empty: no trigger.",
    )
    create_masks: bool = Field(True, description="Weight the loss by a mask of the face.")
    steps: int = Field(1000, ge=1, description="Training steps.")
    is_style: bool = Field(False, description="Train a style: no masks.")
    is_input_format_already_preprocessed: bool = Field(
        False, description="Take the pictures as they are, with masks only where they are given."
    )
    data_archive_format: str | None = Field(None, description="Kind of the archive.")


class Output(dialects.LoraFiles):
    """A result; `kohya_lora_file` is this project's own."""

    diffusers_lora_file: dialects.File = Field(description="The LoRA for diffusers.")
    debug_preprocessed_output: dialects.File | None = Field(
        None, description="The pictures as trained."
    )
    ignored_options: dialects.IGNORED = None


OUTPUT_ROLES: Mapping[str, Role] = {
    **dialects.LORA_ROLES,
    "debug_preprocessed_output": "debug_dataset",
}


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The service's defaults, then the request's own fields."""
    found = judged(payload, Input, SERVICE, words=_WORDS, not_used=NOT_USED)
    given = {n: value for n, value in found.given.items() if n != "trigger_word" or value}
    placed = _placed({**found.defaults, **found.given})
    chosen = {RENAMED.get(name, name) for name in given}
    if "trigger_word" in given:
        chosen |= {"token_abstraction"}
    request = Layer(
        "request",
        {name: value for name, value in placed.items() if name in chosen},
        explicit=True,
        notes=[*_without_masks(given)],
    )
    left = {name: value for name, value in placed.items() if name not in chosen}
    return dialects.two_layers(SERVICE, {**_DEFAULTS, **left}, request, found, RENAMED)


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The service's answer for a finished run."""
    return Output.model_validate(dialects.described(result, OUTPUT_ROLES, url_for, FIELDS))


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training, see `Dialect`."""
    values = config.values()
    prompt = values["instance_prompt"]
    request = {
        "images_data_url": values["images_data_url"],
        "trigger_word": None if prompt == WITHOUT_TRIGGER else prompt,
        "create_masks": bool(values["clip_seg_mask_prompt"]),
        "steps": values["max_train_steps"],
        "is_style": values["caption_mode"] == _STYLE,
        "is_input_format_already_preprocessed": False,
    }
    return dialects.sayable(
        request,
        Input,
        SERVICE,
        words=_WORDS,
        leaf_of=lambda name: RENAMED.get(name, name),
        problems=[
            *dialects.only_one_subject(config, SERVICE),
            *dialects.only_these(config, _ONLY, SERVICE),
            *dialects.only_base(config, BASE, SERVICE),
        ],
    )


def _placed(filled: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a request with all its fields means."""
    word = filled["trigger_word"]
    return {
        "images_data_url": filled.get("images_data_url"),
        "max_train_steps": filled["steps"],
        "instance_prompt": word or WITHOUT_TRIGGER,
        "clip_seg_mask_prompt": "" if _without_masks_by(filled) else MASK_PROMPT,
        "caption_mode": _STYLE if filled["is_style"] else _SUBJECT,
        # A phrase may hold a comma, which parts names in a text.
        **({"token_abstraction": [word]} if word else {}),
    }


def _without_masks_by(fields: Mapping[str, Any]) -> str:
    """The field that switches masks off; empty where none does."""
    switches = ("is_style", "is_input_format_already_preprocessed")
    off = [name for name in switches if fields.get(name)]
    off += [] if fields.get("create_masks", True) else ["create_masks"]
    return off[0] if off else ""


def _without_masks(given: Mapping[str, Any]) -> Iterator[Note]:
    """A note where masks were asked for, and another field switches them off."""
    switch = _without_masks_by(given)
    if given.get("create_masks") and switch:
        message = f"{switch} is true, and {SERVICE} makes no masks then"
        yield Note(kind="ignored", field="request.create_masks", message=message)
