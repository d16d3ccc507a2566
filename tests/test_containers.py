"""Dockerfile.cuda, compose.yaml and the image's entry, as far as no image is built for it.

`tests/ship/container_checks.py` builds and runs it.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from trainer.server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile.cuda").read_text()
PAGE = (ROOT / "docs/containers.md").read_text()
ENTRY = ROOT / "configs/deploy/container/entry"
JOB = yaml.safe_load((ROOT / "configs/deploy/kubernetes/job/job.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
BASE = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
PORT = ServerSettings.model_fields["port"].default
# Everything that is copied from the project's folder.
COPIED = [
    source
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
    if "--from=" not in line
    for source in [word for word in line.split() if not word.startswith("--")][:-1]
]


def entered(folder: Path, *words: str) -> str:
    """What the entry runs, on a PATH with `trainer` and a program `other` that stand in."""
    for name in ("trainer", "other"):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*"\n')
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ENTRY), *words],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "run"),
    [
        ((), "trainer"),
        (("--help",), "trainer --help"),
        (("train", "photos.yaml", "--rank", "4"), "trainer train photos.yaml --rank 4"),
        (("trainer", "doctor"), "trainer doctor"),
        (("other", "two words"), "other two words"),
        (("no-program",), "trainer no-program"),
    ],
)
def test_a_container_runs_a_command_of_the_trainer_or_any_program(
    words: tuple[str, ...], run: str, tmp_path: Path
) -> None:
    assert entered(tmp_path, *words) == run


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sent = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for source in COPIED:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, f"{name}*") for name in sent), source
    assert all((ROOT / name).exists() for name in sent)
    assert {source.split("/")[0] for source in COPIED} == set(sent)


def test_extras_of_the_image_are_extras_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    given = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert given is not None
    named = given[1].split(",")
    assert set(named) <= set(extras)
    assert ", ".join(f"`{name}`" for name in named) in PAGE


def test_the_base_is_named_exactly_and_the_page_names_the_same() -> None:
    assert BASE is not None
    _, _, tag = BASE[1].partition(":")
    assert re.fullmatch(r"\d+\.\d+\.\d+-base-ubuntu\d\d\.04", tag)
    assert f"`{BASE[1]}`" in PAGE
    # Of the CUDA that PyTorch's packages bring.
    runtime = re.search(
        r"^nvidia-cuda-runtime==(\d+)\.", (ROOT / "constraints.txt").read_text(), re.M
    )
    assert runtime is not None
    assert tag.split(".")[0] == runtime[1]


def test_stages_are_two_and_the_last_one_has_no_build_tools_of_python() -> None:
    *_, last = DOCKERFILE.split("\nFROM ")
    assert "python3-venv" not in last
    assert "--from=packages /opt/venv /opt/venv" in last


def test_kubernetes_runs_the_image_as_its_own_user_with_its_folders() -> None:
    pod = JOB["spec"]["template"]["spec"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in DOCKERFILE
    assert f"--gid {pod['securityContext']['runAsGroup']} " in DOCKERFILE
    (container,) = pod["containers"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted - {"/dev/shm"} == {"/data", "/models"}
    for variable in container["env"]:
        assert f"{variable['name']}={variable['value']}" in DOCKERFILE
    assert container["command"] == ["tini", "-g", "--"]


def test_compose_serves_this_machine_alone_and_leaves_time_for_checkpoints() -> None:
    server = COMPOSE["services"]["server"]
    assert server["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > (
        ServerSettings.model_fields["grace_seconds"].default + 10
    )
    assert server["build"]["dockerfile"] == "Dockerfile.cuda"
    assert {volume.split(":")[0] for volume in server["volumes"]} == set(COMPOSE["volumes"])
