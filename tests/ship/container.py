"""An image of Dockerfile.cuda, built by buildah, and containers of it. For container_checks.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = "localhost/cuda-stand-in"
BUILT = "localhost/trainer-checked"
# Longer than anything here takes.
_SECONDS = 600
# No privileges and no engine are needed.
_WITHOUT_ENGINE = {"BUILDAH_ISOLATION": "chroot"}


def buildah(*words: str) -> str:
    """What buildah prints of a command that works."""
    done = subprocess.run(
        ["buildah", *words],
        env=os.environ | _WITHOUT_ENGINE,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def has_image(name: str) -> bool:
    """Whether there is such an image on this machine."""
    known = buildah("images", "--format", "{{.Name}}")
    return name in known.splitlines()


def base_image(folder: Path) -> str:
    """The base that TRAINER_BASE_IMAGE names; else Debian 12, made by mmdebstrap once."""
    named = os.environ.get("TRAINER_BASE_IMAGE")
    if named is not None:
        return named
    if not has_image(STAND_IN):
        archive = folder / "base.tar"
        made = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates", "bookworm"]
        subprocess.run([*made, str(archive)], check=True)
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, str(archive), "/")
        buildah("commit", "--quiet", "--rm", container, STAND_IN)
        archive.unlink()
    return STAND_IN


def build(base: str) -> None:
    """Builds the image, with TRAINER_BUILD_VOLUMES mounted, such as pip's configuration."""
    volumes = shlex.split(os.environ.get("TRAINER_BUILD_VOLUMES", ""))
    mounts = [word for volume in volumes for word in ("--volume", volume)]
    # Docker's format has health checks.
    options = ["--format", "docker", "--layers", "--file", "Dockerfile.cuda", "--tag", BUILT]
    buildah("build", *options, "--build-arg", f"BASE_IMAGE={base}", *mounts, ".")


@dataclass(frozen=True)
class Layer:
    """One layer: what made it, and its bytes as a registry keeps it."""

    made_by: str
    size: int


@dataclass(frozen=True)
class Image:
    """The image's configuration and layers, the base's first."""

    config: Mapping[str, Any]
    layers: Sequence[Layer]

    @property
    def command(self) -> Sequence[str]:
        """What a container runs before its arguments."""
        return list(self.config["Entrypoint"])


def described(folder: Path) -> Image:
    """The image, looked at as it would go to a registry."""
    buildah("push", "--quiet", BUILT, f"dir:{folder}")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = manifest["config"]["digest"].removeprefix("sha256:")
    content = json.loads((folder / digest).read_text())
    steps = [one["created_by"] for one in content["history"] if not one.get("empty_layer")]
    sizes = [layer["size"] for layer in manifest["layers"]]
    assert len(steps) == len(sizes)
    layers = [Layer(step, size) for step, size in zip(steps, sizes, strict=True)]
    return Image(content["config"], layers)


@dataclass
class Container:
    """A container of the image; what it runs begins as the image says.

    Args:
        name: by which buildah knows it.
        command: the image's entry.
        data: the machine's folder that is its /data.
    """

    name: str
    command: Sequence[str]
    data: Path
    models: Path = field(init=False)

    def __post_init__(self) -> None:
        self.models = self.data.with_name("models")

    def words(self, *arguments: str, user: str = "", entry: bool = True, **env: str) -> list[str]:
        """The command that runs a container with these arguments, as this user or the image's."""
        options = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
        if user:
            options += ["--user", user]
        volumes = ["--volume", f"{self.data}:/data", "--volume", f"{self.models}:/models"]
        before = self.command if entry else ()
        return ["buildah", "run", *options, *volumes, self.name, "--", *before, *arguments]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        while True:
            with self.running(*arguments, **options) as process:
                out, err = process.communicate(timeout=_SECONDS)
            # Now and then buildah itself cannot begin.
            if "sealing memfd" not in err:
                return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @contextmanager
    def running(self, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """Runs it until it ends; where the block ends before, it is killed."""
        process = subprocess.Popen(
            self.words(*arguments, **options),
            env=os.environ | _WITHOUT_ENGINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            # Killing buildah leaves what it started.
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
            process.communicate()


@contextmanager
def container_of(image: Image, data: Path) -> Iterator[Container]:
    """A container with two folders of the machine, until the block ends."""
    name = buildah("from", BUILT)
    # Without an engine the image's own volumes may hide those of the machine.
    buildah("config", *[f"--volume={path}-" for path in image.config["Volumes"]], name)
    try:
        yield Container(name, image.command, data)
    finally:
        buildah("rm", name)


def owned_by(folder: Path, number: int) -> None:
    """Gives a folder with all it holds to a user."""
    for path in (folder, *folder.rglob("*")):
        try:
            os.chown(path, number, number)
        except PermissionError:
            pytest.fail("folders are given to the container's user: run this as root")
