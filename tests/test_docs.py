"""What README and CONTRIBUTING say can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from trainer.cli import cli
from trainer.config_files import as_layers, parse_yaml
from trainer.dialects import dialect_names
from trainer.errors import TrainerError
from trainer.flags import given_flags
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md"]
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
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?:configs|scripts|tests|docs)/[\w./-]*\w", text))

    assert len(named) > 5
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_exit_codes_on_the_page_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    kinds = {kind.exit_code for kind in [TrainerError, *TrainerError.__subclasses__()]}

    # 0 is success, 130 a second Ctrl-C (128 + SIGINT, as shells count).
    assert {int(row) for row in rows} == kinds | {0, 130}
