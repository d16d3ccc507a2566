"""`trainer import`: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reading import pictures

from trainer.cli import run
from trainer.config_files import parse_yaml

TEXT = 'network_module = "networks.lora"\nclip_skip = 2\nresolution = 512\ntrain_data_dir = "{}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = pictures(tmp_path / "set" / "3_zkx dog", 2).parent
    path = tmp_path / "kohya.toml"
    path.write_text(TEXT.format(folder))
    return path


def test_the_configuration_is_data_and_the_rest_is_talk(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["import", str(file)]) == 0

    out, err = capsys.readouterr()
    assert parse_yaml(out, "out")["adapter"]["rank"] == 4
    assert "clip_skip" in err
    assert "without a counterpart" in err


def test_the_written_file_validates(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "me.yaml"

    assert run(["import", str(file), "--output", str(target)]) == 0
    assert "taken over" in capsys.readouterr().out
    assert target.read_text().startswith("# From ")
    assert run(["validate", str(target)]) == 0


def test_json_has_every_list(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", str(file), "--json"]) == 0

    data = json.loads(capsys.readouterr().out)
    assert data["program"] == "kohya"
    assert [entry["name"] for entry in data["without_counterpart"]] == ["clip_skip"]
    assert data["options"]["rank"] == 4
    assert {"taken", "not_needed", "written_out_defaults", "remarks"} <= data.keys()


def test_a_file_that_is_there_is_not_overwritten(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "me.yaml"
    target.write_text("mine")

    assert run(["import", str(file), "--output", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.toml"], "there is no file"),
        (["{}", "--from", "koya"], "did you mean `kohya`"),
        (["{}", "--from", "ai-toolkit"], "config"),
    ],
)
def test_what_cannot_be_read_is_told(
    arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["import", *(word.format(file) for word in arguments)]) == 2

    assert message in capsys.readouterr().err


def test_our_own_configuration_is_not_another_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("rank: 8\n")

    assert run(["import", str(own)]) == 2
    assert "--from" in capsys.readouterr().err
