"""Trainings as torchrun and `accelerate launch` start them, with a process killed or stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rank_jobs import AFTERWARDS
from tiny import TWO_LAYERS

ROOT = Path(__file__).parent.parent.parent
RANK_TIMEOUT = 30
# What a launcher takes to see that a process is dead, to end the others and to end itself.
LAUNCHER = 15
CONFIG = ROOT / "configs/accelerate/eight_gpus.yaml"
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    + ["--num_processes", "2", "--main_process_port", "0"],
}

pytestmark = pytest.mark.thorough


@pytest.fixture
def arguments(sd15_folder: Path, photo_folder: Path, tmp_path: Path) -> list[str]:
    """A training into the folder `run`."""
    values = f"-m trainer train --model-url {sd15_folder} --images-data-url {photo_folder} --rank 4"
    fixed = f"--tensorboard false --rank-timeout {RANK_TIMEOUT} --output {tmp_path}/run"
    few = ["--target-unet-modules", ",".join(TWO_LAYERS["target_unet_modules"])]
    return [*values.split(), *fixed.split(), *few]


def started(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A launcher, with what it and its processes say in the file `said`."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(folder / "said", "w") as said:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | own | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder)},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


@pytest.mark.parametrize(
    ("launcher", "rank", "number"),
    [
        ("torchrun", 1, signal.SIGKILL),
        ("torchrun", 1, signal.SIGSTOP),
        ("accelerate", 0, signal.SIGKILL),
    ],
    ids=["torchrun, killed", "torchrun, stopped", "accelerate, main process killed"],
)
def test_the_loss_of_a_process_is_told_by_its_launcher_and_in_the_result(
    launcher: str,
    rank: int,
    number: signal.Signals,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    run = tmp_path / "run"
    running = started([*LAUNCHERS[launcher], *arguments, "--max-train-steps", "2000"], tmp_path)
    try:
        wait_for_step(run, 2, running, tmp_path / "said")
        pids = processes_of(running.pid)
        assert sorted(pids) == [0, 1]
        os.kill(pids[rank], number)
        began = time.monotonic()
        limit = LAUNCHER + (RANK_TIMEOUT + AFTERWARDS if number == signal.SIGSTOP else AFTERWARDS)
        code = running.wait(timeout=limit)
        took = time.monotonic() - began
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert code != 0
    result = json.loads((run / "result.json").read_text())
    assert (result["error_kind"], result["exit_code"]) == ("process", 7)
    assert f"process {rank} o" in result["error"]
    figure(f"{took:.0f} s until the launcher ended, its exit code {code}, in the result 7")


# Runs as each Python begins: the main process comes later than the others.
LATE = 'import os, time\nif os.environ.get("RANK") == "0": time.sleep(30)\n'


@pytest.mark.parametrize("is_late", [False, True], ids=["together", "main process late"])
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_refused_options_give_exit_code_2_behind_a_launcher(
    launcher: str,
    is_late: bool,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE if is_late else "")
    search = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ACCELERATE_USE_CPU": "true"}
    line = ["bash", str(ROOT / "configs/deploy/launched"), sys.executable, *LAUNCHERS[launcher]]

    done = subprocess.run(
        [*line, *arguments, "--rank", "0"],
        env=os.environ | search,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2, done.stderr
    figure("of options that are refused: 2")


def test_processes_that_torchrun_starts_again_go_on_from_the_checkpoint(
    arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    run = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # As on several machines: the launcher keeps one store for all attempts.
    static = f"--rdzv-backend static --master-addr 127.0.0.1 --master-port {port} --max-restarts 1"
    launcher = ["-m", "torch.distributed.run", *static.split(), "--nproc-per-node", "2"]
    few = ["--max-train-steps", "40", "--checkpointing-steps", "5"]
    running = started([*launcher, *arguments, *few], tmp_path)
    try:
        wait_for_step(run, 6, running, tmp_path / "said")
        os.kill(processes_of(running.pid)[1], signal.SIGKILL)
        assert running.wait(timeout=180) == 0, (tmp_path / "said").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"]) == ("done", 40)
    (step,) = re.findall(r"goes on after step (\d+)", (tmp_path / "said").read_text())
    figure(f"done in a second attempt, which went on after step {step}")


def wait_for_step(run: Path, step: int, running: subprocess.Popen[bytes], said: Path) -> None:
    """Waits until the log has this step."""
    deadline = time.monotonic() + 120
    log = run / "events.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert running.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def processes_of(launcher: int) -> dict[int, int]:
    """The ids of a launcher's processes, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK=")]
        found |= dict.fromkeys(ranks, pid)
    return found
