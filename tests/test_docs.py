"""What README and CONTRIBUTING say can be typed as it stands: most of it is typed here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import click
import make_tiny_models
import pytest
from make_parameter_table import page_with_table
from make_settings_table import page_with_settings
from tiny import TWO_LAYERS

from trainer.cli import cli, run
from trainer.config import LEAVES, Concept
from trainer.config_files import as_layers, parse_yaml
from trainer.dialects import dialect_names
from trainer.errors import TrainerError
from trainer.flags import given_flags
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve
from trainer.server.protocols import protocols

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md"]
OTHER_PAGES = ["docs/server.md", "docs/clients.md"]
PICTURES = Layer("test", {"images_data_url": "photos"}, explicit=True)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def console_lines(page: str) -> list[str]:
    """Every command on a page."""
    return [line for block in blocks(page, "console") for line in block.splitlines() if line]


def trainer_commands() -> list[list[str]]:
    """The arguments of every `trainer` command on the pages, behind a launcher or not."""
    words = [shlex.split(line) for page in PAGES for line in console_lines(page)]
    starts = [line.index("trainer") for line in words if "trainer" in line]
    return [
        line[start + 1 :]
        for line, start in zip([w for w in words if "trainer" in w], starts, strict=True)
    ]


# Commands of the pages that are not run here, by how they begin, with where they are.
RUN_ELSEWHERE = {
    "./scripts/demo": "makes an environment; what it runs is run by the tests of its parts",
    "./scripts/test": "runs this",
    "./scripts/check_wheel": "installs gigabytes",
    "./scripts/check_lowest": "installs gigabytes",
    "./scripts/check_page": "needs Chromium",
    "./scripts/check_learning": "takes an hour; tests/test_learning.py has one of its trainings",
    "./scripts/check_reliability": "takes half an hour; its checks are among these tests",
    "source .venv": "a shell's own command",
    "pip install": "scripts/environment does it",
    "torchrun": "tests/reliability/test_launchers.py, with two processes",
    "accelerate launch": "tests/test_packaging.py, with one and two processes",
    "trainer serve": "tests/server, as a program of its own",
    "tensorboard": "a server; its files are read in tests/test_listeners.py",
}

# A training as the page shows it, on a tiny model, for one step of two layers.
TINY_RUN = {
    "max-train-steps": 1,
    "rank": 2,
    "resolution-width": 64,
    "resolution-height": 64,
    "target-unet-modules": ",".join(TWO_LAYERS["target_unet_modules"]),
}


def leaf_command(arguments: list[str]) -> click.Context:
    """The parsed command, not run."""
    context = cli.make_context("trainer", list(arguments))
    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    return command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize("arguments", trainer_commands(), ids=" ".join)
def test_every_command_on_the_pages_is_one_that_the_trainer_takes(arguments: list[str]) -> None:
    with leaf_command(arguments) as context:
        flags = given_flags()
        preset = context.params.get("preset")
        dialect = context.params.get("dialect")

    layers = [load_preset(preset)] if preset else []
    assert dialect is None or dialect in dialect_names()
    assert resolve([PICTURES, *layers, Layer("flags", flags, explicit=True)])


def is_run_here(line: str) -> bool:
    """Whether no launcher and no shell stands before a command, and it comes to an end."""
    return line.startswith("trainer ") and not line.startswith("trainer serve")


def run_here(page: str) -> list[list[str]]:
    """The arguments of the commands on a page that are run here."""
    return [shlex.split(line)[1:] for line in console_lines(page) if is_run_here(line)]


def test_every_command_on_the_pages_is_run_here_or_known_to_be_run_elsewhere() -> None:
    lines = [line for page in PAGES for line in console_lines(page)]
    others = [line for line in lines if not is_run_here(line)]

    assert len(run_here("README.md")) > 10
    assert [line for line in others if not line.startswith(tuple(RUN_ELSEWHERE))] == []
    used = {start for start in RUN_ELSEWHERE for line in others if line.startswith(start)}
    assert used == set(RUN_ELSEWHERE)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(
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
    configuration, *_ = blocks("README.md", "yaml")
    shutil.copytree(photo_folder, tmp_path / "photos")
    (tmp_path / "request.json").write_text(json.dumps(payload | {"images_data_url": "photos"}))
    (tmp_path / "photos.yaml").write_text(configuration)
    overrides = ROOT / "configs/payloads/fal_personalization_tiny.yaml"
    shutil.copy(overrides, tmp_path / "overrides.yaml")
    monkeypatch.chdir(tmp_path)

    for arguments in run_here("README.md"):
        trains = arguments[0] in ("train", "prepare", "estimate")
        code = run([*arguments, *(tiny if trains else [])])

        said = capsys.readouterr()
        assert code == 0, f"{arguments}: {said.err}"
        assert said.out

    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"look", "me", "person", "portrait", "lora"}
    assert (tmp_path / "runs/lora/result.fal.json").exists()
    assert list((tmp_path / "runs/me/logs").iterdir())


def test_the_pages_name_every_command() -> None:
    shown = {arguments[0] for arguments in trainer_commands()}
    text = (ROOT / "README.md").read_text()

    assert len(trainer_commands()) > 10
    assert {name for name in cli.commands if name not in shown | {"version"}} <= {
        name for name in cli.commands if f"`trainer {name}" in text
    }


def test_every_configuration_on_the_pages_resolves() -> None:
    examples = [block for page in PAGES for block in blocks(page, "yaml")]

    assert examples
    for text in examples:
        assert resolve(as_layers(parse_yaml(text, "README"), "README"))


def test_every_file_of_the_project_that_the_pages_name_exists() -> None:
    text = "\n".join((ROOT / page).read_text() for page in (*PAGES, *OTHER_PAGES))
    named = set(re.findall(r"(?:configs|scripts|tests|docs)/[\w./-]*\w", text))

    assert len(named) > 5
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_house_plan_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (plan,) = [block for block in blocks("CONTRIBUTING.md", "text") if "engine" in block]
    left = " ".join(re.split(r" {2,}", line)[0] for line in plan.splitlines())
    named = set(re.findall(r"\w+", left))
    package = ROOT / "trainer"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}

    assert len(modules) > 30
    assert named == modules | rooms
    assert all(f"`{name}`" in text for name in ("engine", "training", "results", "machine"))


def test_the_exit_codes_on_the_page_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    kinds = {kind.exit_code for kind in [TrainerError, *TrainerError.__subclasses__()]}

    # 0 is success, 130 a second Ctrl-C (128 + SIGINT, as shells count).
    assert {int(row) for row in rows} == kinds | {0, 130}


def test_the_table_of_options_is_current_and_has_a_row_for_every_one() -> None:
    page = (ROOT / "README.md").read_text()
    table = page.partition("<!-- options:")[2]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)

    assert page == page_with_table(page), "run scripts/make_parameter_table.py"
    assert len(LEAVES) > 90
    assert rows == [*LEAVES, *Concept.model_fields]


def test_the_table_of_settings_is_current() -> None:
    page = (ROOT / "docs/server.md").read_text()

    assert page.count("\n| `") > 25
    assert page_with_settings(page) == page


def test_every_route_on_the_page_is_one_of_the_servers() -> None:
    page = (ROOT / "docs/server.md").read_text()
    operations = [operation for protocol in protocols() for operation in protocol.OPERATIONS]
    paths = {operation.path for operation in operations}
    named = set(re.findall(r"`(?:POST )?(/(?:fal-ai|v1|v3)/[\w./-]+)`", page))

    assert len(named) > 20
    assert {path for path in named if path not in paths} == set()
