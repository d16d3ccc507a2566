"""What all dialects have in common: their example requests, the way back, names, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from trainer.config import LEAVES
from trainer.config_files import read_config_file
from trainer.dialects import dialect_names, field_of, layers_of, load_dialect, request_of
from trainer.errors import InputError, Missing
from trainer.job import Result, ResultFile
from trainer.picture_lists import locations_in
from trainer.resolve import Layer, resolve

PAYLOADS = Path(__file__).parent.parent.parent / "configs" / "payloads"
MODULES = sorted(set(dialect_names().values()))


def example(module: str) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads((PAYLOADS / f"{module}.json").read_text())
    return payload


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive that examples name, of one picture and its caption."""
    monkeypatch.chdir(tmp_path)
    with ZipFile("photographs.zip", "w") as archive:
        archive.writestr("a.jpg", b"a picture")
        archive.writestr("a.txt", b"a caption")
    return tmp_path / "photographs.zip"


def name_of(module: str) -> str:
    return next(name for name, home in dialect_names().items() if home == module)


def test_every_example_is_of_a_dialect_and_every_dialect_has_one() -> None:
    assert len(MODULES) >= 5
    assert sorted(path.stem for path in PAYLOADS.glob("*.json")) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_an_example_loads_and_the_way_back_says_the_same(module: str, photographs: Path) -> None:
    config = resolve(layers_of(name_of(module), example(module)))

    request = request_of(name_of(module), config)

    assert json.loads(json.dumps(request)) == request
    # Where a service takes pictures in the request alone, they are in it.
    same = {"file_data"} & request.keys()
    asked = {name: value for name, value in example(module).items() if name not in same}
    assert asked.items() <= request.items() or module == "novita"
    back = resolve(layers_of(name_of(module), request)).values()
    places = {"images_data_url"} if same else set()
    assert {n for n, v in back.items() if v != config.values()[n]} == places


@pytest.mark.parametrize("module", MODULES)
def test_an_example_is_taken_whole(module: str) -> None:
    notes = resolve(layers_of(name_of(module), example(module))).resolved.ignored_options

    assert [field for field in notes if field.startswith("request.")] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_trial_of_an_example_resolves_and_trains_a_few_steps(module: str) -> None:
    trial = read_config_file(PAYLOADS / f"{module}_tiny.yaml")

    assert resolve([*layers_of(name_of(module), example(module)), *trial]).run.max_train_steps < 10


@pytest.mark.parametrize("name", dialect_names())
def test_a_field_that_no_service_knows_is_accepted_and_listed(name: str) -> None:
    module = dialect_names()[name]
    payload = {**example(module), **load_dialect(name).NAMES[name], "webhookUrl": "x"}

    ignored = resolve(layers_of(name, payload)).resolved.ignored_options

    assert "has no such field" in ignored["request.webhookUrl"]


@pytest.mark.parametrize("module", MODULES)
def test_an_answer_tells_what_was_ignored_and_nothing_where_nothing_was(module: str) -> None:
    def answer(ignored: dict[str, str]) -> dict[str, Any]:
        files = [
            ResultFile.model_validate(
                {"role": role, "path": f"outputs/{role}.safetensors", "size": 1}
                | {"sha256": "0" * 64, "content_type": "application/octet-stream"}
            )
            for role in ("diffusers_lora", "kohya_lora", "config")
        ]
        result = Result(status="done", exit_code=0, files=tuple(files), ignored_options=ignored)
        output = load_dialect(module).to_output(result, lambda file: f"http://here/{file.path}")
        return output.model_dump(mode="json", exclude_none=True)

    assert answer({"request.foo": "no such field"})["ignored_options"] == {
        "request.foo": "no such field"
    }
    assert "ignored_options" not in answer({})
    assert "http://here/outputs/kohya_lora.safetensors" in json.dumps(answer({}))


@pytest.mark.parametrize("module", MODULES)
def test_a_run_that_failed_has_no_answer(module: str) -> None:
    with pytest.raises(ValueError, match="failed"):
        load_dialect(module).to_output(Result(status="failed", exit_code=3), lambda file: file.path)


@pytest.mark.parametrize("module", MODULES)
def test_what_a_dialect_places_are_options(module: str) -> None:
    dialect = load_dialect(module)

    assert set(dialect.RENAMED.values()) <= set(LEAVES)
    assert not dialect.RENAMED.keys() & dialect.NOT_USED.keys()


def test_an_option_has_the_services_name_in_its_errors() -> None:
    assert field_of("novita", "rank") == "expert_setting.lora_r"
    assert field_of("bfl", "max_train_steps") == "iterations"
    assert field_of("fal", "snr_gamma") == "snr_gamma"


# Base models by name


@pytest.fixture
def own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_BASE_MODELS", str(tmp_path / "models.yaml"))
    return tmp_path / "models.yaml"


def test_a_hub_id_that_a_service_stands_on_can_be_a_folder_of_this_machine(own_list: Path) -> None:
    own_list.write_text("black-forest-labs/FLUX.1-dev: {model_url: /models/flux-dev}\n")

    config = resolve(layers_of("bfl", example("bfl")))

    assert config.model.model_url == "/models/flux-dev"
    assert resolve(layers_of("fal_lora", example("fal_lora"))).model.model_url == "/models/flux-dev"


def test_a_moved_base_model_is_still_the_services_own_on_the_way_back(own_list: Path) -> None:
    own_list.write_text("black-forest-labs/FLUX.1-dev: {model_url: /models/flux-dev}\n")
    payload = {**example("fal_guide"), "model_type": "flux-lora"}

    request = request_of("fal_guide", resolve(layers_of("fal_guide", payload)))

    assert request["model_type"] == "flux-lora"


def test_a_name_without_a_place_is_refused_with_the_way_to_give_it_one(own_list: Path) -> None:
    own_list.write_text("{}\n")
    payload = {**example("novita"), "base_model": "epicrealism_naturalSin_121250"}

    with pytest.raises(InputError) as caught:
        resolve(layers_of("novita", payload))

    (problem,) = caught.value.problems
    assert problem.field == "base_model"
    assert "epiCRealism" in problem.message
    assert str(own_list) in problem.hint


def test_a_name_with_a_place_of_the_owners_is_that_place(own_list: Path) -> None:
    own_list.write_text("epicrealism_naturalSin_121250: {model_url: ./epic.safetensors}\n")
    payload = {**example("novita"), "base_model": "epicrealism_naturalSin_121250"}

    config = resolve(layers_of("novita", payload))

    assert config.model.model_url == str(own_list.parent / "epic.safetensors")
    assert request_of("novita", config)["base_model"] == "epicrealism_naturalSin_121250"


# What a name says of the request


@pytest.mark.parametrize("kind", ["flux-lora", "sdxl-lora", "sd15-lora"])
def test_the_address_says_the_kind_that_the_guides_request_leaves_out(kind: str) -> None:
    payload = {**example("fal_guide"), "model_type": None}

    named = resolve(layers_of(f"fal-ai/{kind}", payload))

    assert named == resolve(layers_of("fal_guide", {**payload, "model_type": kind}))


def test_a_request_for_a_subject_is_none_for_a_style() -> None:
    config = resolve(layers_of("novita", example("novita")))

    with pytest.raises(InputError, match="allowed for `novita-style`: style"):
        request_of("novita-style", config)


def test_pictures_one_by_one_are_one_location() -> None:
    config = resolve(layers_of("fal_guide", example("fal_guide")))

    assert locations_in(str(config.data.images_data_url)) == ("one.jpg", "two.jpg", "three.jpg")


# What a service cannot say


@pytest.mark.parametrize("module", sorted({*MODULES} - {"fal_personalization"}))
@pytest.mark.parametrize(
    "leaf", ["train_text_encoder_ti", "snr_gamma", "vae_url", "caption_dropout"]
)
def test_what_was_set_and_changes_the_training_is_refused_where_a_service_lacks_it(
    module: str, leaf: str, photographs: Path
) -> None:
    ours = {
        "train_text_encoder_ti": True,
        "snr_gamma": 3.0,
        "vae_url": "somebody/vae",
        "caption_dropout": 0.2,
    }
    own = Layer("command line", {leaf: ours[leaf]}, explicit=True)
    config = resolve([*layers_of(name_of(module), example(module)), own])

    with pytest.raises(InputError) as caught:
        request_of(name_of(module), config)

    assert leaf in {problem.field for problem in caught.value.problems}


@pytest.mark.parametrize("module", MODULES)
def test_how_a_training_is_watched_and_what_nobody_set_stays_out(
    module: str, photographs: Path
) -> None:
    own = Layer("command line", {"checkpointing_steps": 7, "tensorboard": False}, explicit=True)
    # What nobody set may be another's default: here of a preset.
    preset = Layer("preset", {"snr_gamma": 3.0, "random_flip": True}, explicit=False)
    default, request = layers_of(name_of(module), example(module))

    assert request_of(name_of(module), resolve([default, preset, request, own]))


@pytest.mark.parametrize("module", ["fal_guide", "novita"])
@pytest.mark.parametrize(
    "images", ["photos.zip", "https://here/a.tar.gz?x=1", "data:application/zip;base64,UEsDBA=="]
)
def test_an_archive_is_no_picture(module: str, images: str) -> None:
    field = "training_images" if module == "fal_guide" else "image_dataset_items"
    places = {"fal_guide": [images], "novita": [{"assets_id": images}]}[module]
    own = Layer("command line", {"images_data_url": images}, explicit=True)
    config = resolve([*layers_of(module, example(module)), own])

    with pytest.raises(InputError, match="pictures one by one"):
        request_of(module, config)
    with pytest.raises(InputError) as caught:
        resolve(layers_of(module, {**example(module), field: places}))

    (problem,) = caught.value.problems
    assert problem.field.startswith(f"{field}[0]")
    assert "unpack it" in problem.hint


# Names


SAMPLES: dict[str, Any] = {
    **{"model_type": "sd15-lora", "training_images": ["other.jpg"], "num_epochs": 9},
    **{"trigger_word": "ohwx", "steps": 9, "create_masks": False, "is_style": True},
    **{"is_input_format_already_preprocessed": True, "file_data": "b.zip", "iterations": 150},
    **{"finetune_comment": "other", "mode": "style", "captioning": False, "lora_rank": 16},
    **{"name": "other", "base_model": "stable-diffusion-xl-base-1.0", "width": 256},
    **{"height": 256, "image_dataset_items": [{"assets_id": "other.jpg"}]},
    **{"expert_setting.instance_prompt": "an ohwx", "expert_setting.class_prompt": "man"},
    **{"expert_setting.max_train_steps": 9, "expert_setting.learning_rate": 1e-5},
    **{"expert_setting.seed": 9, "expert_setting.lr_scheduler": "linear"},
    **{"expert_setting.lr_warmup_steps": 9, "expert_setting.with_prior_preservation": True},
    **{"expert_setting.prior_loss_weight": 0.5, "expert_setting.train_text_encoder": True},
    **{"expert_setting.batch_size": 2, "expert_setting.train_batch_size": 3},
    **{"expert_setting.lora_r": 16, "expert_setting.lora_alpha": 16},
    **{"expert_setting.lora_text_encoder_r": 16, "expert_setting.lora_text_encoder_alpha": 16},
    "components.face_crop_region.ratio": "2",
    "components": [{"name": "resize"}, {"name": "face_crop_region"}],
    "components.face_restore.method": "gfpgan_1.4",
    "components.face_restore.upscale": "2",
    "components.resize.width": "256",
    "components.resize.height": "256",
    # A rank of a finetune of all weights is that of the LoRA taken from it.
    "finetune_type": "lora",
    # An address says it.
    "task_type": "style",
}
BESIDE = {"lora_rank": {"finetune_type": "lora"}}


def with_field(payload: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The request with another value; one of a component by the component's and its own name."""
    top, *names = field.split(".")
    if top == "components" and names:
        component = {"name": names[0], "args": [{"name": names[1], "value": value}]}
        return {**payload, "components": [component]}
    if names:
        return {**payload, top: {**payload[top], names[0]: value}}
    return {**payload, top: value, **BESIDE.get(field, {})}


RENAMES = [(module, *pair) for module in MODULES for pair in load_dialect(module).RENAMED.items()]


@pytest.mark.parametrize(("module", "field", "leaf"), RENAMES)
def test_a_field_decides_over_the_option_that_it_is_said_to_be(
    module: str, field: str, leaf: str
) -> None:
    name = "novita-style" if field == "task_type" else name_of(module)
    plain = {**example(module), **BESIDE.get(field, {})}

    before = resolve(layers_of(name_of(module), plain))
    after = resolve(layers_of(name, with_field(plain, field, SAMPLES[field])))

    assert before.leaf(leaf) != after.leaf(leaf)
    assert after.is_explicit(leaf)


@pytest.mark.parametrize("module", MODULES)
def test_a_name_of_a_field_is_never_that_of_another_option(module: str) -> None:
    dialect = load_dialect(module)

    assert set(dialect.FIELDS) <= set(LEAVES)
    assert not set(dialect.FIELDS.values()) & set(dialect.FIELDS)
    assert {field.partition(".")[0] for field in dialect.FIELDS.values()} <= set(
        dialect.Input.model_fields
    )


@pytest.mark.parametrize(
    ("name", "leaf", "field"),
    [
        ("bfl", "extract_rank", "lora_rank"),
        ("bfl", "token_abstraction[0]", "trigger_word"),
        ("bfl", "instance_prompt", "trigger_word"),
        ("fal_guide", "token_abstraction", "trigger_word"),
        ("fal_lora", "token_abstraction", "trigger_word"),
        ("novita", "face_restore_upscale", "components"),
        ("novita", "resize_width", "components"),
        ("fal", "concepts[1].class_prompt", "concepts[1].class_prompt"),
    ],
)
def test_an_option_is_named_by_the_field_that_decides_over_it(
    name: str, leaf: str, field: str
) -> None:
    assert field_of(name, leaf) == field


def test_a_wrong_value_has_the_name_that_its_source_gave_it() -> None:
    payload = {**example("novita"), "expert_setting": {"seed": 10**30}}
    own = Layer("command line", {"resolution_height": 7}, explicit=True)

    with pytest.raises(InputError) as caught:
        resolve([*layers_of("novita", payload), own])

    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"expert_setting.seed", "resolution_height"}


def test_an_argument_of_a_component_is_named_by_its_place() -> None:
    args = [{"name": "upscale", "value": "1"}, {"name": "method", "value": "codeformer"}]
    payload = {**example("novita"), "components": [{"name": "face_restore", "args": args}]}

    with pytest.raises(InputError) as caught:
        resolve(layers_of("novita", payload))

    (problem,) = caught.value.problems
    assert problem.field == "components[0].args[1].value"
    # Where null is none of the service's values.
    assert problem.message.endswith("allowed: gfpgan_1.4")


# What an answer tells


@pytest.mark.parametrize("module", MODULES)
def test_an_answer_lists_what_was_asked_for_in_vain_and_no_defaults(module: str) -> None:
    dialect = load_dialect(module)
    leaf, field = next(iter(dialect.FIELDS.items()), ("snr_gamma", "snr_gamma"))
    ignored = {"request.foo": "unknown", leaf: "no effect", "adam_beta1": "adafactor"}
    config = ResultFile.model_validate(
        {"role": "config", "path": "config.yaml", "size": 1, "sha256": "0" * 64}
        | {"content_type": "application/yaml"}
    )
    lora = config.model_copy(update={"role": "diffusers_lora", "path": "outputs/a.safetensors"})
    result = Result(
        status="done",
        exit_code=0,
        files=(config, lora),
        ignored_options=ignored,
        explicit=(leaf, "seed"),
    )

    answer = dialect.to_output(result, lambda file: file.path).model_dump()

    assert answer["ignored_options"] == {"request.foo": "unknown", field: "no effect"}
    assert json.dumps(answer).count("request.foo") == 1


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("fal-ai/sd15-lora", "model_type", "flux-lora"),
        ("flux-lora", "model_type", "sd15-lora"),
        ("novita", "task_type", "style"),
        ("novita-style", "task_type", "subject"),
    ],
)
def test_a_request_that_says_otherwise_than_its_address_is_refused(
    name: str, field: str, value: str
) -> None:
    dialect = load_dialect(name)
    payload = {**example(dialect_names()[name]), field: value}

    with pytest.raises(InputError) as caught:
        resolve(layers_of(name, payload))

    (problem,) = caught.value.problems
    assert problem.field == field
    assert f"got {json.dumps(value)}" in problem.message
    asked = problem.hint.partition("ask `")[2].rstrip("`")
    assert dialect.NAMES[asked][field] == value
    assert ("/" in asked) == ("/" in name)


@pytest.mark.parametrize("module", MODULES)
def test_a_required_field_that_is_not_there_is_a_kind_of_problem_of_its_own(module: str) -> None:
    (required,) = [
        name
        for name in ("images_data_url", "training_images", "file_data", "image_dataset_items")
        if name in load_dialect(module).Input.model_fields
    ]
    payload = {name: value for name, value in example(module).items() if name != required}

    with pytest.raises(InputError) as caught:
        resolve(layers_of(name_of(module), payload))

    assert [(type(p), p.field) for p in caught.value.problems] == [(Missing, required)]


@pytest.mark.parametrize("module", MODULES)
def test_refused_pictures_leave_nothing_behind_to_be_judged(module: str) -> None:
    (pictures,) = [
        name
        for name in ("training_images", "file_data", "image_dataset_items", "images_data_url")
        if name in load_dialect(module).Input.model_fields
    ]

    layers = layers_of(name_of(module), {**example(module), pictures: None})

    assert [layer.values.get("images_data_url") for layer in layers] == [None, None]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bfl", {"trigger_word": " "}),
        ("fal_guide", {"trigger_word": "\t "}),
        ("fal_lora", {"trigger_word": " "}),
    ],
)
def test_a_blank_trigger_is_none(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        resolve(layers_of(name, {**example(name), **fields}))

    (problem,) = caught.value.problems
    assert (problem.field, "text, not blank" in problem.message) == ("trigger_word", True)
