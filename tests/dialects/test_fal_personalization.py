"""The contract of fal-ai/personalization, field by field.

`MACHINE_DEFAULTS` is the example request of the service's schema page; `FALSY` are the fields
that the example leaves out, whose defaults are false, zero or nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import LEAVES
from trainer.config_files import as_layers, parse_yaml, read_config_file, write_config
from trainer.dialects import dialect_names, load_dialect
from trainer.dialects.fal_personalization import (
    NOT_USED,
    OUTPUT_ROLES,
    RENAMED,
    Input,
    Output,
    to_layers,
    to_output,
    to_request,
)
from trainer.errors import InputError
from trainer.job import Result, ResultFile
from trainer.resolve import Layer, resolve

ROOT = Path(__file__).parent.parent.parent

REQUIRED = {"images_data_url": "", "photo_class": "Man"}
MACHINE_DEFAULTS = {
    "caption_column": "text",
    "instance_prompt": "A photograph of a TOK",
    "rank": 32,
    "model_url": "stabilityai/stable-diffusion-xl-base-1.0",
    "vae_url": "madebyollin/sdxl-vae-fp16-fix",
    "token_abstraction": "TOK",
    "num_new_tokens_per_abstraction": 2,
    "seed": 42,
    "resolution_width": 768,
    "resolution_height": 768,
    "max_train_steps": 1000,
    "learning_rate": 0.00008,
    "text_encoder_lr": 0.00008,
    "lr_scheduler": "constant",
    "snr_gamma": 0.5,
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1,
    "train_text_encoder_ti": True,
    "train_text_encoder_ti_frac": 0.5,
    "train_text_encoder_frac": 1,
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "prodigy_decouple": True,
    "adam_weight_decay": 0.0001,
    "adam_weight_decay_text_encoder": 0.001,
    "adam_epsilon": 1e-8,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "batch_size": 6,
    "max_grad_norm": 1,
    "with_prior_preservation": True,
    "prior_loss_weight": 1,
    "target_unet_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"],
    "target_text_encoder_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "use_lora": True,
    "clip_seg_mask_prompt": "head",
    "class_image_mask_style": "normal",
    "clip_seg_mask_temperature": 1,
    "clip_seg_mask_bias": 0.001,
    "random_rotation_start": -2,
    "random_rotation_end": 2,
    "use_dora": True,
    "lora_type": "lora",
    "face_aware_cropping": True,
    "gradient_accumulation_steps": 1,
    "upscale_vae_32bit": True,
    "max_timestep_trained": 1000,
}
FALSY = {
    "data_archive_format": None,
    "captions_file_url": None,
    "revision": None,
    "variant": None,
    "center_crop": False,
    "random_flip": False,
    "train_text_encoder": False,
    "num_train_epochs": None,
    "prodigy_beta3": None,
    "caption_dropout": 0,
    "skip_caption_generation": False,
    "cache_latents": False,
    "debug_dataset": False,
    "random_crop_offset_x": 0,
    "random_crop_offset_y": 0,
    "noise_offset": 0,
    "debug_loss_masks": False,
    "min_timestep_trained": 0,
    "disable_unet_during_ti_training": False,
}
# JSON types of the service's page; an optional field may be null as well.
TYPES = {
    "string": (
        "images_data_url data_archive_format captions_file_url caption_column instance_prompt "
        "model_url vae_url revision variant token_abstraction lr_scheduler optimizer photo_class "
        "clip_seg_mask_prompt class_image_mask_style lora_type"
    ),
    "integer": (
        "rank num_new_tokens_per_abstraction seed resolution_width resolution_height "
        "num_train_epochs max_train_steps lr_warmup_steps lr_num_cycles batch_size "
        "random_crop_offset_x random_crop_offset_y random_rotation_start random_rotation_end "
        "gradient_accumulation_steps max_timestep_trained min_timestep_trained"
    ),
    "number": (
        "learning_rate text_encoder_lr snr_gamma lr_power train_text_encoder_ti_frac "
        "train_text_encoder_frac adam_beta1 adam_beta2 prodigy_beta3 adam_weight_decay "
        "adam_weight_decay_text_encoder adam_epsilon caption_dropout max_grad_norm "
        "prior_loss_weight clip_seg_mask_temperature clip_seg_mask_bias noise_offset"
    ),
    "boolean": (
        "center_crop random_flip train_text_encoder train_text_encoder_ti prodigy_decouple "
        "prodigy_use_bias_correction prodigy_safeguard_warmup skip_caption_generation "
        "with_prior_preservation cache_latents use_lora debug_dataset use_dora "
        "face_aware_cropping upscale_vae_32bit debug_loss_masks disable_unet_during_ti_training"
    ),
    "array": "target_unet_modules target_text_encoder_modules",
}
ENUMS = {
    "photo_class": ["Man", "Woman", "Person", "Boy", "Girl", "Baby"],
    "class_image_mask_style": ["none", "normal", "invert"],
    "lora_type": ["lora", "lokr", "loha"],
}
MINIMAL = {"images_data_url": "photographs.zip", "photo_class": "Man"}
PAYLOADS = ROOT / "configs" / "payloads"


def ignored(payload: dict[str, Any]) -> dict[str, str]:
    return resolve(to_layers(payload)).resolved.ignored_options


def test_the_request_has_the_fields_of_the_service_and_no_other() -> None:
    assert set(Input.model_fields) == {*REQUIRED, *MACHINE_DEFAULTS, *FALSY}
    assert len(Input.model_fields) == 70


@pytest.mark.parametrize(("field", "default"), {**MACHINE_DEFAULTS, **FALSY}.items())
def test_a_default_is_the_machine_default_of_the_service(field: str, default: object) -> None:
    assert Input.model_fields[field].default == default


@pytest.mark.parametrize("field", REQUIRED)
def test_only_pictures_and_class_are_required(field: str) -> None:
    required = [name for name, info in Input.model_fields.items() if info.is_required()]

    assert field in required
    assert len(required) == len(REQUIRED)


def test_types_are_those_of_the_service() -> None:
    properties = Input.model_json_schema()["properties"]
    kinds = {name: kind for kind, names in TYPES.items() for name in names.split()}

    assert set(kinds) == set(properties)
    for name, described in properties.items():
        given = {choice["type"] for choice in described.get("anyOf", [described])}
        assert given - {"null"} == {kinds[name]}, name


@pytest.mark.parametrize(("field", "values"), ENUMS.items())
def test_enumerations_are_those_of_the_service(field: str, values: list[str]) -> None:
    assert Input.model_json_schema()["properties"][field]["enum"] == values


def test_every_field_is_placed_in_exactly_one_way() -> None:
    for field in Input.model_fields:
        ways = [field in LEAVES, field in RENAMED, field in NOT_USED]
        assert sum(ways) == 1, field


def test_the_defaults_are_places_in_the_configuration_that_nobody_set() -> None:
    defaults, request = to_layers(MINIMAL)
    config = resolve([defaults, request])

    assert not defaults.explicit
    assert config.resolved.explicit == ("images_data_url", "photo_class")
    for field, value in MACHINE_DEFAULTS.items():
        placed = config.leaf(field)
        plain = list(placed) if isinstance(placed, tuple) else placed
        assert plain == ([value] if field == "token_abstraction" else value), field
    for field, value in FALSY.items():
        if value is not None:
            assert config.leaf(field) == value, field


def test_a_minimal_request_resolves_to_the_methods_of_the_service() -> None:
    config = resolve(to_layers(MINIMAL))

    assert config.adapter.use_dora
    assert (config.run.batch_size, config.loss.snr_gamma) == (6, 0.5)
    assert (config.data.cache_latents, config.data.center_crop) == (False, False)
    assert (config.data.face_aware_cropping, config.data.skip_caption_generation) == (True, False)
    assert (config.mask.clip_seg_mask_prompt, config.mask.segmenter) == ("head", "clipseg")
    # The service puts the identifier in front of a plain caption.
    assert config.caption.caption_mode == "plain"


def test_the_shipped_example_is_the_smallest_request() -> None:
    payload = json.loads((PAYLOADS / "fal_personalization.json").read_text())

    assert set(payload) == set(REQUIRED)
    assert not [name for name in ignored(payload) if name.startswith("request.")]


def test_the_shipped_trial_changes_nothing_but_size() -> None:
    payload = json.loads((PAYLOADS / "fal_personalization.json").read_text())
    overrides = read_config_file(PAYLOADS / "fal_personalization_tiny.yaml")

    config = resolve([*to_layers(payload), *overrides])

    plain = resolve(to_layers(payload))
    changed = {name for name in LEAVES if config.leaf(name) != plain.leaf(name)}
    assert changed == {
        *("resolution_width", "resolution_height", "max_train_steps", "batch_size"),
        *("num_class_images", "class_inference_steps"),
        "vae_url",
    }
    assert changed == set(overrides[0].values)
    assert config.token.train_text_encoder_ti
    assert config.prior.with_prior_preservation
    assert not [note for note in config.resolved.notes if note.kind == "yielded"]


def test_concepts_are_more_than_the_service_can_say() -> None:
    concepts = [{"images_data_url": "a", "photo_class": "Man"}]

    with pytest.raises(InputError) as caught:
        to_request(resolve([Layer("train.yaml", {"concepts": concepts}, explicit=True)]))

    (problem,) = caught.value.problems
    assert problem.field == "concepts"
    assert "which fal-ai/personalization does not take" in problem.message


@pytest.mark.parametrize(
    ("chosen", "leaf", "value"),
    [
        ({"train_text_encoder": True}, "train_text_encoder_ti", False),
        ({"lora_type": "lokr"}, "use_dora", False),
        ({"center_crop": True}, "face_aware_cropping", False),
        ({"cache_latents": True, "face_aware_cropping": False}, "center_crop", True),
        ({"cache_latents": True}, "random_rotation_end", 0),
        ({"optimizer": "prodigy"}, "learning_rate", 1.0),
        ({"optimizer": "prodigy"}, "text_encoder_lr", 1.0),
    ],
)
def test_a_default_of_the_service_yields_to_what_the_request_asks(
    chosen: dict[str, Any], leaf: str, value: object
) -> None:
    config = resolve(to_layers({**MINIMAL, **chosen}))

    assert config.leaf(leaf) == value
    assert leaf in {note.field for note in config.resolved.notes if note.kind == "yielded"}


@pytest.mark.parametrize(
    ("chosen", "cached"),
    [({}, True), ({"cache_latents": False}, False), ({"random_crop_offset_x": 4}, False)],
)
def test_latents_are_cached_where_windows_stand_still_unless_the_request_forbids_it(
    chosen: dict[str, Any], cached: bool
) -> None:
    still = {"random_rotation_start": 0, "random_rotation_end": 0}

    config = resolve(to_layers({**MINIMAL, **still, **chosen}))

    assert config.data.cache_latents == cached
    assert "cache_latents" not in {note.field for note in config.resolved.notes}


def test_the_odd_gamma_of_the_service_is_kept_with_a_warning() -> None:
    config = resolve(to_layers(MINIMAL))

    warned = [note.field for note in config.resolved.notes if note.kind == "warning"]
    assert warned == ["snr_gamma"]
    assert config.loss.snr_gamma == 0.5


def test_a_missing_required_field_is_named_together_with_a_bad_value() -> None:
    with pytest.raises(InputError) as caught:
        resolve(to_layers({"photo_class": "Dog"}))

    problems = {problem.field: problem.message for problem in caught.value.problems}
    assert set(problems) == {"images_data_url", "photo_class"}
    assert 'got "Dog"' in problems["photo_class"]
    assert "Man, Woman, Person, Boy, Girl, Baby" in problems["photo_class"]


def test_a_field_that_the_service_does_not_know_is_left_aside_and_noted() -> None:
    notes = ignored({**MINIMAL, "webhookUrl": "x", "batchsize": 2, "alpha": 4})

    assert set(notes.values()) >= {"fal-ai/personalization has no such field"}
    assert {"request.webhookUrl", "request.batchsize", "request.alpha"} <= set(notes)


def test_a_field_that_is_nearly_one_of_the_service_deserves_a_warning() -> None:
    payload = {**MINIMAL, "snr_gama": 5, "webhookUrl": "x"}
    config = resolve(to_layers(payload))

    warned = {note.field: note.message for note in config.resolved.notes if note.kind == "warning"}
    assert "did you mean `snr_gamma`?" in warned["request.snr_gama"]
    assert "request.webhookUrl" not in warned
    assert "request.snr_gama" in config.resolved.ignored_options


def test_null_means_the_default_where_the_default_is_nothing() -> None:
    with_nulls = {**MINIMAL, **{name: None for name, value in FALSY.items() if value is None}}

    config = resolve(to_layers(with_nulls))

    assert config == resolve(to_layers(MINIMAL))


def test_a_null_gamma_switches_min_snr_off() -> None:
    config = resolve(to_layers({**MINIMAL, "snr_gamma": None}))

    assert config.loss.snr_gamma is None


def test_a_null_mask_prompt_switches_the_mask_off() -> None:
    # The service's own behaviour: no prompt gives a mask that is one everywhere.
    config = resolve(to_layers({**MINIMAL, "clip_seg_mask_prompt": None}))

    assert config.mask.clip_seg_mask_prompt == ""
    assert config.is_explicit("clip_seg_mask_prompt")


def test_a_configuration_becomes_a_request_that_means_the_same() -> None:
    config = resolve(
        to_layers(
            {
                **MINIMAL,
                "optimizer": "prodigy",
                "token_abstraction": "TOK,TOK2",
                "snr_gamma": None,
                "vae_url": None,
                "lora_type": "loha",
                "num_train_epochs": 4,
            }
        )
    )

    request = to_request(config)

    assert json.loads(json.dumps(request)) == request
    assert request["token_abstraction"] == "TOK,TOK2"
    assert resolve(to_layers(request)).values() == config.values()


def test_a_value_that_the_service_cannot_say_is_named() -> None:
    config = resolve([Layer("train.yaml", {"images_data_url": "photos"}, explicit=True)])

    with pytest.raises(InputError) as caught:
        to_request(config)

    assert {problem.field for problem in caught.value.problems} == {
        "photo_class",
        "resolution_width",
        "resolution_height",
    }


def test_a_written_configuration_remembers_what_the_request_asked() -> None:
    config = resolve(to_layers({**MINIMAL, "optimizer": "prodigy", "foo": 1}))

    back = resolve(as_layers(parse_yaml(write_config(config), "config.yaml"), "config.yaml"))

    assert back == config


def a_file(role: str, name: str) -> ResultFile:
    return ResultFile.model_validate(
        {
            "role": role,
            "path": f"outputs/{name}",
            "size": 12,
            "sha256": "0" * 64,
            "content_type": "application/octet-stream",
        }
    )


def test_the_answer_lists_the_files_in_the_order_of_the_service() -> None:
    files = tuple(a_file(role, f"{role}.bin") for role in reversed(OUTPUT_ROLES.values()))
    result = Result(status="done", exit_code=0, files=files)

    answer = to_output(result, lambda file: f"https://here/{file.path}").model_dump()

    assert list(answer) == list(Output.model_fields) == [*OUTPUT_ROLES, "ignored_options"]
    assert len(answer) == 10
    assert answer["diffusers_lora_file"] == {
        "url": "https://here/outputs/diffusers_lora.bin",
        "content_type": "application/octet-stream",
        "file_name": "diffusers_lora.bin",
        "file_size": 12,
    }


def test_the_answer_leaves_out_what_was_not_made() -> None:
    result = Result(status="done", exit_code=0, files=(a_file("config", "config.yaml"),))

    answer = to_output(result, lambda file: file.path).model_dump(exclude_none=True)

    assert list(answer) == ["config_file"]


def test_a_failed_run_has_no_answer() -> None:
    with pytest.raises(ValueError, match="failed"):
        to_output(Result(status="failed", exit_code=3), lambda file: file.path)


@pytest.mark.parametrize("name", ["fal", "fal_personalization", "fal-ai/personalization"])
def test_the_dialect_is_found_by_each_of_its_names(name: str) -> None:
    assert load_dialect(name).Input is Input


def test_every_dialect_has_names_of_its_own() -> None:
    assert len(dialect_names()) >= 3


def test_an_unknown_dialect_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean `fal_personalization`"):
        load_dialect("fal-personalisation")


def test_a_file_has_the_fields_of_the_services_schema_and_never_its_content() -> None:
    (file,) = [s for n, s in Output.model_json_schema()["$defs"].items() if n.startswith("File")]
    result = Result(status="done", exit_code=0, files=(a_file("config", "config.yaml"),))

    sent = to_output(result, lambda file: file.path).model_dump()["config_file"]

    fields = ["url", "content_type", "file_name", "file_size", "file_data"]
    assert list(file["properties"]) == fields
    assert list(sent) == fields[:-1]
