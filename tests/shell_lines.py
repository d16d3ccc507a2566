"""Whether a line of a page could be typed: the program takes these words, the files are there.

Nothing is run. Programs whose own parser can be asked are asked; of others, the options that stand
in their text are known.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import click
from accelerate.commands.launch import launch_command_parser
from documented import ROOT
from torch.distributed.run import get_args_parser

from trainer.cli import cli
from trainer.config_files import as_layers, read_mapping
from trainer.dialects import dialect_names, layers_of
from trainer.flags import given_flags
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve
from trainer.server.protocols import protocols

PICTURES = Layer("test", {"images_data_url": "photos"}, explicit=True)
Words = Sequence[str]


def check_line(line: str) -> None:
    """Raises where a line could not be typed as it stands."""
    subprocess.run(["bash", "-n", "-c", line], check=True)
    words = shlex.split(line)
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    assert words, line
    program = words[0]
    if program.startswith("./scripts/"):
        check_script(words)
    else:
        assert program in PROGRAMS, f"no check knows `{program}`: {line}"
        PROGRAMS[program](words[1:])


def leaf_command(arguments: Words) -> click.Context:
    """The parsed command of `trainer`, not run."""
    context = cli.make_context("trainer", list(arguments))
    command: click.Command = cli
    rest = list(arguments)
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
    return command.make_context(command.name, rest, parent=context)


def check_trainer(arguments: Words) -> None:
    """The command exists, takes these options, and they make a configuration."""
    with leaf_command(arguments) as context:
        flags = given_flags()
        preset, dialect = context.params.get("preset"), context.params.get("dialect")
        request = context.params.get("request")
    layers = [load_preset(preset)] if preset else []
    assert dialect is None or dialect in dialect_names()
    shipped = ROOT / str(request)
    if request and shipped.exists():
        content = read_mapping(shipped)
        layers += layers_of(dialect, content) if dialect else as_layers(content, str(request))
    assert resolve([PICTURES, *layers, Layer("flags", flags, explicit=True)])


def check_script(words: Words) -> None:
    """The script can be started, and its options stand in what it reads them by."""
    script = ROOT / words[0]
    assert os.access(script, os.X_OK), words[0]
    text = script.read_text()
    # The programs that it starts or imports.
    programs = [p for p in (ROOT / "scripts").glob("*.py") if re.search(rf"\b{p.stem}\b", text)]
    check_options(words, text + "".join(p.read_text() for p in programs))


def check_options(words: Words, text: str) -> None:
    """Every option of a line stands in a program's text, and every path of the project exists."""
    # scripts/test and pytest share theirs.
    known = text + (ROOT / "tests/conftest.py").read_text()
    unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in known]
    assert unknown == [], f"{words[0]} has no {unknown}"
    paths = [w for w in words[1:] if re.match(r"(tests|scripts|configs)/", w)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def check_python(words: Words) -> None:
    """A module or a script of the project, with its options."""
    if words[0] == "-m":
        if words[1] == "trainer":
            check_trainer(words[2:])
        elif words[1] == "pytest":
            check_options(words[1:], "")
        else:
            assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").exists()
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] not in THEIR_OWN:
        check_options(words, (ROOT / words[0]).read_text())


def check_pip(words: Words) -> None:
    """What is installed from this project has the extras that are named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install"
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists()
    for word in words:
        extras = re.search(r"^(?:\.|tok-trainer)\[(.+)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def check_torchrun(words: Words) -> None:
    """The launcher takes its options, and `trainer` the rest."""
    parsed = get_args_parser().parse_args([*words])
    assert parsed.module and parsed.training_script == "trainer"
    check_trainer(parsed.training_script_args)


def check_accelerate(words: Words) -> None:
    """The launcher takes its options, its file is there, and `trainer` takes the rest."""
    assert words[0] == "launch"
    parsed = launch_command_parser().parse_args([*words[1:]])
    assert parsed.module and parsed.training_script == "trainer"
    assert parsed.config_file is None or (ROOT / parsed.config_file).exists()
    check_trainer(parsed.training_script_args)


def check_tensorboard(words: Words) -> None:
    """TensorBoard takes its options."""
    with warnings.catch_warnings():
        # Of a library that it brings along.
        warnings.simplefilter("ignore", DeprecationWarning)
        core = import_module("tensorboard.plugins.core.core_plugin")

    parser = argparse.ArgumentParser()
    core.CorePluginLoader().define_flags(parser)
    parser.parse_args([*words])


def check_curl(words: Words) -> None:
    """The address is a route of the server."""
    (address,) = (word for word in words if "://" in word)
    path = re.sub(r"^\w+://[^/]+", "", address)
    operations = [operation for protocol in protocols() for operation in protocol.OPERATIONS]
    assert path in {operation.path for operation in operations} | {"/healthz", "/metrics"}, path


def check_bash(words: Words) -> None:
    """The script is there, and its words are a line of their own."""
    script = words[0].removeprefix("/opt/trainer-source/")
    assert (ROOT / script).is_file()
    if script.endswith("pods/start"):
        if words[1:]:
            check_docker(["run", "trainer", *words[1:]])
    else:
        check_line(shlex.join(words[1:]))


def check_sbatch(words: Words) -> None:
    """The template is there, and `trainer` takes the rest."""
    assert (ROOT / words[0]).is_file()
    assert words[1] == "trainer"
    check_trainer(words[2:])


def check_kubectl(words: Words) -> None:
    """What is created is a folder of the project's."""
    if words[0] == "create":
        assert words[1] == "-k"
        assert (ROOT / "configs/deploy/kubernetes" / words[2] / "kustomization.yaml").is_file()


def check_sky(words: Words) -> None:
    """The task is there."""
    assert [
        word for word in words if word.startswith("configs/") and not (ROOT / word).is_file()
    ] == []


# Those of docker's options that the pages use.
DOCKER = {
    "build": {"-f", "-t"},
    "run": {
        *("--rm", "--detach", "--name", "--gpus", "--shm-size", "--user", "--env"),
        *("--stop-timeout", "-p", "-v"),
    },
    "stop": {"-t"},
    "compose": {"--build", "--detach", "--follow"},
}


def check_docker(words: Words) -> None:
    """Files that are named are there, and the image runs a command of its own or `trainer`'s."""
    own = words[: words.index("trainer")] if words[0] == "run" else words
    assert {word for word in own if word.startswith("-")} <= DOCKER[words[0]], own
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[0] == "compose":
        assert words[1] in ("up", "logs", "down")
        assert (ROOT / "compose.yaml").is_file()
    elif words[0] == "run":
        inside = words[words.index("trainer") + 1 :]
        if inside[0] == "launched":
            check_line(shlex.join(inside[1:]))
        else:
            check_trainer(inside)


def check_git(words: Words) -> None:
    """Something is cloned."""
    assert words[0] == "clone"


def check_modal(words: Words) -> None:
    """A program that is run is there, and its options are those of its `main`."""
    if words[0] == "run":
        program = next(word for word in words if word.endswith(".py"))
        main = (ROOT / program).read_text().partition("def main(")[2].partition(")")[0]
        given = {word.removeprefix("--") for word in words if word.startswith("--")}
        assert given - {"detach"} <= set(re.findall(r"(\w+):", main))


def check_nothing_more(words: Words) -> None:
    """The shell's own, or another project's: that it is shell has been seen."""


# Files of the user's or of a service, which the project does not have.
THEIR_OWN = ("bfl_finetune.py",)
PROGRAMS: Mapping[str, Callable[[Words], None]] = {
    "trainer": check_trainer,
    "python": check_python,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "tensorboard": check_tensorboard,
    "curl": check_curl,
    "bash": check_bash,
    "sbatch": check_sbatch,
    "kubectl": check_kubectl,
    "sky": check_sky,
    "docker": check_docker,
    "git": check_git,
    "modal": check_modal,
    "mkdir": check_nothing_more,
    "echo": check_nothing_more,
    "source": check_nothing_more,
    "export": check_nothing_more,
    "sed": check_nothing_more,
}
