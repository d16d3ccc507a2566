"""The contracts of fal's trainer of FLUX LoRAs and of the guide's `train_model`.

The first is that of the types in the service's JavaScript client (`FluxLoraFastTrainingInput`).
"""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.dialects import layers_of, request_of
from trainer.dialects.fal_guide import Input as GuideInput
from trainer.dialects.fal_lora import Input
from trainer.errors import InputError
from trainer.resolve import Layer, resolve


def fal(**fields: Any) -> TrainingConfig:
    return resolve(layers_of("fal_lora", {"images_data_url": "a.zip", **fields}))


def guide(**fields: Any) -> TrainingConfig:
    payload = {"training_images": ["a.jpg"], "trigger_word": "SIDAI", **fields}
    return resolve(layers_of("fal_guide", payload))


def refused(make: Any, **fields: Any) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        make(**fields)
    return {problem.field: problem.message for problem in caught.value.problems}


def test_the_requests_have_the_fields_of_the_service_with_their_defaults() -> None:
    assert {name: info.default for name, info in Input.model_fields.items()} == {
        "images_data_url": Input.model_fields["images_data_url"].default,
        "trigger_word": None,
        "create_masks": True,
        "steps": 1000,
        "is_style": False,
        "is_input_format_already_preprocessed": False,
        "data_archive_format": None,
    }
    assert GuideInput.model_fields["num_epochs"].default == 1000
    assert GuideInput.model_fields["learning_rate"].default == 1e-4


def test_the_smallest_request_trains_flux_on_masked_faces_without_a_trigger() -> None:
    config = fal()

    assert config.model.model_url == "black-forest-labs/FLUX.1-dev"
    assert (config.run.max_train_steps, config.mask.clip_seg_mask_prompt) == (1000, "head")
    assert config.data.instance_prompt == "a photo"
    assert config.data.skip_caption_generation
    assert config.resolved.explicit == ("images_data_url",)


def test_the_trigger_is_the_caption_of_pictures_without_one_and_no_new_token() -> None:
    config = fal(trigger_word="ohwx, man", steps=7)

    assert config.data.instance_prompt == "ohwx, man"
    assert config.token.token_abstraction == ("ohwx, man",)
    assert (config.token.train_text_encoder_ti, config.caption.add_trigger) == (False, False)
    assert config.run.max_train_steps == 7


@pytest.mark.parametrize("switch", ["is_style", "is_input_format_already_preprocessed"])
def test_a_style_and_prepared_pictures_have_no_masks_though_they_are_asked_for(switch: str) -> None:
    config = fal(create_masks=True, **{switch: True})

    assert config.mask.clip_seg_mask_prompt == ""
    assert switch in config.resolved.ignored_options["request.create_masks"]


def test_no_masks_are_made_where_none_are_wanted() -> None:
    assert fal(create_masks=False).mask.clip_seg_mask_prompt == ""
    assert "request.create_masks" not in fal(create_masks=False).resolved.ignored_options


@pytest.mark.parametrize(
    "fields", [{"is_style": True}, {"create_masks": False}, {"trigger_word": "TOK"}]
)
def test_what_was_asked_can_be_asked_again(fields: dict[str, Any]) -> None:
    request = request_of("fal_lora", fal(**fields))

    assert fields.items() <= request.items()
    assert fal(**request).values() == fal(**fields).values()


def test_null_means_unset() -> None:
    assert fal(**dict.fromkeys(list(Input.model_fields)[1:])) == fal()


def test_the_kind_of_archive_is_told_by_its_bytes() -> None:
    assert "first bytes" in fal(data_archive_format="zip").resolved.ignored_options.get(
        "request.data_archive_format", ""
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "got 0 (in request); allowed: a whole number, at least 1"),
        ("images_data_url", None, "is missing, and fal-ai/flux-lora-fast-training requires it"),
        ("is_style", "yes", "allowed: true or false"),
    ],
)
def test_what_the_service_refuses_is_one_error(field: str, value: object, said: str) -> None:
    problems = refused(fal, **{field: value})

    assert list(problems) == [field]
    assert said in problems[field]


def test_the_guides_epochs_are_steps() -> None:
    config = guide(num_epochs=9, learning_rate=3e-4)

    assert (config.run.max_train_steps, config.run.num_train_epochs) == (9, None)
    assert (config.optim.learning_rate, config.run.batch_size) == (3e-4, 1)
    assert config.data.instance_prompt == "SIDAI"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "flux", "allowed: one of flux-lora, sdxl-lora, sd15-lora"),
        ("training_images", [], "allowed: a list of pictures"),
        ("training_images", "a.jpg", "allowed: a list of pictures"),
        ("trigger_word", None, "is missing"),
        ("num_epochs", 1.5, "allowed: a whole number"),
    ],
)
def test_a_wrong_value_of_the_guides_request_is_one_error(
    field: str, value: object, said: str
) -> None:
    problems = refused(guide, **{field: value})

    assert list(problems) == [field]
    assert said in problems[field]


@pytest.mark.parametrize("name", ["fal_lora", "fal_guide"])
def test_what_the_services_cannot_say_is_named(name: str) -> None:
    ours = {"images_data_url": "photos", "use_lora": False, "token_abstraction": ["a", "b"]}
    ours |= {"model_url": "somebody/else"}

    problems = refused(request_of, name=name, config=resolve([Layer("a", ours, explicit=True)]))

    assert {"use_lora", "token_abstraction", "model_url"} <= set(problems)


def test_an_empty_trigger_is_none() -> None:
    assert fal(trigger_word="") == fal()
