"""Trainings as torchrun and `accelerate launch` start them, with a process killed or stopped."""

from __future__ import annotations

import json
import os
import signal
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
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    values = f"train --model-url {sd15_folder} --images-data-url {photo_folder} --rank 4"
    fixed = f"--tensorboard false --max-train-steps 2000 --rank-timeout {RANK_TIMEOUT}"
    few = ["--target-unet-modules", ",".join(TWO_LAYERS["target_unet_modules"])]
    run = tmp_path / "run"
    arguments = [*values.split(), *fixed.split(), *few, "--output", str(run)]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "said", "w") as said:
        running = subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], "-m", "trainer", *arguments],
            env=os.environ | own | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
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
