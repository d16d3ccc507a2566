"""Lines and templates for several machines, with two local processes as two machines."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny import TWO_LAYERS

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/processes.md").read_text()
TEMPLATE = ROOT / "configs/deploy/slurm/two_nodes.sbatch"
LAYERS = ",".join(TWO_LAYERS["target_unet_modules"])

pytestmark = pytest.mark.thorough

# Stands for Slurm's: starts the command once for each of two nodes, which both are this machine.
# Once a step is logged it does what is wished for: ends the job in time, or loses a process.
SRUN = """#!/bin/bash
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
if [ -n "$STEP" ]; then
    until grep -q "\\"step\\": $STEP," runs/portrait/events.jsonl 2> /dev/null; do sleep 0.05; done
    case $ACCIDENT in
        lost) kill -KILL $(cat /proc/$second/task/$second/children) ;;
        preempted) kill -TERM $first $second ;;
    esac
fi
wait $first; code=$?
wait $second
exit $code
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo "JobId=$3 JobState=RUNNING Reason=None Requeue=1"
[ "$1" = requeue ] && echo "requeued $2"
exit 0
"""


@pytest.fixture
def environment(tmp_path: Path, sd15_folder: Path, photo_folder: Path) -> dict[str, str]:
    """A folder with `photos.yaml` and programs of Slurm, in which the page's lines run."""
    values = {
        "model_url": str(sd15_folder),
        "images_data_url": str(photo_folder),
        "target_unet_modules": LAYERS.split(","),
        "max_train_steps": 2,
        "rank": 4,
        "tensorboard": False,
    }
    (tmp_path / "photos.yaml").write_text(json.dumps(values))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | own | {"HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def here(line: str) -> str:
    """Lines of the page with one process a machine, and all machines this one."""
    line = line.replace("node0", "127.0.0.1").replace("--nproc-per-node 8", "--nproc-per-node 1")
    line = line.replace("configs/", f"{ROOT}/configs/")
    return line.replace("29500", str(free_port()))


def result_of(folder: Path) -> tuple[str, int]:
    """How a training ended, and the number of its processes."""
    result = json.loads((folder / "runs/portrait/result.json").read_text())
    lines = (folder / "runs/portrait/events.jsonl").read_text().splitlines()
    began = [e for e in map(json.loads, lines) if e["event"] == "run"]
    return result["status"], began[-1]["details"]["processes"]


def run_at_once(lines: Sequence[str], environment: dict[str, str], folder: Path) -> None:
    """Runs a command of each machine to its end."""
    nodes = [subprocess.Popen(shlex.split(it), env=environment, cwd=folder) for it in lines]
    try:
        assert [node.wait(timeout=240) for node in nodes] == [0] * len(nodes)
    finally:
        for node in nodes:
            node.kill()


def test_two_machines_train_together_by_the_lines_of_torchrun(
    environment: dict[str, str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    lines = here("\n".join(re.findall(r"^torchrun --nnodes .*$", PAGE, re.M))).splitlines()
    assert [shlex.split(line)[4] for line in lines] == ["0", "1"]

    run_at_once(lines, environment, tmp_path)

    assert result_of(tmp_path) == ("done", 2)
    figure("2 agents of torchrun as 2 machines, 1 training")


@pytest.mark.parametrize("config", ["two_nodes", "fsdp2_two_nodes", "fsdp2"])
def test_machines_train_together_by_the_lines_of_accelerate(
    config: str,
    environment: dict[str, str],
    flux_folder: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    # As each file says at its top.
    told = (ROOT / f"configs/accelerate/{config}.yaml").read_text()
    told = re.sub(r"\n# +", " ", told)
    (line,) = re.findall(r"accelerate launch --config_file .*? train\b", told)
    line = f"{here(line)} photos.yaml --output runs/portrait"
    line = line.replace("launch", f"launch --num_processes 2 --main_process_port {free_port()}")
    own = {"ACCELERATE_USE_CPU": "true"}
    if config.startswith("fsdp2"):
        line += f" --use-lora false --model-url {flux_folder} --target-unet-modules null"
    machines = [line.replace("--machine_rank 0", f"--machine_rank {rank}") for rank in (0, 1)]

    run_at_once(sorted(set(machines)), environment | own, tmp_path)

    assert result_of(tmp_path) == ("done", 2)
    figure(f"{config}.yaml: {len(set(machines))} launchers, 2 processes, 1 training")


def slurm_job(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the template for several nodes to its end, each node with one GPU."""
    nodes = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    first = {"SLURM_JOB_ID": "7", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    training = [sys.executable, "-m", "trainer", "train", "photos.yaml"]
    return subprocess.run(
        ["bash", str(TEMPLATE), *training, "--output", "runs/portrait"],
        env=environment | nodes | first | {"ACCELERATE_USE_CPU": "true"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_machines_train_together_by_the_template_for_slurm_which_is_queued_again_when_cut_off(
    environment: dict[str, str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    values = json.loads((tmp_path / "photos.yaml").read_text())
    longer = {"max_train_steps": 120, "checkpointing_steps": 5}
    (tmp_path / "photos.yaml").write_text(json.dumps(values | longer))

    for accident, step, code in (("lost", 20, 7), ("preempted", 60, 75)):
        done = slurm_job(environment | {"ACCIDENT": accident, "STEP": str(step)}, tmp_path)
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1] == "requeued 7"
    done = slurm_job(environment, tmp_path)

    assert done.returncode == 0, done.stderr
    assert "requeued" not in done.stdout
    assert "goes on after step" in done.stderr
    assert result_of(tmp_path) == ("done", 2)
    figure("exits 7 and 75 queued again, then done, by 2 local copies as 2 nodes")
