"""What CONTRIBUTING.md adds as examples can be added as it stands there, and works."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import make_tiny_models
import pytest
from diffusers import UNet2DConditionModel
from documented import ROOT, Block, blocks_of
from tiny import TWO_LAYERS, configuration, train

from trainer import base_model, dialects, families
from trainer.config import ModelConfig
from trainer.dialects import Dialect, dialect_names, layers_of, load_dialect, request_of
from trainer.errors import InputError
from trainer.job import Result, ResultFile
from trainer.resolve import resolve

EXAMPLES = [b for b in blocks_of("CONTRIBUTING.md") if b.run_by]
FILES = {b.text.splitlines()[0].removeprefix("# "): b for b in EXAMPLES if b.language == "python"}
PATCHES = [b for b in EXAMPLES if b.language == "diff"]
COPIED = ("trainer", "tests", "scripts", "configs", "pyproject.toml")


def code_of(path: str) -> str:
    """A new file without the line that says where it goes."""
    return FILES[path].text.partition("\n")[2]


def patch_of(path: str) -> Block:
    """The patch that changes a file."""
    (found,) = [patch for patch in PATCHES if f"+++ b/{path}\n" in patch.text]
    return found


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The new files among the modules of their packages, while a test lasts."""
    before = set(sys.modules)
    for package in (families, dialects):
        room = package.__name__.rpartition(".")[2]
        folder = tmp_path / "added" / room
        folder.mkdir(parents=True)
        for path in FILES:
            if path.startswith(f"trainer/{room}/"):
                (folder / Path(path).name).write_text(code_of(path))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    forget(families, before)
    forget(dialects, before)


def forget(package: ModuleType, before: set[str]) -> None:
    """Takes modules that a test imported out of a package again."""
    for name in set(sys.modules) - before:
        if name.startswith(f"{package.__name__}."):
            del sys.modules[name]
            delattr(package, name.rpartition(".")[2])


def test_there_is_an_example_of_each_and_its_style_is_the_projects(tmp_path: Path) -> None:
    assert list(FILES) == [
        "trainer/families/sd2.py",
        "trainer/dialects/example.py",
        "trainer/export/changes.py",
    ]
    assert len(PATCHES) == 2
    for path in FILES:
        written = tmp_path / Path(path).name
        written.write_text(code_of(path))
        for command in (["check"], ["format", "--check"]):
            subprocess.run(
                [*ruff(), *command, "--config", str(ROOT / "pyproject.toml"), str(written)],
                check=True,
            )


def ruff() -> list[str]:
    """The command of the checker of style."""
    return [sys.executable, "-m", "ruff"]


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_patch_fits_the_files_as_they_are(patch: Block) -> None:
    subprocess.run(
        ["git", "apply", "--check", "-"], input=patch.text, text=True, check=True, cwd=ROOT
    )


# A family


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 2, which predicts velocities."""
    folder = tmp_path_factory.mktemp("models") / "sd2"
    make_tiny_models.make_sd15(folder, prediction_type="v_prediction")
    config = UNet2DConditionModel.load_config(folder / "unet")
    linear = UNet2DConditionModel.from_config({**config, "use_linear_projection": True})
    linear.save_pretrained(folder / "unet")
    return folder


def test_the_family_is_found_by_its_checkpoints_and_by_no_other(
    added: None, sd2_folder: Path, sd15_folder: Path
) -> None:
    assert base_model.locate(ModelConfig(model_url=str(sd2_folder))).family_name == "sd2"
    assert base_model.locate(ModelConfig(model_url=str(sd15_folder))).family_name == "sd15"


def test_without_the_file_its_checkpoints_are_refused(sd2_folder: Path) -> None:
    with pytest.raises(InputError, match="use_linear_projection"):
        base_model.locate(ModelConfig(model_url=str(sd2_folder)))


@pytest.mark.slow
def test_the_family_trains_and_its_files_give_back_what_was_trained(
    added: None, sd2_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    own = {"train_text_encoder_ti": True, "instance_prompt": "a photograph of TOK", **TWO_LAYERS}
    config = configuration(sd2_folder, photo_folder, max_train_steps=2, **own)

    train(config, tmp_path / "run")

    report = json.loads((tmp_path / "run/outputs/verify.json").read_text())
    assert report["passed"]
    passed = {check["reader"] for check in report["checks"] if check["status"] == "passed"}
    assert {"diffusers", "formula"} <= passed


# A dialect


@pytest.fixture
def example(added: None) -> Dialect:
    """The dialect of the example."""
    assert dialect_names()["example"] == "example"
    return load_dialect("example")


def test_a_request_in_the_dialect_is_a_configuration_and_comes_back(example: Dialect) -> None:
    request = {"images": "photos.zip", "steps": 200, "rank": 8, "instance_prompt": "a photo of TOK"}

    config = resolve(layers_of("example", request))

    assert (config.run.max_train_steps, config.adapter.rank) == (200, 8)
    assert config.is_explicit("rank") and not config.is_explicit("model_url")
    assert request_of("example", config) == request


def test_every_field_of_the_dialect_is_placed_in_one_way(example: Dialect) -> None:
    fields = set(example.Input.model_fields)

    assert set(example.RENAMED) | set(example.NOT_USED) < fields
    assert not set(example.RENAMED) & set(example.NOT_USED)


def test_what_is_wrong_in_a_request_is_named_in_its_own_words(example: Dialect) -> None:
    with pytest.raises(InputError) as caught:
        resolve(layers_of("example", {"images": "photos.zip", "steps": 0}))

    assert [problem.field for problem in caught.value.problems] == ["steps"]


def test_what_is_not_used_is_told(example: Dialect) -> None:
    config = resolve(layers_of("example", {"images": "photos.zip", "notify": "https://here"}))

    assert config.resolved.ignored_options["request.notify"] == "nothing is sent"


def test_the_answer_has_the_files(example: Dialect) -> None:
    described = {"size": 1, "sha256": "0" * 64, "content_type": "application/yaml"}
    config = ResultFile.model_validate({"role": "config", "path": "config.yaml", **described})
    result = Result(status="done", exit_code=0, files=(config,))

    answer = example.to_output(result, lambda file: f"http://here/{file.path}").model_dump()

    assert answer["config_file"]["url"] == "http://here/config.yaml"


# What changes files that are there


def changed_copy(folder: Path, patch: Block, *new: str) -> dict[str, str]:
    """The project in another folder with a patch and new files; the environment to use it by."""
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    for path in new:
        (folder / path).write_text(code_of(path))
    subprocess.run(["git", "apply", "-"], input=patch.text, text=True, check=True, cwd=folder)
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


@pytest.mark.thorough
def test_the_hyperparameter_is_an_option_and_its_rows_hold(tmp_path: Path) -> None:
    environment = changed_copy(tmp_path, patch_of("trainer/sections/learning.py"))
    trainer = [sys.executable, "-m", "trainer", "train", "--help"]
    rows = ["tests/test_options.py", "-k", "input_perturbation", "-p", "no:cacheprovider"]

    told = subprocess.run(
        trainer, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *rows],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "--input-perturbation" in told.stdout
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\b[4-9] passed", ran.stdout)


@pytest.mark.thorough
def test_the_exporter_writes_a_file_that_is_read_back(
    tmp_path: Path, sd15_folder: Path, photo_folder: Path
) -> None:
    patch = patch_of("trainer/artifacts.py")
    environment = changed_copy(tmp_path, patch, "trainer/export/changes.py")
    options = {"model-url": sd15_folder, "images-data-url": photo_folder, "max-train-steps": 2}
    options |= {"rank": 2, "output": tmp_path / "run"}
    options["target-unet-modules"] = ",".join(TWO_LAYERS["target_unet_modules"])
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    ran = subprocess.run(
        [sys.executable, "-m", "trainer", "train", *flags],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "run/outputs/verify.json").read_text())
    found = [(c["path"], c["status"]) for c in report["checks"] if c["reader"] == "changes"]
    assert found == [("outputs/changes.safetensors", "passed")]
    assert "changes.safetensors" in (tmp_path / "run/outputs/README.md").read_text()
