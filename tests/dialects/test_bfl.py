"""The contract of BFL's finetuning, field by field.

The expected values stand in the FLUX Finetuning Beta Guide: its list of parameters, and the request
that its example script sends.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from trainer.config import LEAVES, TrainingConfig
from trainer.config_files import as_layers, parse_yaml, read_config_file, write_config
from trainer.dialects import LORA_ROLES, load_dialect, request_of
from trainer.dialects.bfl import (
    BASE,
    NOT_USED,
    RENAMED,
    Input,
    to_layers,
    to_output,
    to_request,
)
from trainer.errors import InputError
from trainer.job import Result, ResultFile
from trainer.resolve import Layer, resolve

PAYLOADS = Path(__file__).parent.parent.parent / "configs" / "payloads"
REQUIRED = ("file_data", "finetune_comment", "mode")
DEFAULTS = {
    "trigger_word": "TOK",
    "iterations": 300,
    "learning_rate": None,
    "captioning": True,
    "priority": "quality",
    "lora_rank": 32,
    "finetune_type": "full",
}
ENUMS = {
    "mode": ["character", "product", "style", "general"],
    "priority": ["speed", "quality", "high_res_only"],
    "lora_rank": [16, 32],
    "finetune_type": ["full", "lora"],
}


def archive(names: Sequence[str] = ("a.jpg", "a.txt", "b.PNG")) -> str:
    """A zip archive of files without content, as the service's script sends it."""
    packed = BytesIO()
    with ZipFile(packed, "w") as opened:
        for name in names:
            opened.writestr(name, b"")
    return base64.b64encode(packed.getvalue()).decode()


MINIMAL = {"file_data": archive(), "finetune_comment": "myfirstfinetune", "mode": "general"}


def config_of(**fields: Any) -> TrainingConfig:
    return resolve(to_layers({**MINIMAL, **fields}))


def told(config: TrainingConfig, kind: str) -> dict[str, str]:
    return {note.field: note.message for note in config.resolved.notes if note.kind == kind}


def test_the_request_has_the_fields_of_the_service_with_its_defaults() -> None:
    required = [name for name, info in Input.model_fields.items() if info.is_required()]

    assert sorted(required) == sorted(REQUIRED)
    assert set(Input.model_fields) == {*REQUIRED, *DEFAULTS}
    assert {name: Input.model_fields[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("field", "values"), ENUMS.items())
def test_enumerations_are_those_of_the_service(field: str, values: list[object]) -> None:
    assert Input.model_json_schema()["properties"][field]["enum"] == values


def test_every_field_is_placed_in_exactly_one_way() -> None:
    for field in Input.model_fields:
        assert [field in LEAVES, field in RENAMED, field in NOT_USED].count(True) == 1, field
    assert set(RENAMED.values()) <= set(LEAVES)


def test_the_smallest_request_is_a_full_finetune_with_a_lora_taken_from_it() -> None:
    config = config_of()

    assert (config.adapter.use_lora, config.output.extract_rank) == (False, 32)
    assert (config.optim.learning_rate, config.run.max_train_steps) == (1e-5, 300)
    assert (config.data.priority, config.data.enable_bucket) == ("quality", True)
    assert config.data.images_data_url == MINIMAL["file_data"]
    assert config.model.model_url == "black-forest-labs/FLUX.1-dev"
    # What makes twelve billion weights fit is nobody's wish: it may give way.
    assert (config.optim.optimizer, config.optim.fused_backward) == ("adafactor", True)
    assert (config.adapter.weights_dtype, config.run.gradient_checkpointing) == ("bf16", True)
    assert set(config.resolved.explicit) == {"images_data_url", "output_name", "caption_mode"}


def test_a_lora_has_its_rank_and_ten_times_the_rate() -> None:
    config = config_of(finetune_type="lora", lora_rank=16)

    assert (config.adapter.use_lora, config.adapter.rank) == (True, 16)
    assert config.output.extract_rank is None
    assert config.optim.learning_rate == 1e-4
    assert (config.optim.optimizer, config.optim.fused_backward) == ("adamw", False)
    assert told(config, "warning") == {}


def test_the_rank_of_a_full_finetune_is_that_of_its_lora() -> None:
    config = config_of(lora_rank=16)

    assert config.output.extract_rank == 16
    assert config.is_explicit("extract_rank")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_rate_of_the_users_own_is_honoured(kind: str) -> None:
    config = config_of(finetune_type=kind, learning_rate=3e-5)

    assert config.optim.learning_rate == 3e-5
    assert "request.learning_rate" not in told(config, "warning")


def test_the_rate_of_the_services_script_is_honoured_for_a_lora_with_a_warning() -> None:
    # Its default argument sends 1e-5 whatever the type.
    config = config_of(finetune_type="lora", learning_rate=1e-05)

    assert config.optim.learning_rate == 1e-5
    assert "ten times as much" in told(config, "warning")["request.learning_rate"]
    assert "request.learning_rate" not in told(config_of(learning_rate=1e-05), "warning")


@pytest.mark.parametrize("trigger", ["mycstm sunglasses", "TOK", "one, two"])
def test_the_trigger_is_text_and_no_new_token(trigger: str) -> None:
    config = config_of(trigger_word=trigger, captioning=False)

    assert config.token.token_abstraction == (trigger,)
    assert not config.token.train_text_encoder_ti
    # What a picture without a caption is told by.
    assert config.data.instance_prompt == trigger
    assert not config.caption.add_trigger


def test_captions_are_written_by_the_mode_unless_they_are_not_wanted() -> None:
    wanted, unwanted = config_of(mode="style"), config_of(captioning=False)

    assert (wanted.data.skip_caption_generation, wanted.caption.caption_mode) == (False, "style")
    assert unwanted.data.skip_caption_generation


def test_the_comment_names_the_files() -> None:
    assert config_of(finetune_comment="my first/finetune!").output.output_name == (
        "my first-finetune"
    )
    assert config_of(finetune_comment="日本").output.output_name == "lora"


def test_null_means_the_default() -> None:
    assert config_of(**dict.fromkeys(DEFAULTS)) == config_of()


MANY = [f"{number}.webp" for number in range(21)]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("iterations", 99, "got 99 (in request); allowed: a whole number, at least 100"),
        ("iterations", 1001, "allowed: a whole number, at least 100, at most 1000"),
        ("iterations", "300", 'got "300" (in request); allowed: a whole number, at least 100'),
        ("learning_rate", 9e-7, "allowed: a number, at least 1e-06, at most 0.005"),
        ("learning_rate", 6e-3, "allowed: a number, at least 1e-06, at most 0.005"),
        ("mode", "person", "allowed: one of character, product, style, general"),
        ("priority", "best", "allowed: one of speed, quality, high_res_only"),
        ("finetune_type", "dora", "allowed: one of full, lora"),
        ("lora_rank", 8, "got 8 (in request); allowed: one of 16, 32"),
        ("captioning", "no", "allowed: true or false"),
        ("trigger_word", "", "allowed: text, not blank"),
        ("trigger_word", " \t", "allowed: text, not blank"),
        ("file_data", 7, "allowed: a zip archive in base64 of 1 to 20 pictures"),
        ("file_data", archive(MANY), "the archive holds 21 pictures; allowed: a zip archive"),
        ("file_data", archive(["a.txt", "__MACOSX/._a.jpg"]), "the archive holds 0 pictures"),
        ("file_data", archive(["a.jpg", "b.gif"]), "the archive holds `b.gif`; allowed: a zip"),
        ("file_data", archive(["a.jpg", "a.md", "b.HEIC"]), "the archive holds `b.HEIC`; allowed"),
        ("file_data", archive(["README.md"]), "the archive holds 0 pictures"),
    ],
)
def test_what_the_service_refuses_is_one_error(field: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of(**{field: value})

    (problem,) = caught.value.problems
    assert problem.field == field
    assert said in problem.message


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    payload = {name: value for name, value in MINIMAL.items() if name != field}

    with pytest.raises(InputError) as caught:
        resolve(to_layers(payload))

    (problem,) = caught.value.problems
    assert (problem.field, "is missing" in problem.message) == (field, True)


@pytest.mark.parametrize(
    "names", [MANY[:20], ["deep/a.jpeg", "deep/a.txt", ".DS_Store", "Thumbs.db", "empty/"]]
)
def test_an_archive_that_the_service_takes_is_taken(names: list[str]) -> None:
    assert config_of(file_data=archive(names)).data.images_data_url == archive(names)


def test_other_files_in_an_archive_are_left_aside_with_a_note() -> None:
    names = ["a.jpg", "a.txt", "README.md", "metadata.json", ".DS_Store", "LICENSE", "b/c.csv"]

    config = config_of(file_data=archive(names))

    assert told(config, "warning")["request.file_data"] == (
        "BFL's finetuning has no use for `README.md`, `metadata.json`, `LICENSE` and 1 more, "
        "neither pictures nor .txt captions"
    )
    assert told(config_of(), "warning") == {}


def test_a_field_that_the_service_does_not_know_is_left_aside_and_noted() -> None:
    config = config_of(trigger_words="TOK", seed=3)

    assert told(config, "ignored")["request.seed"] == "BFL's finetuning has no such field"
    assert "did you mean `trigger_word`?" in told(config, "warning")["request.trigger_words"]
    assert config.run.seed == TrainingConfig().run.seed


def test_one_size_of_the_users_own_goes_before_the_priority_that_nobody_chose() -> None:
    size = Layer("command line", {"resolution_width": 512}, explicit=True)

    config = resolve([*to_layers(MINIMAL), size])

    assert (config.data.priority, config.data.resolution_height) == (None, 512)
    assert "priority" in told(config, "yielded")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_configuration_becomes_a_request_that_means_the_same(kind: str) -> None:
    fields = {"trigger_word": "mycstm man", "lora_rank": 16, "iterations": 150, "priority": "speed"}
    config = config_of(finetune_type=kind, mode="character", captioning=False, **fields)

    request = to_request(config)

    assert set(request) == set(Input.model_fields)
    assert json.loads(json.dumps(request)) == request
    assert resolve(to_layers(request)).values() == config.values()


def test_what_the_service_cannot_say_is_named() -> None:
    ours = {"images_data_url": "photos", "token_abstraction": "TOK,TOK2", "rank": 8}

    with pytest.raises(InputError) as caught:
        to_request(resolve([Layer("train.yaml", ours, explicit=True)]))

    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"token_abstraction", "rank", "priority", "model_url", "images_data_url"}


def test_a_written_configuration_remembers_what_the_request_asked() -> None:
    config = config_of(priority="speed", foo=1)

    back = resolve(as_layers(parse_yaml(write_config(config), "config.yaml"), "config.yaml"))

    assert back == config


def a_file(role: str) -> ResultFile:
    kind = "application/octet-stream"
    values = {"role": role, "path": f"outputs/{role}.x", "size": 12, "sha256": "0" * 64}
    return ResultFile.model_validate({**values, "content_type": kind})


def test_the_answer_is_ready_with_the_lora_and_what_was_not_made_is_null() -> None:
    roles = ("denoiser_weights", "diffusers_lora", "config")
    result = Result(status="done", exit_code=0, files=tuple(map(a_file, roles)))

    answer = to_output(result, lambda file: f"https://here/{file.path}").model_dump()

    assert {name: answer[name] for name in ("id", "status", "progress")} == {
        "id": None,
        "status": "Ready",
        "progress": None,
    }
    assert list(answer["result"]) == list(LORA_ROLES)
    assert answer["result"]["kohya_lora_file"] is None
    assert answer["result"]["diffusers_lora_file"] == {
        "url": "https://here/outputs/diffusers_lora.x",
        "content_type": "application/octet-stream",
        "file_name": "diffusers_lora.x",
        "file_size": 12,
    }


def test_a_failed_run_has_no_answer() -> None:
    with pytest.raises(ValueError, match="failed"):
        to_output(Result(status="failed", exit_code=3), lambda file: file.path)


def test_the_shipped_example_is_the_smallest_request_and_its_trial_a_short_one() -> None:
    payload = json.loads((PAYLOADS / "bfl.json").read_text())
    overrides = read_config_file(PAYLOADS / "bfl_tiny.yaml")

    plain, short = resolve(to_layers(payload)), resolve([*to_layers(payload), *overrides])

    assert set(payload) == set(REQUIRED)
    assert [name for name in told(plain, "ignored") if name.startswith("request.")] == []
    assert {name for name in LEAVES if plain.leaf(name) != short.leaf(name)} == {"max_train_steps"}


@pytest.mark.parametrize("name", ["bfl", "black-forest-labs"])
def test_the_dialect_is_found_by_each_of_its_names(name: str) -> None:
    assert load_dialect(name).Input is Input


# The way back reads and packs the pictures


def asked(folder: Path, images: object) -> dict[str, Any]:
    ours = {"images_data_url": str(images), "priority": "quality", "model_url": BASE}
    return request_of("bfl", resolve([Layer("train.yaml", ours, explicit=True)]))


def photographs(folder: Path) -> Path:
    for name in ("b/two.txt", "b/two.png", "one.jpg", ".DS_Store", "notes.md"):
        (folder / "photographs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photographs" / name).write_bytes(name.encode())
    return folder / "photographs"


def test_a_folder_becomes_the_archive_that_the_service_takes(tmp_path: Path) -> None:
    request = asked(tmp_path, photographs(tmp_path))

    with ZipFile(BytesIO(base64.b64decode(request["file_data"], validate=True))) as packed:
        content = {name: packed.read(name) for name in packed.namelist()}
    assert content == {
        "b/two.png": b"b/two.png",
        "b/two.txt": b"b/two.txt",
        "one.jpg": b"one.jpg",
    }
    assert request == asked(tmp_path, tmp_path / "photographs")


@pytest.mark.parametrize("is_uri", [True, False])
def test_an_archive_is_sent_as_it_is(tmp_path: Path, is_uri: bool) -> None:
    (tmp_path / "a.zip").write_bytes(base64.b64decode(archive()))
    images = f"data:application/zip;base64,{archive()}" if is_uri else tmp_path / "a.zip"

    assert asked(tmp_path, images)["file_data"] == archive()


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        ("https://here/a.zip", "download them"),
        ("nowhere", "give a folder"),
        ("x" * 5000, "give a folder"),
        ("data:application/gzip;base64,H4sIAAAA", "pack the pictures as .zip"),
    ],
)
def test_pictures_that_cannot_be_sent_are_refused(tmp_path: Path, images: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        asked(tmp_path, images)

    (problem,) = caught.value.problems
    assert (problem.field, hint in problem.hint) == ("images_data_url", True)


def test_an_archive_that_the_service_would_refuse_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.gif").write_bytes(b"")

    with pytest.raises(InputError, match="the archive holds `a.gif`"):
        asked(tmp_path, tmp_path / "pictures")


def test_another_base_model_or_method_is_none_of_the_service() -> None:
    ours = {"images_data_url": archive(), "priority": "quality", "lora_type": "lokr"}

    with pytest.raises(InputError) as caught:
        request_of("bfl", resolve([Layer("train.yaml", ours, explicit=True)]))

    assert {problem.field for problem in caught.value.problems} == {"model_url", "lora_type"}
