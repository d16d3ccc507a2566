"""The `train_model` of a guide to training on fal: its request, its defaults, and its answer.

The guide gives a configuration and no service's schema. It calls steps epochs ("Training
iterations"), and its defaults stand in its prose: batch size 1, learning rate 1e-4, 1024 x 1024
as the balance, which is the size that FLUX.1 and SDXL have by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer import dialects
from trainer.config import TrainingConfig
from trainer.contracts import judged
from trainer.job import Result, ResultFile
from trainer.picture_lists import ListedPicture, locations_in, picture_list
from trainer.resolve import Layer

NAMES: Mapping[str, Mapping[str, Any]] = {
    "fal_guide": {},
    "flux-lora": {"model_type": "flux-lora"},
    "sdxl-lora": {"model_type": "sdxl-lora"},
    "sd15-lora": {"model_type": "sd15-lora"},
    "fal-ai/flux-lora": {"model_type": "flux-lora"},
    "fal-ai/sdxl-lora": {"model_type": "sdxl-lora"},
    "fal-ai/sd15-lora": {"model_type": "sd15-lora"},
}
SERVICE = "the guide's train_model"

# Service field to leaf, and service field to the reason why it is not taken. Everything else is
# placed by its name.
RENAMED: Mapping[str, str] = {
    "model_type": "model_url",
    "training_images": "images_data_url",
    "trigger_word": "instance_prompt",
    "num_epochs": "max_train_steps",
}
FIELDS = dialects.named(RENAMED, {"token_abstraction": "trigger_word"})
NOT_USED: Mapping[str, str] = {}

BASES: Mapping[str, str] = {
    "flux-lora": "black-forest-labs/FLUX.1-dev",
    "sdxl-lora": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15-lora": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
_ONLY: Mapping[str, Any] = {"use_lora": True, "train_text_encoder_ti": False}
_DEFAULTS: Mapping[str, Any] = {
    **_ONLY,
    "batch_size": 1,
    "skip_caption_generation": True,
}
_WORDS = {
    "training_images": "a list of pictures, each an address, a data: URI or base64",
    "trigger_word": "text, not blank",
}


class Input(BaseModel):
    """A training request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model_type: Literal["flux-lora", "sdxl-lora", "sd15-lora"] = Field(
        "flux-lora", description="Base model to train a LoRA for."
    )
    training_images: list[str] = Field(min_length=1, description="Pictures, one by one.")
    trigger_word: str = Field(pattern=r"\S", description="Caption of every picture.")
    num_epochs: int = Field(1000, ge=1, description="Training steps, whatever the name says.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate.")


class Output(dialects.LoraFiles):
    """A result; `kohya_lora_file` is this project's own."""

    diffusers_lora_file: dialects.File = Field(description="The LoRA for diffusers.")
    ignored_options: dialects.IGNORED = None


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The guide's defaults, then the request's own fields."""
    found = judged(payload, Input, SERVICE, words=_WORDS)
    given = dict(found.given)
    places = given.get("training_images", ())
    archives = [*dialects.archives_among(places, "training_images[{}]")]
    if archives:
        del given["training_images"]
    wrong = [RENAMED["training_images"]] if archives else []
    request = Layer("request", _placed(given), explicit=True, problems=archives, wrong=wrong)
    defaults = {**_DEFAULTS, **_placed(found.defaults)}
    return dialects.two_layers(SERVICE, defaults, request, found, RENAMED)


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The answer for a finished run."""
    answer = dialects.described(result, dialects.LORA_ROLES, url_for, FIELDS)
    return Output.model_validate(answer)


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training, see `Dialect`."""
    values = config.values()
    model = values["model_url"]
    kinds = (kind for kind, name in BASES.items() if dialects.is_base(model, name))
    images = values["images_data_url"]
    request = {
        "model_type": next(kinds, model),
        "training_images": None if images is None else list(locations_in(images)),
        "trigger_word": values["instance_prompt"],
        "num_epochs": values["max_train_steps"],
        "learning_rate": values["learning_rate"],
    }
    problems = dialects.only_one_subject(config, SERVICE) + dialects.only_listed(config, SERVICE)
    problems += dialects.only_these(config, _ONLY, SERVICE)
    return dialects.sayable(
        request,
        Input,
        SERVICE,
        words=_WORDS,
        leaf_of=lambda name: RENAMED.get(name, name),
        problems=problems,
    )


def _placed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that these fields mean."""
    placed = {RENAMED.get(name, name): _READ_AS.get(name, _same)(v) for name, v in fields.items()}
    if "trigger_word" in fields:
        placed["token_abstraction"] = [fields["trigger_word"]]
    return placed


def _same(value: Any) -> Any:
    return value


# What a field's value is in its leaf, where that differs.
_READ_AS: Mapping[str, Callable[[Any], Any]] = {
    "model_type": lambda kind: BASES[kind],
    "training_images": lambda places: picture_list([ListedPicture(place) for place in places]),
}
