"""The command line: every option a flag, data on stdout, failures as one line and a code."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
from click.testing import CliRunner

from trainer import cli as commands
from trainer.config import LEAVES
from trainer.config_files import read_config_file
from trainer.flags import configuration, flag_of
from trainer.job import RunFolder
from trainer.resolve import Layer, resolve

Output = pytest.CaptureFixture[str]

# The smallest request to a service, and the overrides that make a small trial of it.
TRIAL = (
    "configs/payloads/fal_personalization.json",
    "configs/payloads/fal_personalization_tiny.yaml",
)


def data_of(capsys: Output) -> Any:
    """What the command wrote to stdout, which must be JSON."""
    return json.loads(capsys.readouterr().out)


def small_run(model: Path, photos: Path) -> list[str]:
    """Flags of a training of two steps on a tiny model."""
    given = {"model-url": model, "images-data-url": photos, "rank": 2, "max-train-steps": 2}
    size = {"resolution-width": 64, "resolution-height": 64}
    return [word for name, value in (given | size).items() for word in (f"--{name}", str(value))]


# Help and options


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["schema"], ["presets", "list"], ["version"]],
    ids=" ".join,
)
def test_a_command_that_computes_nothing_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from trainer.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules or 'diffusers' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


@pytest.mark.parametrize("command", ["train", "validate", "estimate"])
def test_every_option_is_a_flag_with_its_meaning_in_the_help(command: str) -> None:
    text = CliRunner().invoke(commands.cli, [command, "--help"], terminal_width=500).output

    assert len(LEAVES) > 60
    for name, leaf in LEAVES.items():
        assert f"{flag_of(name)} " in text
        assert str(leaf.info.description) in text


def test_no_flag_of_a_command_hides_an_option() -> None:
    for command in (commands.train, commands.validate, commands.estimate):
        names = [name for parameter in command.params for name in parameter.opts]
        assert len(set(names)) == len(names)


def test_the_module_runs_the_same_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "version"], capture_output=True, text=True, check=True
    )

    assert done.stdout == f"{commands.__version__}\n"


# Sources of options


def validated(capsys: Output, *arguments: str) -> dict[str, Any]:
    """The leaves that `validate` resolved."""
    code = commands.run(["validate", "--json", *arguments])
    data = data_of(capsys)
    assert code == 0, data
    config: dict[str, Any] = data["config"]
    return config


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(
    tmp_path: Path, photo_folder: Path, capsys: Output
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"images_data_url: {photo_folder}\nrank: 5\nmax_train_steps: 7\n")

    config = validated(capsys, str(file), "--preset", "person", "--rank", "3")

    # The preset `person` says rank 16, 1500 steps and DoRA.
    assert (config["rank"], config["max_train_steps"], config["use_dora"]) == (3, 7, True)


def test_a_request_keeps_its_services_defaults_and_yields_to_files_and_flags(
    photo_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    last = tmp_path / "last.yaml"
    last.write_text(f"images_data_url: {photo_folder}\nmax_train_steps: 9\nseed: 1\n")

    config = validated(capsys, *TRIAL, str(last), "--dialect", "fal", "--seed", "3")

    # The service's own default of snr_gamma is 0.5, ours is 5; the trial says 8 steps of batch 2.
    assert (config["snr_gamma"], config["batch_size"]) == (0.5, 2)
    assert (config["max_train_steps"], config["seed"]) == (9, 3)
    assert config["photo_class"] == "Person"


def test_a_later_file_wins_over_an_earlier_one(
    tmp_path: Path, photo_folder: Path, capsys: Output
) -> None:
    (tmp_path / "one.yaml").write_text(f"images_data_url: {photo_folder}\nrank: 5\nseed: 5\n")
    (tmp_path / "other.json").write_text('{"rank": 7}')

    config = validated(capsys, str(tmp_path / "one.yaml"), str(tmp_path / "other.json"))

    assert (config["rank"], config["seed"]) == (7, 5)


def test_concepts_are_given_as_json_on_the_command_line(photo_folder: Path) -> None:
    concepts = json.dumps([{"images_data_url": str(photo_folder)}, {"images_data_url": "b"}])
    context = commands.train.make_context("train", ["--concepts", concepts])

    with context:
        config = configuration(None, None, None)

    assert [subject.token for subject in config.subjects()] == ["TOK", "TOK1"]


def test_a_fault_inside_concepts_is_named_with_its_place(capsys: Output) -> None:
    concepts = '[{"images_data_url": "a"}, {"images_data_url": "b", "photo_class": "Dog"}]'

    code = commands.run(["train", "--concepts", concepts])

    assert code == 2
    assert '`concepts[1].photo_class`: got "Dog" (in command line)' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--use-dora"], True),
        (["--use-dora", "false"], False),
        (["--use_dora", "true"], True),
        (["--use-dora=no"], False),
    ],
    ids=str,
)
def test_a_switch_takes_a_value_or_stands_alone(
    flags: list[str], value: bool, photo_folder: Path, capsys: Output
) -> None:
    config = validated(capsys, "--images-data-url", str(photo_folder), *flags)

    assert config["use_dora"] is value


def test_none_switches_an_optional_number_off(photo_folder: Path, capsys: Output) -> None:
    config = validated(capsys, "--images-data-url", str(photo_folder), "--snr-gamma", "none")

    assert config["snr_gamma"] is None


# Failures


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--snr-gama", "5"], ["`--snr-gama`", "did you mean `--snr-gamma`?"]),
        (["trian"], ["`trian`", "did you mean `train`?"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--images-data-url", "x", "--preset", "persn"], ["did you mean `person`?"]),
        (["train", "--dialect", "fal"], ["--dialect", "request"]),
        (["inspect", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["inspect"], ["command line", "FILE"]),
        (["convert", "a.safetensors", "b.safetensors", "--to", "x"], ["--to", "kohya"]),
        (["convert", "a.safetensors", "a.safetensors", "--to", "kohya"], ["the source itself"]),
        (["presets", "show", "persn"], ["did you mean `person`?"]),
        (["estimate", "--hourly", "much"], ["--hourly"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], expected: list[str], capsys: Output
) -> None:
    code = commands.run(arguments)

    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("error[input]: ")
    for words in expected:
        assert words in output.err


def test_everything_wrong_is_told_at_once_and_nothing_is_written(
    tmp_path: Path, capsys: Output
) -> None:
    output = tmp_path / "run"

    code = commands.run(["train", "--output", str(output), "--rank", "0", "--snr-gamma", "nan"])

    lines = capsys.readouterr().err.splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("error[input]: ")]
    assert code == 2
    assert set(named) == {"rank", "snr_gamma", "images_data_url"}
    assert not output.exists()


def test_a_failure_is_json_too_when_json_is_asked_for(capsys: Output) -> None:
    code = commands.run(["train", "--rank", "0", "--json"])

    data = data_of(capsys)
    assert (code, data["exit_code"], data["error_kind"]) == (2, 2, "input")
    assert {problem["field"] for problem in data["problems"]} == {"rank", "images_data_url"}


def test_a_missing_wandb_is_bad_input_and_nothing_is_written(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = tmp_path / "run"

    code = commands.run(
        ["train", "--images-data-url", str(photo_folder), "--wandb", "--output", str(output)]
    )

    assert code == 2
    assert "tok-trainer[wandb]" in capsys.readouterr().err
    assert not output.exists()


def test_pictures_that_are_missing_leave_no_folder(
    sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model-url", str(sd15_folder), "--images-data-url", str(tmp_path / "nowhere")]

    code = commands.run(["train", *flags])

    assert code == 2
    assert "`images_data_url`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_torch_is_imported(
    photo_folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from trainer.cli import run; code = run(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules)"
    )
    flags = ["--images-data-url", str(photo_folder), "--output", str(tmp_path)]

    with RunFolder(tmp_path).lock():
        done = subprocess.run(
            [sys.executable, "-c", program, "train", *flags],
            capture_output=True,
            text=True,
            check=True,
        )

    assert done.stdout == "2 False\n"
    assert "another training is running" in done.stderr


@pytest.mark.parametrize("name", ["pytorch_lora_weights", "PyTorch_LoRA_Weights"])
def test_a_result_cannot_have_the_name_of_the_file_for_diffusers(name: str, capsys: Output) -> None:
    code = commands.run(["validate", "--images-data-url", "photos", "--output-name", name])

    assert code == 2
    assert f"`output_name`: got {name}" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_says_that_it_is_one() -> None:
    program = "from trainer import cli; cli.run = lambda _: 1 / 0; cli.main()"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error[internal]: this is a bug")


# Small commands


def test_the_schema_knows_every_option(capsys: Output) -> None:
    assert commands.run(["schema"]) == 0

    assert set(data_of(capsys)["properties"]) >= set(LEAVES)


def test_a_copied_preset_is_a_configuration_file_and_never_overwrites(
    tmp_path: Path, capsys: Output
) -> None:
    copy = tmp_path / "mine.yaml"

    first = commands.run(["presets", "copy", "person", str(copy)])
    text = copy.read_text()
    second = commands.run(["presets", "copy", "style", str(copy)])

    assert (first, second) == (0, 2)
    assert copy.read_text() == text
    assert "exists already" in capsys.readouterr().err


def test_the_doctor_answers_in_json(capsys: Output) -> None:
    code = commands.run(["doctor", "--json"])

    data = data_of(capsys)
    assert data["healthy"] is (code == 0)
    assert {"ok", "warn", "fail"} >= {finding["status"] for finding in data["findings"]}


# Training


@pytest.fixture(scope="module")
def finished(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run folder of two steps, and what the command wrote to stdout."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    flags = small_run(sd15_folder, photo_folder)
    with redirect_stdout(StringIO()) as written:
        code = commands.run(["train", *flags, "--output", str(folder), "--json"])
    assert code == 0
    return folder, json.loads(written.getvalue())


def test_a_training_prints_its_result_as_json(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, data = finished

    assert (data["status"], data["step"], data["total_steps"]) == ("done", 2, 2)
    assert data["folder"] == str(folder.resolve())
    assert {file["role"] for file in data["files"]} >= {"diffusers_lora", "kohya_lora", "config"}
    assert all((folder / file["path"]).stat().st_size == file["size"] for file in data["files"])


def test_a_refused_command_leaves_the_finished_result(
    finished: tuple[Path, dict[str, Any]], sd15_folder: Path, photo_folder: Path, capsys: Output
) -> None:
    folder, _ = finished
    before = (folder / "result.json").read_bytes()
    flags = [*small_run(sd15_folder, photo_folder), "--output", str(folder)]

    of_another_configuration = commands.run(["train", *flags, "--rank", "3"])
    of_no_pictures = commands.run(["train", *flags, "--images-data-url", str(folder / "nowhere")])

    assert (of_another_configuration, of_no_pictures) == (6, 2)
    assert capsys.readouterr().err.count("error[") == 2
    assert (folder / "result.json").read_bytes() == before


def test_a_request_leaves_its_services_answer_beside_the_result(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    clipseg = make_tiny_models.make_clipseg(tmp_path / "clipseg")
    llava = make_tiny_models.make_llava(tmp_path / "llava")
    flags = [*small_run(sd15_folder, photo_folder), "--max-train-steps", "1"]
    flags += ["--clipseg-url", str(clipseg), "--captioner", str(llava)]

    code = commands.run(
        ["train", *TRIAL, "--dialect", "fal", *flags, "--output", str(tmp_path / "run")]
    )

    answer = json.loads((tmp_path / "run" / "result.fal.json").read_text())
    assert code == 0, capsys.readouterr().err
    assert RunFolder(tmp_path / "run").read_result() is not None
    assert answer["config_file"]["content_type"] == "application/yaml"
    lora = answer["diffusers_lora_file"]
    assert lora["url"].startswith("file://")
    assert Path(lora["url"].removeprefix("file://")).stat().st_size == lora["file_size"]


def test_the_written_configuration_means_the_same_again(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    layers = read_config_file(folder / "config.yaml")
    again = resolve([*layers, Layer("command line", {}, explicit=True)])

    assert (again.adapter.rank, again.run.max_train_steps) == (2, 2)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_result_can_be_inspected_and_converted(
    finished: tuple[Path, dict[str, Any]], form: str, tmp_path: Path, capsys: Output
) -> None:
    folder, data = finished
    source = next(file for file in data["files"] if file["role"] == "diffusers_lora")["path"]
    target = tmp_path / "converted.safetensors"

    converted = commands.run(["convert", str(folder / source), str(target), "--to", form])
    capsys.readouterr()
    inspected = commands.run(["inspect", str(target), "--json"])

    assert (converted, inspected) == (0, 0)
    assert data_of(capsys)["format"] == form
