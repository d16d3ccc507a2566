"""The contract of Novita's trainings.

`PAGE` is the example of the service's page, `CLIENT` what its Python client sends for the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainingConfig
from trainer.dialects import layers_of, request_of
from trainer.dialects.novita import BASE_MODELS
from trainer.errors import InputError
from trainer.fields import PREPARATION_STEPS
from trainer.known_models import known_models
from trainer.picture_lists import ListedPicture, listed_pictures
from trainer.resolve import Layer, resolve

CROP = {"name": "face_crop_region", "args": [{"name": "ratio", "value": "1.4"}]}
RESIZE = {
    "name": "resize",
    "args": [{"name": "height", "value": "512"}, {"name": "width", "value": "512"}],
}
RESTORE = {
    "name": "face_restore",
    "args": [{"name": "method", "value": "gfpgan_1.4"}, {"name": "upscale", "value": "1.0"}],
}
PAGE = {
    "name": "test_subject_01",
    "base_model": "v1-5-pruned-emaonly",
    "width": 512,
    "height": 512,
    "image_dataset_items": [{"assets_id": "a.png"}, {"assets_id": "b.png"}],
    "expert_setting": {"instance_prompt": "Xsubject, of a young woman", "class_prompt": "person"},
    "components": [CROP, RESIZE, RESTORE],
}
UNSET = (
    *("max_train_steps", "learning_rate", "seed", "lr_scheduler", "with_prior_preservation"),
    *("prior_loss_weight", "lora_r", "lora_alpha", "lora_text_encoder_r"),
    "lora_text_encoder_alpha",
)


def subject(**fields: Any) -> TrainingConfig:
    return resolve(layers_of("novita", {**PAGE, **fields}))


def expert(**fields: Any) -> TrainingConfig:
    return subject(expert_setting={**PAGE["expert_setting"], **fields})  # type: ignore[dict-item]


def style(*captions: str) -> TrainingConfig:
    items = [{"assets_id": number, "caption": text} for number, text in enumerate(captions)]
    return resolve(layers_of("novita-style", {**PAGE, "image_dataset_items": items}))


def refused(**fields: Any) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        subject(**fields)
    return {problem.field: problem.message for problem in caught.value.problems}


def warnings(config: TrainingConfig) -> list[str]:
    notes = config.resolved.notes
    return [n.message for n in notes if n.kind == "warning" and n.field == "request.components"]


def test_the_example_of_the_page_trains_a_lora_of_the_face() -> None:
    config = subject()

    assert config.model.model_url == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (config.data.resolution_width, config.data.resolution_height) == (512, 512)
    assert (config.run.max_train_steps, config.optim.learning_rate) == (500, 1e-4)
    assert (config.adapter.rank, config.adapter.scale) == (8, 1.0)
    assert (config.data.instance_prompt, config.prior.class_prompt) == (
        "Xsubject, of a young woman",
        "person",
    )
    assert not config.prior.with_prior_preservation
    assert not config.adapter.train_text_encoder
    assert config.output.output_name == "test_subject_01"
    assert config.face.face_crop_region == 1.4
    assert (config.face.face_restore, config.face.face_restore_upscale) == ("gfpgan_1.4", 1.0)


def test_the_nulls_of_the_client_mean_unset() -> None:
    settings = {**PAGE["expert_setting"], **dict.fromkeys(UNSET)}  # type: ignore[dict-item]

    assert subject(expert_setting=settings) == subject()
    assert subject(components=None) == subject(components=[])
    assert subject(components=None).face.face_crop_region is None


@pytest.mark.parametrize("rate", ["1e-4", 1e-4, "0.0001"])
def test_a_rate_is_a_number_or_its_text(rate: object) -> None:
    config = expert(learning_rate=rate, max_train_steps="20", lora_r=16)

    assert (config.optim.learning_rate, config.run.max_train_steps) == (1e-4, 20)
    assert (config.adapter.rank, config.adapter.scale) == (16, 1.0)


def test_a_rank_of_the_text_encoder_trains_it() -> None:
    # The client has no other field for that.
    config = expert(lora_text_encoder_r=4, lora_text_encoder_alpha=8)

    assert config.adapter.train_text_encoder
    assert config.adapter.for_text_encoders().scale == 2.0
    assert not expert(lora_text_encoder_r=4, train_text_encoder=False).adapter.train_text_encoder


@pytest.mark.parametrize("name", ["batch_size", "train_batch_size"])
def test_both_names_of_the_batch_size_are_taken(name: str) -> None:
    assert expert(**{name: 2}).run.batch_size == 2


def test_captions_of_single_pictures_reach_the_training() -> None:
    config = style("a castle in the style of ohwx", "a tree in the style of ohwx")

    assert listed_pictures(str(config.data.images_data_url)) == (
        ListedPicture("0", "a castle in the style of ohwx"),
        ListedPicture("1", "a tree in the style of ohwx"),
    )
    assert "task_type" not in request_of("novita-style", config)


@pytest.mark.parametrize("caption", [None, "", "x" * 1025])
def test_a_style_needs_captions_of_the_services_length(caption: str | None) -> None:
    items = [{"assets_id": "a.png", "caption": caption}]

    with pytest.raises(InputError) as caught:
        resolve(layers_of("novita-style", {**PAGE, "image_dataset_items": items}))

    (problem,) = caught.value.problems
    assert problem.field == "image_dataset_items[0].caption"


@pytest.mark.parametrize("components", [*permutations([CROP, RESTORE, RESIZE])])
def test_components_run_in_the_order_of_their_list(components: Sequence[Any]) -> None:
    config = subject(components=components)

    names = tuple(component["name"] for component in components)
    assert config.data.preparation_order == names
    assert (config.data.resize_width, config.data.resize_height) == (None, None)
    assert warnings(config) == []
    request = request_of("novita", config)
    told = [component["name"] for component in request["components"]]
    # A resize at the end goes without saying after the usual steps.
    assert told == list(names)[: 2 if names == PREPARATION_STEPS else 3]
    assert subject(**request).values() == config.values()


@pytest.mark.parametrize(
    ("components", "order"),
    [
        ([], PREPARATION_STEPS),
        ([RESIZE], PREPARATION_STEPS),
        ([CROP, RESIZE], PREPARATION_STEPS),
        ([RESIZE, CROP], ("resize", "face_crop_region", "face_restore")),
        ([RESTORE, CROP], ("face_restore", "face_crop_region", "resize")),
    ],
)
def test_components_that_are_not_listed_do_not_run(
    components: list[Any], order: tuple[str, ...]
) -> None:
    config = subject(components=components)

    assert config.data.preparation_order == order
    assert (config.face.face_crop_region is not None) == (CROP in components)
    assert (config.face.face_restore is not None) == (RESTORE in components)
    assert subject(**request_of("novita", config)).values() == config.values()


def test_another_size_of_resize_than_the_trained_one_is_passed_on_the_way() -> None:
    config = subject(width=768, components=[CROP, RESIZE])

    assert (config.data.resolution_width, config.data.resolution_height) == (768, 512)
    assert (config.data.resize_width, config.data.resize_height) == (512, None)
    assert warnings(config) == []
    request = request_of("novita", config)
    assert request["components"][-1]["args"] == [
        {"name": "width", "value": "512"},
        {"name": "height", "value": "512"},
    ]
    assert subject(**request).values() == config.values()


def test_a_size_of_resize_that_is_none_is_refused_by_its_own_name() -> None:
    tiny = {"name": "resize", "args": [{"name": "width", "value": "0"}]}

    assert "at least 32" in refused(components=[tiny])["components[0].args[0].value"]


def test_a_resize_to_a_size_that_is_trained_as_the_nearest_one_passes_no_other() -> None:
    resize = {"name": "resize", "args": [{"name": "width", "value": "500"}]}
    config = subject(width=500, components=[CROP, resize])

    assert (config.data.resolution_width, config.data.resize_width) == (504, None)


def test_an_argument_that_a_component_does_not_have_is_listed() -> None:
    component = {"name": "face_crop_region", "args": [{"name": "margin", "value": "2"}]}
    config = subject(components=[component])

    assert config.face.face_crop_region == 1.0
    assert "request.components[0].args[0].name" in config.resolved.ignored_options


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"width": 0}, "width", "allowed: a whole number, at least 1"),
        ({"name": None}, "name", "is missing"),
        ({"base_model": "dreamshaper_9"}, "base_model", "allowed: one of stable-diffusion-xl"),
        ({"image_dataset_items": []}, "image_dataset_items", "1 to 50 pictures"),
        (
            {"image_dataset_items": [{"assets_id": 1}] * 51},
            "image_dataset_items",
            "1 to 50 pictures",
        ),
        (
            {"image_dataset_items": [{"caption": "a"}]},
            "image_dataset_items[0].assets_id",
            "is missing",
        ),
        ({"expert_setting": {"lora_r": 3}}, "expert_setting.lora_r", "at least 4, at most 128"),
        (
            {"expert_setting": {"learning_rate": "3e-4"}},
            "expert_setting.learning_rate",
            "one of 1e-4, 1e-5, 1e-6, 2e-4, 5e-5",
        ),
        (
            {"expert_setting": {"lr_scheduler": "warm"}},
            "expert_setting.lr_scheduler",
            "one of constant, linear",
        ),
        (
            {"components": [{"name": "blur", "args": []}]},
            "components[0].name",
            "one of face_crop_region, resize, face_restore",
        ),
        (
            {"components": [{**CROP, "args": [{"name": "ratio", "value": "wide"}]}]},
            "components[0].args[0].value",
            'got "wide"; allowed: a number',
        ),
        ({"components": [CROP, CROP]}, "components", "each component once"),
    ],
)
def test_what_the_service_refuses_is_one_error(
    fields: dict[str, Any], field: str, said: str
) -> None:
    problems = refused(**fields)

    assert list(problems) == [field]
    assert said in problems[field]


def test_a_field_inside_a_group_that_the_service_does_not_know_is_listed() -> None:
    config = expert(lora_rank=4)

    assert "request.expert_setting.lora_rank" in config.resolved.ignored_options


def test_a_configuration_becomes_a_request_that_means_the_same() -> None:
    settings = {"lora_r": 16, "lora_alpha": 8, "seed": 7, "train_text_encoder": True}
    config = expert(**settings, lora_text_encoder_r=4, with_prior_preservation=True)

    request = request_of("novita", config)

    assert json.loads(json.dumps(request)) == request
    assert settings.items() <= request["expert_setting"].items()
    assert subject(**request).values() == config.values()


def test_what_the_service_cannot_say_is_named(tmp_path: Path) -> None:
    ours = {"images_data_url": str(tmp_path), "rank": 256, "use_dora": True, "model_url": "a/b"}

    with pytest.raises(InputError) as caught:
        request_of("novita", resolve([Layer("train.yaml", ours, explicit=True)]))

    fields = {problem.field for problem in caught.value.problems}
    assert {"rank", "use_dora", "model_url", "resolution_width", "resolution_height"} <= fields
    assert "images_data_url" in fields


def test_every_base_model_of_the_service_is_known() -> None:
    assert len(BASE_MODELS) == 17
    assert set(BASE_MODELS) <= set(known_models())


@pytest.mark.parametrize("name", ["v1-5-pruned-emaonly", "v1-5-pruned-emaonly.safetensors"])
def test_a_base_model_may_have_the_ending_that_its_file_has(name: str) -> None:
    assert subject(base_model=name).model.model_url == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_a_bare_name_that_is_in_no_list_is_refused_whatever_it_ends_with() -> None:
    assert "allowed: one of stable" in refused(base_model="mine.safetensors")["base_model"]
    assert subject(base_model="./mine.safetensors").model.model_url == "./mine.safetensors"


@pytest.mark.parametrize(
    ("asked", "trained"),
    [(512, 512), ("640", 640), (515, 512), (516, 520), (1, 32), (36.0, 40)],
)
def test_a_size_is_trained_as_near_as_it_can_be_and_said_so(asked: object, trained: int) -> None:
    config = subject(width=asked, components=[])

    assert config.data.resolution_width == trained
    notes = [note.message for note in config.resolved.notes if note.field == "request.width"]
    assert [f"is trained as {trained}" in note for note in notes] == (
        [] if int(str(asked).partition(".")[0]) == trained else [True]
    )


def test_fields_that_the_service_does_not_know_are_listed_wherever_they_lie() -> None:
    crop = {"name": "face_crop_region", "args": [{"name": "ratio", "value": "1", "bar": 1}]}
    config = subject(
        image_dataset_items=[{"assets_id": "a.png"}, {"assets_id": "b.png", "captions": "x"}],
        components=[{**crop, "foo": 1}],
    )

    aside = {name for name in config.resolved.ignored_options if name.startswith("request.")}
    assert aside == {
        "request.image_dataset_items[1].captions",
        "request.components[0].foo",
        "request.components[0].args[0].bar",
    }
    warned = {n.field: n.message for n in config.resolved.notes if n.kind == "warning"}
    assert "`caption`" in warned["request.image_dataset_items[1].captions"]


def test_a_caption_that_is_too_long_is_told_in_words() -> None:
    problems = refused(image_dataset_items=[{"assets_id": "a.png", "caption": "x" * 1025}])

    assert "text of 1 to 1024 characters" in problems["image_dataset_items[0].caption"]
