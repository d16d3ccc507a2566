"""configs/deploy/pods/start with programs that stand in: what it installs, keeps and serves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.serving import settings_from

ROOT = Path(__file__).parent.parent
START = ROOT / "configs/deploy/pods/start"
# Says what it was called with, and where it keeps what it finds.
TRAINER = """#!/bin/bash
echo "trainer $*; in $PWD, $HF_HOME, $XDG_CACHE_HOME"
if [ "$1" = doctor ]; then exit 1; fi
exit "${CODE:-0}"
"""
# Says whether it is new enough, and makes environments whose pip notes what it installs.
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then exit "${OLD:-0}"; fi
bin=$3/bin
mkdir -p "$bin"
printf '#!/bin/bash\\necho "pip $*"\\ncp %q/trainer %q/trainer\\n' "$STANDS_IN" "$bin" > "$bin/pip"
chmod +x "$bin/pip"
"""


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A folder with a volume, and programs that stand in."""
    for folder in ("workspace", "programs", "image"):
        (tmp_path / folder).mkdir()
    for path, text in (("image/trainer", TRAINER), ("programs/python3", PYTHON)):
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    return tmp_path


def started(
    pod: Path, *words: str, script: Path = START, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The script at work in the pod: PATH has the pod's programs and the system's alone."""
    environment = {
        "PATH": f"{pod}/programs:/usr/bin:/bin",
        "HOME": str(pod),
        "STANDS_IN": str(pod / "image"),
        "TRAINER_DATA": str(pod / "workspace"),
        "TRAINER_ENVIRONMENT": str(pod / "environment"),
    }
    return subprocess.run(
        ["bash", str(script), *words],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def with_trainer(pod: Path) -> str:
    """PATH of an image that has the trainer."""
    return f"{pod}/image:/usr/bin:/bin"


def said(pod: Path, words: str) -> str:
    volume = pod / "workspace"
    return f"trainer {words}; in {volume}, {volume}/models, {volume}/cache"


def test_an_image_that_has_the_trainer_needs_no_installing(pod: Path) -> None:
    done = started(pod, "train", "photos.yaml", PATH=with_trainer(pod))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [said(pod, "doctor"), said(pod, "train photos.yaml")]


def test_a_checkout_is_installed_with_its_own_versions_and_once(pod: Path) -> None:
    first, second = (started(pod, "version") for _ in range(2))
    assert first.stdout.splitlines() == [
        f"pip install --quiet --constraint {ROOT}/constraints.txt"
        f" --editable {ROOT}[server,heic,lycoris]",
        said(pod, "doctor"),
        said(pod, "version"),
    ]
    assert second.stdout.splitlines() == first.stdout.splitlines()[1:]


def away(pod: Path) -> Path:
    """The script in no checkout."""
    script = pod / "away/from/any/checkout/start"
    script.parent.mkdir(parents=True)
    shutil.copy(START, script)
    return script


def test_elsewhere_the_package_that_is_named_is_installed(pod: Path) -> None:
    wheel = "https://example.com/one.whl"
    done = started(pod, "version", script=away(pod), TRAINER_PACKAGE=wheel)
    assert done.stdout.splitlines()[0] == f"pip install --quiet {wheel}"


def test_elsewhere_nothing_is_installed_that_is_not_named(pod: Path) -> None:
    done = started(pod, "version", script=away(pod))
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRAINER_PACKAGE" in done.stderr


def test_a_python_that_is_too_old_is_told_before_anything_is_installed(pod: Path) -> None:
    done = started(pod, OLD="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not (pod / "environment").exists()


def test_another_program_runs_as_it_is_and_the_launcher_is_one(pod: Path) -> None:
    output = pod / "workspace"
    words = ("launched", "bash", "-c", "echo launched; exit 3", "--output", str(output))
    done = started(pod, *words, PATH=with_trainer(pod))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "launched")


def test_without_a_command_the_server_listens_to_the_pod_alone(pod: Path) -> None:
    for variables in ({}, {"TRAINER_KEYS": "a"}, {"RUNPOD_POD_ID": "abc"}):
        done = started(pod, PATH=with_trainer(pod), **variables)
        assert done.stdout.splitlines()[-1] == said(pod, "serve")
        assert "ssh -L 8700:127.0.0.1:8700" in done.stderr


def test_behind_runpods_proxy_it_is_served_to_those_who_have_a_key(pod: Path) -> None:
    done = started(pod, PATH=with_trainer(pod), TRAINER_KEYS="a", RUNPOD_POD_ID="abc")
    public = "https://abc-8700.proxy.runpod.net"
    assert done.stdout.splitlines()[-1] == said(pod, f"serve --host 0.0.0.0 --public-url {public}")


def test_the_exit_code_is_the_commands(pod: Path) -> None:
    done = started(pod, "train", "photos.yaml", PATH=with_trainer(pod), CODE="75")
    assert done.returncode == 75


def test_without_a_volume_nothing_begins(pod: Path) -> None:
    done = started(pod, TRAINER_DATA=str(pod / "none"), PATH=with_trainer(pod))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no files can be written to `{pod}/none`" in done.stderr
    assert "TRAINER_DATA" in done.stderr


def test_folders_that_are_named_stay_as_they_are_named(pod: Path) -> None:
    own = {"HF_HOME": "/elsewhere/models", "XDG_CACHE_HOME": "/elsewhere/cache"}
    done = started(pod, "version", PATH=with_trainer(pod), **own)
    assert done.stdout.splitlines()[-1].endswith("/elsewhere/models, /elsewhere/cache")


def test_the_public_address_is_one_that_the_server_takes() -> None:
    settings = settings_from(None, {"public_url": "https://abc-8700.proxy.runpod.net"})
    assert settings.public_url == "https://abc-8700.proxy.runpod.net"
