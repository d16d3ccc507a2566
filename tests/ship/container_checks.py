"""Dockerfile.cuda and compose.yaml, built and run.

Run by name and as root, `pytest tests/ship/container_checks.py`, with buildah, mmdebstrap and
docker-compose of the system and the extra `ship-tests`. Where one is missing, what needs it fails.
Minutes, and some 15 GB of disk for images, which stay: the next time is quicker. See container.py
for the variables it listens to.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from container import (
    ROOT,
    Container,
    Image,
    base_image,
    build,
    container_of,
    described,
    owned_by,
)
from running import free_port, wait_for
from safetensors.torch import load_file

from trainer.cli import cli

USER = 10001
MEGABYTE = 10**6
# Beside the base and the layer of third parties' wheels.
OWN_LAYERS = 60 * MEGABYTE
STEPS = 30
# In a run's event log.
STEP = '"event": "step"'
TRAINING = (
    *("train", "--model-url", "model", "--images-data-url", "photos", "--rank", "4"),
    *("--max-train-steps", str(STEPS), "--seed", "3"),
)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    build(base_image(tmp_path_factory.mktemp("base")))
    return described(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and photographs."""
    folder = tmp_path_factory.mktemp("things")
    for made in (("make_tiny_models.py", "sdxl", "model"), ("make_demo_photos.py", "photos")):
        script, *words = made
        words[-1] = str(folder / words[-1])
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / script), *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


@pytest.fixture(scope="session")
def container(
    image: Image, things: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    data = tmp_path_factory.mktemp("container") / "data"
    shutil.copytree(things, data)
    (data.with_name("models")).mkdir()
    owned_by(data.parent, USER)
    # pytest's own folders are for nobody else.
    for parent in (data.parent, *data.parent.parents[:3]):
        parent.chmod(0o755)
    with container_of(image, data) as made:
        yield made


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "hadolint is missing; it is in the extra ship-tests"
    command = [program, str(ROOT / "Dockerfile.cuda")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def composed(**variables: str) -> subprocess.CompletedProcess[str]:
    """What docker-compose understands of the file."""
    environment = {name: value for name, value in os.environ.items() if name != "TRAINER_KEYS"}
    return subprocess.run(
        ["docker-compose", "--file", str(ROOT / "compose.yaml"), "config"],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compose_reads_its_file_as_it_is_meant() -> None:
    done = composed(TRAINER_KEYS="one,two")
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)
    server = read["services"]["server"]
    assert server["environment"]["TRAINER_KEYS"] == "one,two"
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    # Older ones leave volumes as they stand, newer ones take them apart.
    assert [
        str(volume).count(path)
        for volume, path in zip(server["volumes"], ("/data", "/models"), strict=True)
    ] == [1, 1]
    assert set(read["volumes"]) == {"data", "models"}
    # Not to the network, but to this machine alone.
    assert str(server["ports"]).count("127.0.0.1") == 1


def test_compose_wants_keys() -> None:
    done = composed()
    assert done.returncode != 0
    assert "TRAINER_KEYS" in done.stderr


def test_nobody_is_root_and_what_is_kept_is_in_volumes(image: Image) -> None:
    config = image.config
    assert config["User"] == f"{USER}:{USER}"
    assert set(config["Volumes"]) == {"/data", "/models"}
    assert config["WorkingDir"] == "/data"
    assert list(config["ExposedPorts"]) == ["8700/tcp"]


def test_the_first_process_hands_signals_on_and_health_is_asked_by_the_console_script(
    image: Image,
) -> None:
    assert image.config["Entrypoint"][:3] == ["tini", "-g", "--"]
    assert image.config.get("StopSignal", "SIGTERM") == "SIGTERM"
    assert image.config["Healthcheck"]["Test"] == ["CMD", "trainer", "health", "--optional"]


def test_layers_of_our_own_are_small(image: Image) -> None:
    _, *added = image.layers
    (packages,) = [one for one in added if one.size == max(layer.size for layer in added)]
    own = [one for one in added if one is not packages]
    for layer in image.layers:
        print(f"{layer.size / MEGABYTE:8.1f} MB  {layer.made_by[:90]}")
    assert "COPY" in packages.made_by
    assert sum(layer.size for layer in own) <= OWN_LAYERS


def test_without_arguments_it_says_what_it_can(container: Container) -> None:
    assert "Commands:" in container.run("--help").stdout


def test_any_other_program_runs_too(container: Container) -> None:
    told = container.run("python", "-c", "import os; print(os.getuid(), os.getcwd())")
    assert told.stdout.split() == [str(USER), "/data"]
    assert container.run("bash", "-c", "exit 7").returncode == 7


def test_no_command_of_the_trainer_is_another_program_there(container: Container) -> None:
    found = container.run("bash", "-c", f"type -P {' '.join(cli.commands)} || true")
    assert found.stdout == ""


def test_what_compiling_needs_is_there(container: Container) -> None:
    code = "printf '#include <Python.h>\\nint one(void) { return 1; }' > /tmp/one.c && "
    code += "gcc -shared -fPIC $(python -c 'import sysconfig as s; "
    code += 'print("-I" + s.get_path("include"))'
    code += "') /tmp/one.c -o /tmp/one.so"
    done = container.run("bash", "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_training_leaves_files_that_others_read(container: Container) -> None:
    done = container.run(*TRAINING, "--output", "runs/one")
    assert done.returncode == 0, done.stderr
    outputs = container.data / "runs/one/outputs"
    for name in ("pytorch_lora_weights.safetensors", "lora.safetensors"):
        assert (outputs / name).stat().st_uid == USER
        assert load_file(outputs / name)
    assert (container.data / "cache").is_dir()


def weights(container: Container, run: str) -> bytes:
    return (container.data / run / "outputs/pytorch_lora_weights.safetensors").read_bytes()


def told_to_end(process: subprocess.Popen[str]) -> None:
    """As an engine does: SIGTERM to the container's first process."""
    inside = psutil.Process(process.pid).children(recursive=True)
    (first,) = [one for one in inside if one.name() == "tini"]
    first.send_signal(signal.SIGTERM)


def test_told_to_end_it_leaves_a_checkpoint_and_goes_on_to_the_same_bytes(
    container: Container,
) -> None:
    words = (*TRAINING, "--output", "runs/two")
    events = container.data / "runs/two/events.jsonl"
    with container.running(*words) as process:
        wait_for(lambda: events.exists() and STEP in events.read_text(), process=process)
        told_to_end(process)
        process.communicate()
    assert process.returncode == 75
    assert list((container.data / "runs/two/checkpoints").iterdir())
    assert container.run(*words).returncode == 0
    assert weights(container, "runs/two") == weights(container, "runs/one")


def test_another_user_with_folders_of_its_own_trains_too(
    image: Image, things: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(things, data)
    data.with_name("models").mkdir()
    owned_by(tmp_path, 1234)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    with container_of(image, data) as made:
        done = made.run(*TRAINING, "--output", "runs/own", user="1234:1234")
    assert done.returncode == 0, done.stderr
    assert (data / "runs/own/outputs/lora.safetensors").stat().st_uid == 1234


def test_bad_input_ends_by_its_own_code(container: Container) -> None:
    words = ("train", "--rank", "0", "--images-data-url", "photos", "--output", "runs/bad")
    assert container.run(*words).returncode == 2


def test_several_processes_train_behind_the_launcher(container: Container) -> None:
    # Without an engine nobody knows the container's host name.
    launcher = ("launched", "torchrun", "--standalone", "--local-addr", "127.0.0.1")
    launcher += ("--nproc-per-node", "2", "-m", "trainer")
    done = container.run(*launcher, *TRAINING, "--output", "runs/launched")
    assert done.returncode == 0, done.stderr
    told = json.loads((container.data / "runs/launched/result.json").read_text())
    assert told["exit_code"] == 0


def test_the_server_wants_keys_and_serves_who_has_one(container: Container) -> None:
    refused = container.run("serve", "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "there is no key" in refused.stderr
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = ("serve", "--host", "0.0.0.0", "--port", str(port))
    with container.running(*serve, TRAINER_KEYS="a-key") as process:
        wait_for(lambda: container.run("health", "--url", url).returncode == 0, process=process)
        with urllib.request.urlopen(f"{url}/healthz") as answer:
            assert answer.status == 200
        asked = urllib.request.Request(
            f"{url}/trainer/jobs", headers={"Authorization": "Key a-key"}
        )
        with urllib.request.urlopen(asked) as answer:
            assert answer.status == 200
        told_to_end(process)
        process.communicate()
    assert process.returncode == 0
    assert (container.data / "trainer-server").stat().st_uid == USER


def test_health_is_that_of_the_server_and_need_not_be_one(container: Container) -> None:
    url = ("--url", f"http://127.0.0.1:{free_port()}")
    assert container.run("health", *url).returncode == 1
    assert container.run("health", *url, "--optional").returncode == 0
