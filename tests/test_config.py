"""The vocabulary: every hyperparameter once, and what each may hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from trainer.config import LEAVES, SECTIONS, Concept, Note, TrainingConfig
from trainer.config_files import (
    as_layers,
    parse_json,
    parse_yaml,
    read_config_file,
    read_mapping,
    write_config,
)
from trainer.errors import InputError
from trainer.leaves import FILE_KEYS, allowed, flag_value, json_schema, leaf_schema
from trainer.resolve import Layer, resolve

ROOT = Path(__file__).parent.parent
PICTURES = {"images_data_url": "photos"}


def configured(**values: object) -> TrainingConfig:
    return resolve([Layer("test", {**PICTURES, **values}, explicit=True)])


def read_back(text: str) -> TrainingConfig:
    return resolve(as_layers(parse_yaml(text, "config.yaml"), "config.yaml"))


def problems_of(text: str) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        resolve(as_layers(parse_yaml(text, "train.yaml"), "train.yaml"))
    return {problem.field: problem.message for problem in caught.value.problems}


def test_every_leaf_has_one_home_and_a_description() -> None:
    names = Counter(
        name
        for section in SECTIONS
        for name in type(getattr(TrainingConfig(), section)).model_fields
    )
    assert set(names) == set(LEAVES)
    assert set(names.values()) == {1}
    assert all(leaf.info.description for leaf in LEAVES.values())


def test_no_leaf_is_called_like_a_section_or_another_key_of_a_file() -> None:
    assert not set(LEAVES) & {*SECTIONS, *FILE_KEYS}


def test_the_defaults_ask_for_no_method_that_must_be_chosen() -> None:
    config = TrainingConfig()

    assert not config.token.train_text_encoder_ti
    assert not config.adapter.train_text_encoder
    assert not config.prior.with_prior_preservation
    assert config.mask.clip_seg_mask_prompt == ""


def test_the_shipped_schema_is_the_one_the_declarations_give() -> None:
    shipped = json.loads((ROOT / "configs" / "schema.json").read_text())

    assert shipped == json_schema()


def test_the_schema_describes_every_leaf_in_its_section_and_flat() -> None:
    schema = json_schema()

    for name, leaf in LEAVES.items():
        described = schema["properties"][leaf.section]["properties"][name]
        assert described["description"] == leaf.info.description
        assert "default" in described
        assert schema["properties"][name] == {
            "$ref": f"#/properties/{leaf.section}/properties/{name}"
        }
    assert schema["properties"]["adapter"]["properties"]["rank"]["minimum"] == 1


def test_the_schema_and_the_words_need_no_definitions_from_elsewhere() -> None:
    for name in LEAVES:
        assert "$ref" not in json.dumps(leaf_schema(name))
        assert allowed(name)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        ("rank", "a whole number, at least 1"),
        ("learning_rate", "a number, above 0, or null"),
        ("adam_beta1", "a number, at least 0, below 1"),
        ("resolution_width", "a whole number, at least 32, a multiple of 8, or null"),
        ("use_dora", "true or false"),
        ("lora_type", "one of lora, lokr, loha"),
        ("lokr_factor", "-1, or a whole number, at least 1"),
        ("token_abstraction", "names, as a list or separated by commas, none empty"),
        (
            "concepts",
            "a list of concepts, each with images_data_url; also: token, instance_prompt, "
            "captions_file_url, repeats, with_prior_preservation, prior_loss_weight, photo_class, "
            "class_prompt, class_images_url, num_class_images, or null",
        ),
    ],
)
def test_a_range_is_said_in_words(leaf: str, words: str) -> None:
    assert allowed(leaf) == words


@pytest.mark.parametrize(
    ("leaf", "text", "value"),
    [
        ("rank", "16", 16),
        ("rank", "16.5", "16.5"),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "none", None),
        ("prodigy_decouple", "false", False),
        ("prodigy_decouple", "No", False),
        ("use_dora", "0", False),
        ("use_dora", "yes", True),
        ("use_dora", "maybe", "maybe"),
        ("mixed_precision", "no", "no"),
        ("class_image_mask_style", "none", "none"),
        ("instance_prompt", "123", "123"),
        ("lokr_factor", "-1", -1),
        ("num_train_epochs", "null", None),
        ("vae_url", "None", None),
        ("concepts", '[{"images_data_url": "a", "repeats": 2}]')
        + ([{"images_data_url": "a", "repeats": 2}],),
        ("concepts", "none", None),
        ("concepts", '{"images_data_url": "a"}', '{"images_data_url": "a"}'),
        ("concepts", '[{"repeats": 1, "repeats": 2}]', '[{"repeats": 1, "repeats": 2}]'),
        ("concepts", "photos", "photos"),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_leaf(leaf: str, text: str, value: object) -> None:
    read = flag_value(leaf, text)

    assert read == value
    assert type(read) is type(value)


def test_a_list_may_be_given_separated_by_commas() -> None:
    config = configured(target_unet_modules="to_q, to_k ,to_v")

    assert config.adapter.target_unet_modules == ("to_q", "to_k", "to_v")


def test_names_are_understood_in_any_case() -> None:
    config = configured(optimizer="AdamW", lr_scheduler="Cosine", photo_class="woman")

    assert (config.optim.optimizer, config.optim.lr_scheduler) == ("adamw", "cosine")
    assert config.prior.photo_class == "Woman"


def test_a_file_may_name_options_flat_or_in_their_sections() -> None:
    nested = read_back("adapter:\n  rank: 4\nloss: {snr_gamma: 3}\ndata:\n  images_data_url: p\n")
    flat = read_back("rank: 4\nsnr_gamma: 3\nimages_data_url: p\n")

    assert nested == flat
    assert (flat.adapter.rank, flat.loss.snr_gamma) == (4, 3.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E+3", 5000.0),
        ("-.5", -0.5),
        ("012", 12),
        ("0x1f", 31),
        ("0o17", 15),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("True", True),
        ("~", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_yaml_is_read_as_version_1_2(text: str, value: object) -> None:
    """Expected values: the core schema's table in the YAML 1.2.2 specification, 10.3.2."""
    read = parse_yaml(f"a: {text}\n", "a.yaml")["a"]

    assert read == value
    assert type(read) is type(value)


def test_the_precision_called_no_is_a_word_in_a_file() -> None:
    assert read_back("mixed_precision: no\nimages_data_url: p\n").run.mixed_precision == "no"


def test_not_a_number_survives_reading_and_is_refused_by_its_leaf() -> None:
    assert math.isnan(parse_json('{"a": NaN}', "a.json")["a"])
    assert "got NaN" in problems_of("learning_rate: .nan\nimages_data_url: p\n")["learning_rate"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rank: 4\nrank: 8\n", "line 2: `rank` stands there twice"),
        ("adapter:\n  rank: 4\n  rank: 8\n", "line 3: `rank` stands there twice"),
        ("rank: [4\n", "line 2"),
        ("rank: 4\n\tseed: 1\n", "line 2"),
        ("- rank\n", 'got ["rank"]'),
        ("just words\n", 'got "just words"'),
        ("? [a]\n: 1\n", "a name cannot be a list"),
        ("4: 8\n", "allowed: option names"),
        ("rank: !!python/object/apply:os.getcwd []\n", "line 1"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(InputError, match="train.yaml") as caught:
        parse_yaml(text, "train.yaml")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"rank": 4, "rank": 8}', "`rank` stands there twice"),
        ('{"rank": 4,\n}', "line 2"),
        ("[4]", "got [4]"),
        ("", "line 1"),
    ],
)
def test_broken_json_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(InputError, match="train.json") as caught:
        parse_json(text, "train.json")
    assert reason in str(caught.value)


def test_an_option_in_a_foreign_section_is_refused_with_its_home() -> None:
    problems = problems_of("optim:\n  rank: 4\nimages_data_url: p\n")

    assert problems["rank"] == "got it in section `optim`; allowed: in section `adapter`"


def test_an_option_given_flat_and_in_its_section_is_refused() -> None:
    problems = problems_of("rank: 4\nadapter: {rank: 4}\nimages_data_url: p\n")

    assert "twice" in problems["rank"]


def test_a_section_that_is_no_mapping_is_refused() -> None:
    assert "got 3" in problems_of("loss: 3\nimages_data_url: p\n")["loss"]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allowed: .yaml, .yml, .json"):
        read_mapping(tmp_path / "train.toml")


def test_a_missing_file_a_folder_and_a_file_of_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"rank: \xff\xfe\n")

    for name in ("missing.yaml", "folder.yaml", "bytes.yaml"):
        with pytest.raises(InputError, match=name):
            read_mapping(tmp_path / name)


def test_a_byte_order_mark_does_not_change_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"rank": 4}')

    assert read_mapping(tmp_path / "a.json") == {"rank": 4}


def test_a_written_configuration_reads_back_to_itself(tmp_path: Path) -> None:
    config = configured(
        optimizer="prodigy",
        text_encoder_lr=8e-5,
        output_name="1e-4",
        instance_prompt="no",
        caption_column="012",
        revision="1:30",
        resolution_width=512,
        snr_gamma=None,
    )
    (tmp_path / "config.yaml").write_text(write_config(config))

    back = resolve(read_config_file(tmp_path / "config.yaml"))

    assert back == config
    assert back.resolved.explicit == config.resolved.explicit
    assert write_config(back) == write_config(config)


CONCEPTS = [
    {"images_data_url": "a", "photo_class": "woman", "with_prior_preservation": True},
    {"images_data_url": "b", "token": "TOK9", "repeats": 3, "captions_file_url": "b.jsonl"},
]


@pytest.mark.parametrize("explicit", [True, False], ids=["chosen", "assumed"])
def test_concepts_are_written_and_read_back_to_themselves(explicit: bool) -> None:
    config = resolve([Layer("test", {"concepts": CONCEPTS}, explicit)])

    back = read_back(write_config(config))

    assert back == config
    assert back.subjects() == config.subjects()
    assert write_config(back) == write_config(config)
    assert {note.field for note in config.resolved.notes if note.kind == "yielded"} == {
        "token_abstraction"
    }


def test_notes_on_the_inside_of_concepts_are_made_once_when_read_back() -> None:
    concept = {"images_data_url": "a", "class_prompt": "a cat", "prior_loss_weight": 2.0}
    config = resolve([Layer("train.yaml", {"concepts": [concept]}, explicit=True)])

    assert "concepts[0].class_prompt" in config.resolved.ignored_options
    assert read_back(write_config(config)) == config


def test_concepts_may_stand_flat_or_in_their_section_in_yaml_and_in_json() -> None:
    nested = parse_yaml("data:\n  concepts:\n  - images_data_url: a\n    repeats: 2\n", "a.yaml")
    flat = parse_json('{"concepts": [{"images_data_url": "a", "repeats": 2}]}', "a.json")

    one, other = (resolve(as_layers(content, "file")) for content in (nested, flat))

    assert one == other
    assert one.subjects()[0].repeats == 2


def test_a_concept_decides_what_is_computed() -> None:
    twice = [{"images_data_url": "a", "repeats": 2}]
    one, other = (
        resolve([Layer("test", {"concepts": concepts}, explicit=True)])
        for concepts in ([{"images_data_url": "a"}], twice)
    )

    assert one.fingerprint() != other.fingerprint()


def test_the_schema_describes_a_concept_and_nothing_beside_it() -> None:
    (listed, _) = leaf_schema("concepts")["anyOf"]

    assert listed["items"]["additionalProperties"] is False
    assert listed["items"]["required"] == ["images_data_url"]
    assert set(listed["items"]["properties"]) == set(Concept.model_fields)
    assert all(part["description"] for part in listed["items"]["properties"].values())


def test_a_note_that_a_dialect_or_the_engine_left_is_not_lost_on_the_way() -> None:
    foreign = Note(kind="ignored", field="request.foo", message="unknown to the service")
    yielded = Note(kind="yielded", field="vae_url", message="gave way to the checkpoint's own")
    config = configured(rank=4).with_notes(foreign, yielded)

    back = read_back(write_config(config))

    assert {foreign, yielded} <= set(back.resolved.notes)


def test_an_option_of_a_written_configuration_can_be_set_anew() -> None:
    layers = as_layers(parse_yaml(write_config(configured(rank=4)), "config.yaml"), "config.yaml")

    config = resolve([*layers, Layer("command line", {"optimizer": "prodigy"}, explicit=True)])

    assert (config.adapter.rank, config.optim.learning_rate) == (4, 1.0)


def test_a_written_configuration_lists_ignored_options_with_reasons() -> None:
    written = parse_yaml(write_config(configured()), "config.yaml")

    assert written["ignored_options"]["lr_warmup_steps"] == "lr_scheduler is constant"
    assert written["resolved"]["explicit"] == ["images_data_url"]


def test_a_configuration_for_others_has_digests_where_pictures_stood_in_it() -> None:
    pictures, others = "data:application/zip;base64,UEsDBA==", "A" * 5000
    concepts = [
        {"images_data_url": pictures, "class_images_url": others},
        {"images_data_url": "photos/teapot"},
    ]
    config = resolve([Layer("request", {"concepts": concepts}, explicit=True)])

    text = write_config(config, with_contents=False)

    assert pictures not in text
    assert others not in text
    for content in (pictures, others):
        assert f"data:sha256,{sha256(content.encode()).hexdigest()}" in text
    assert "photos/teapot" in text
    assert pictures in write_config(config)


@pytest.mark.parametrize("history", ["resolved: 3\n", "resolved: {}\nignored_options: [a]\n"])
def test_a_damaged_history_in_a_configuration_is_refused(history: str) -> None:
    assert "resolved" in problems_of(f"images_data_url: p\n{history}")


def test_leaves_that_only_watch_do_not_change_the_fingerprint() -> None:
    base = configured()

    assert base.fingerprint() == configured(tensorboard=False, num_workers=2).fingerprint()
    assert base.fingerprint() != configured(rank=16).fingerprint()


def test_the_same_note_is_kept_once() -> None:
    note = Note(kind="warning", field="rank", message="look twice")

    assert TrainingConfig().with_notes(note, note).with_notes(note).resolved.notes == (note,)
