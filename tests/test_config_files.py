"""Configuration files that hold megabytes, as requests do that carry their pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from grid import grid_bytes, write_folder, zip_bytes

from trainer import config_files
from trainer.config import TrainingConfig
from trainer.config_files import as_layers, dump_yaml, parse_yaml, write_config
from trainer.errors import InputError
from trainer.inspection import inspect_pictures
from trainer.resolve import Layer, resolve

BASE64 = "UEsDBBQAAAAIAGJh/7+a" * 2000
LINES = "\n".join(BASE64[place : place + 76] for place in range(0, len(BASE64), 76))


def configured(location: str) -> TrainingConfig:
    concepts = [{"images_data_url": "a"}, {"images_data_url": location, "repeats": 2}]
    return resolve([Layer("request", {"concepts": concepts}, explicit=True)])


def read_back(text: str) -> TrainingConfig:
    return resolve(as_layers(parse_yaml(text, "config.yaml"), "config.yaml"))


@pytest.mark.parametrize(
    "content",
    [
        BASE64,
        f"data:application/zip;base64,{BASE64}==",
        LINES,
        # As an address may carry any bytes.
        "data:application/x-tar," + "%00 'A' \"B\" \\\t~\x1f" * 500,
    ],
    ids=["base64", "data URI", "broken into lines", "escaped"],
)
def test_a_long_content_is_one_quoted_line_and_changes_no_other(content: str) -> None:
    config = configured(content)

    text = write_config(config)

    assert read_back(text) == config
    others, plain = text.split("\n"), write_config(configured("b")).split("\n")
    (place,) = (n for n, (one, other) in enumerate(zip(others, plain, strict=True)) if one != other)
    assert plain[place] == "  - images_data_url: b"
    assert others[place].startswith('  - images_data_url: "')
    assert yaml.safe_load(text)["data"]["concepts"][1]["images_data_url"] == content


def test_what_json_and_yaml_quote_differently_is_written_as_yaml_has_it() -> None:
    config = configured("data:,\x7fé\u2028😀" * 1000)

    assert read_back(write_config(config)) == config


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_long_contents_are_not_for_the_slow_parser(
    quote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    read = yaml.SafeLoader.__init__

    def reading(loader: yaml.SafeLoader, text: str) -> None:
        lengths.append(len(text))
        read(loader, text)

    def writing(content: Mapping[str, Any]) -> str:
        text = dump_yaml(content)
        lengths.append(len(text))
        return text

    monkeypatch.setattr(yaml.SafeLoader, "__init__", reading)
    monkeypatch.setattr(config_files, "dump_yaml", writing)

    found = parse_yaml(f"rank: 4\nfile_data: {quote}{BASE64}=={quote} \r\nseed: 1\n", "a.yaml")
    written = write_config(configured(BASE64))

    assert found == {"rank": 4, "file_data": f"{BASE64}==", "seed": 1}
    assert BASE64 in written
    assert len(lengths) == 2
    assert max(lengths) < len(BASE64) / 2


LONG = "A" * 5000


@pytest.mark.parametrize(
    "text",
    [
        f"a: |\n  b: {LONG}\n  c\n",
        f"a: {LONG}\n  goes on\n",
        f"a: 'it\n  b: \"{LONG}\"\n  is'\n",
        f"a: {'1' * 4100}\n",
        f'a: "{LONG}\\u0041\\x41"\n',
        f'a: "{LONG}\\ud83d\\ude00"\n',
        f'a: "{LONG}\\t\\n\\\\"\n',
        f"a: '{LONG} ''quoted'''\n",
        f"a: '{LONG}\\n'\n",
        f"a:{' ' * 5000}'\n  b'\n",
        f"a: {LONG} # why\n",
        f"a:\n- b: {LONG}\n  c: [{LONG}, 1]\n",
        f"a: &name {LONG}\nb: *name\n",
        f"{{a: b,\n c: {LONG}\n}}\n",
        f'a: "{"é" * 5000}"\n',
    ],
)
def test_long_lines_mean_what_a_reader_of_yaml_says(text: str) -> None:
    assert parse_yaml(text, "a.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("field", "at"),
    [
        ("images_data_url", ""),
        ("captions_file_url", ""),
        ("class_images_url", ""),
        ("images_data_url", "concepts[0]."),
        ("captions_file_url", "concepts[0]."),
        ("class_images_url", "concepts[0]."),
    ],
)
def test_where_only_the_digest_of_pictures_was_written_they_are_asked_for_again(
    field: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "photos", {"a.png": grid_bytes(), "a.txt": "TOK"})
    monkeypatch.chdir(tmp_path)
    packed = zip_bytes({"a.png": grid_bytes()})
    contents = {
        "images_data_url": f"data:application/zip;base64,{base64.b64encode(packed).decode()}",
        "captions_file_url": "data:,%7B%22file_name%22%3A%22a.png%22%2C%22text%22%3A%22TOK%22%7D",
        "class_images_url": f"data:image/png;base64,{base64.b64encode(grid_bytes()).decode()}",
    }
    values = {"images_data_url": "photos", field: contents[field]}
    values |= {"photo_class": "Man", "with_prior_preservation": True}
    given = {"concepts": [values]} if at else values
    config = resolve([Layer("request", given, explicit=True)])
    assert len(inspect_pictures(config).usable) >= 1

    with pytest.raises(InputError) as caught:
        inspect_pictures(read_back(write_config(config, with_contents=False)))

    (problem,) = caught.value.problems
    assert problem.field == f"{at}{field}"
    assert "stood in the request and is not in this file" in problem.message
    assert "give it again" in str(problem.hint)


def test_a_digest_that_is_written_once_more_stays_what_it_is() -> None:
    text = write_config(configured("data:,a"), with_contents=False)

    assert write_config(read_back(text), with_contents=False) == text


def test_a_configuration_for_others_tells_nothing_of_this_machine_and_has_no_keys() -> None:
    signed = "https://me:secret@photos.example/a/b.zip?X-Amz-Signature=secret#secret"
    values = {
        "images_data_url": "/home/me/photos.zip",
        "model_url": "/models/mine",
        "vae_url": "~/vae",
        "captions_file_url": signed,
        "face_detector_path": "/weights/face.onnx",
    }
    config = resolve([Layer("request", values, explicit=True)])

    text = write_config(config, with_contents=False)
    there = read_back(text)

    assert there.data.images_data_url == "photos.zip"
    assert (there.model.model_url, there.model.vae_url) == ("mine", "vae")
    assert there.data.captions_file_url == "https://photos.example/a/b.zip"
    for secret in ("/home", "/models", "/weights", "~", "secret"):
        assert secret not in text
    assert write_config(there, with_contents=False) == text
    assert signed in write_config(config)


def test_a_picture_in_base64_that_begins_as_a_path_does_is_no_path() -> None:
    text = write_config(configured("/9j/4AAQ" + "A" * 5000), with_contents=False)

    assert "images_data_url: data:sha256," in text
