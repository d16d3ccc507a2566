"""Every code block of README, CONTRIBUTING and docs runs, or is held against what it is for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
from code_names import check_python_text
from documented import NEEDS, PAGES, ROOT, Block, all_blocks, blocks_of, counted
from shell_lines import check_line
from tiny import TWO_LAYERS

from trainer import prompt_library
from trainer.cli import run
from trainer.compat.fal import patch_fal
from trainer.config_files import as_layers, parse_yaml
from trainer.contracts import faults_in
from trainer.dialects import dialect_names, layers_of
from trainer.known_models import known_models
from trainer.resolve import resolve
from trainer.server.own import messages

BLOCKS = all_blocks()

# A training as the pages show it, on a tiny model, for one step of two layers.
TINY_RUN = {
    "max-train-steps": 1,
    "rank": 2,
    "resolution-width": 64,
    "resolution-height": 64,
    "target-unet-modules": ",".join(TWO_LAYERS["target_unet_modules"]),
}
# Files of other programs that a page imports, as short as they can be.
OTHER_PROGRAMS = {
    "kohya.toml": 'network_module = "networks.lora"\nmax_train_epochs = 2\n',
    "dataset.toml": '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "photos"\n',
    "job.yaml": "config: {process: [{type: sd_trainer, datasets: [{folder_path: photos}]}]}\n",
    "train.sh": "accelerate launch train_dreambooth_lora.py --instance_data_dir photos\n",
}
# What is added to commands of pages so that they take little: a tiny base model, or few steps.
TRAINS = ("train", "prepare", "estimate")
DRAWS = ("generate", "sample", "compare")
# Blocks of commands that a test runs in one folder, page after page.
RUN_HERE = [b for b in BLOCKS if b.language == "console" and b.kind == "executed" and not b.run_by]
PYTHON_RUN_HERE = [
    b for b in BLOCKS if b.language == "python" and b.kind == "executed" and not b.run_by
]


def of(*languages: str) -> list[Block]:
    """The blocks of these languages."""
    found = [block for block in BLOCKS if block.language in languages]
    assert found
    return found


# What every block says of itself


def test_every_block_has_a_language_that_something_knows_how_to_check() -> None:
    known = {"console", "python", "yaml", "json", "js", "diff", "text"}

    assert {block.language for block in BLOCKS} == known
    assert [str(block) for block in BLOCKS if not block.text.strip()] == []


def test_what_a_block_needs_is_one_of_few_things() -> None:
    assert {need for block in BLOCKS for need in block.needs} <= NEEDS


def test_no_code_hides_in_an_indented_paragraph() -> None:
    # Under a list item, four spaces are text.
    hidden = {
        page: re.findall(
            r"^\n    [^ \n*-].*\n", re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text()), re.M
        )
        for page in PAGES
    }

    assert {page: lines for page, lines in hidden.items() if lines} == {}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.run_by], ids=str)
def test_a_block_that_is_said_to_be_run_is_read_by_the_test_that_runs_it(block: Block) -> None:
    assert block.page in (ROOT / block.run_by).read_text()


def test_most_is_executed_and_a_listing_is_the_exception() -> None:
    found = counted(BLOCKS)

    assert sum(found.values()) == len(BLOCKS)
    assert found["executed"] > 25
    assert found["checked"] > 40
    assert found["listing"] < 10


# Commands


@pytest.mark.parametrize("block", of("console"), ids=str)
def test_every_command_is_one_that_its_program_takes(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for line in block.lines:
        check_line(line)


def write_files(folder: Path, page: str) -> None:
    """The files that a page shows, under the names in their first lines."""
    for block in blocks_of(page):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        if block.language == "yaml" and name:
            (folder / name[1]).write_text(block.text)


@pytest.mark.slow
def test_the_commands_of_the_pages_run_one_after_the_other(
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {
        "model-url": sd15_folder,
        "clipseg-url": make_tiny_models.make_clipseg(tmp_path / "clipseg"),
        "captioner": make_tiny_models.make_llava(tmp_path / "llava"),
        **TINY_RUN,
    }
    tiny = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    payload = json.loads((ROOT / "configs/payloads/fal_personalization.json").read_text())
    shutil.copytree(photo_folder, tmp_path / "photos")
    for name, text in OTHER_PROGRAMS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "request.json").write_text(json.dumps(payload | {"images_data_url": "photos"}))
    overrides = ROOT / "configs/payloads/fal_personalization_tiny.yaml"
    shutil.copy(overrides, tmp_path / "overrides.yaml")
    monkeypatch.chdir(tmp_path)

    for block in RUN_HERE:
        write_files(tmp_path, block.page)
        for line in block.lines:
            arguments = shlex.split(line)[1:]
            less = tiny if arguments[0] in TRAINS else []
            less = ["--steps", "1"] if arguments[0] in DRAWS else less
            code = run([*arguments, *less])

            said = capsys.readouterr()
            assert code == 0, f"{block}: {line}: {said.err}"
            assert said.out, f"{block}: {line}"

    assert len(RUN_HERE) >= 10
    assert {"look", "me", "person"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "runs/lora/result.fal.json").exists()
    assert list((tmp_path / "runs/me/logs").iterdir())


# Files


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_every_yaml_file_is_what_it_is_said_to_be(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configuration(content: Mapping[str, Any]) -> None:
        assert resolve(as_layers(content, str(block)))

    def base_models(content: Mapping[str, Any]) -> None:
        (tmp_path / "models.yaml").write_text(block.text)
        monkeypatch.setenv("TRAINER_BASE_MODELS", str(tmp_path / "models.yaml"))
        assert content.keys() <= known_models().keys()

    def prompts(content: Mapping[str, Any]) -> None:
        assert prompt_library.parsed(content, str(block))

    checks: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
        "": configuration,
        "base_models": base_models,
        "prompts": prompts,
    }
    checks[block.schema](parse_yaml(block.text, str(block)))


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_every_json_text_is_what_it_is_said_to_be(block: Block) -> None:
    content = json.loads(block.text)
    models = {"submission": messages.Submission, "refusal": messages.Error}

    if block.schema in models:
        assert list(faults_in(content, models[block.schema], {})) == []
        assert content.keys() <= models[block.schema].model_fields.keys()
    else:
        assert block.schema in dialect_names()
        layers = layers_of(block.schema, content)
        assert resolve(layers)
        assert [note for layer in layers for note in layer.notes if note.kind == "warning"] == []


# Programs


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_python_on_a_page_names_only_what_its_libraries_have(page: str) -> None:
    known: dict[str, Any] = {}
    with patch_fal("http://127.0.0.1:8700"):
        for block in blocks_of(page):
            if block.language == "python":
                known = check_python_text(block.text, known)


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON_RUN_HERE}), ids=str)
def test_python_that_needs_nothing_runs_and_what_it_asserts_is_so(page: str) -> None:
    # Blocks of a page go on with the names of those before them.
    names: dict[str, Any] = {}
    for block in PYTHON_RUN_HERE:
        if block.page == page:
            # Lines of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


@pytest.mark.parametrize("block", of("js"), ids=str)
def test_every_javascript_is_one(block: Block, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node, "there is no Node.js"
    (tmp_path / "page.mjs").write_text(block.text)

    found = subprocess.run(
        [node, "--check", str(tmp_path / "page.mjs")], capture_output=True, text=True, check=False
    )

    assert found.returncode == 0, found.stderr
