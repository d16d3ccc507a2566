"""`trainer import`: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reading import import_file, loaded, pictures

from trainer.cli import run
from trainer.config_files import parse_yaml
from trainer.errors import InputError

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


def test_options_in_a_variable_are_options(tmp_path: Path) -> None:
    script = 'ARGS="--rank 64 --learning_rate 3e-3"\n'
    script += "accelerate launch train_dreambooth_lora_sdxl.py --instance_data_dir=photos"
    script += " --pretrained_model_name_or_path=base --instance_prompt 'a TOK' $ARGS\n"

    config = loaded(import_file(tmp_path, "train.sh", script))

    assert (config.leaf("rank"), config.leaf("learning_rate")) == (64, 3e-3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("me.toml", 'network_module = "networks.lora_sd3"\nclip_l = "clip.safetensors"\n'),
        ("me.toml", 'network_module = "networks.lora_lumina"\nlearning_rate = 1e-4\n'),
        ("me.sh", "python sd3_train_network.py --learning_rate=1e-4\n"),
    ],
)
def test_models_that_do_not_train_here_are_refused(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not among the base models here"):
        import_file(tmp_path, name, text, "kohya")


def test_a_trigger_that_is_no_text_is_refused(tmp_path: Path) -> None:
    job = "job: extension\nconfig:\n  name: me\n  process:\n  - type: sd_trainer\n"
    job += "    trigger_word: [1, 2]\n    datasets: [{folder_path: photos}]\n"
    job += "    network: {type: lora, linear: 4}\n    model: {name_or_path: base}\n"
    with pytest.raises(InputError, match="trigger_word"):
        import_file(tmp_path, "job.yaml", job)
