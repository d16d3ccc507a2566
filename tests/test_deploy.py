"""The files of configs/deploy, as far as no cluster and no account is needed for it.

`tests/ship` has the rest: a real Slurm, and the schemas of Kubernetes and SkyPilot.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer import errors, presets

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "configs/deploy"
SLURM = sorted(DEPLOY.rglob("*.sbatch"))
PAGE = (ROOT / "docs/clusters.md").read_text()
INTERRUPTED = errors.Interrupted.exit_code
# What the same command meets again, by README's table of exit codes.
HOPELESS = {
    errors.InputError.exit_code,
    errors.NonFiniteError.exit_code,
    errors.OutOfMemoryError.exit_code,
    errors.CheckpointError.exit_code,
}
# Stands for a training and its launcher: says that it has begun, waits for SIGTERM where it is to,
# and ends with the exit code that it is told, with a result and an own exit code where there is to
# be one.
TRAINING = """
import json, os, pathlib, signal, sys
words = dict(word.split("=") for word in os.environ["TOLD"].split())
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
def leave(*_):
    if "result" in words:
        new = folder / "new"
        new.write_text(json.dumps({"exit_code": int(words["result"])}))
        new.rename(folder / "result.json")
    if "own" in words:
        pathlib.Path(os.environ["TRAINER_EXIT_CODE_FILE"]).write_text(words["own"] + os.linesep)
    sys.exit(int(words["code"]))
signal.signal(signal.SIGTERM, leave)
(folder / "begun").touch()
signal.pause() if "waits" in words else leave()
"""


# Stands for a launcher: notes each SIGTERM for a second after the first, and ends.
COUNTING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
(folder / "begun").touch()
while not heard:
    time.sleep(0.02)
end = time.monotonic() + 1
while time.monotonic() < end:
    time.sleep(0.02)
(folder / "heard").write_text(" ".join(heard))
"""


def launched(
    folder: Path, told: str, *words: str, program: str = TRAINING, temporary: str = "."
) -> subprocess.Popen[str]:
    """A training that does as it is told, behind `launched`, in a process group of its own.

    Args:
        temporary: where temporary files go, from the folder.
    """
    command = ["bash", str(DEPLOY / "launched"), sys.executable, "-c", program, *words]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        command,
        env={**os.environ, "PATH": path, "TOLD": told, "TMPDIR": str(folder / temporary)},
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def begun(folder: Path) -> None:
    """Waits until a training has begun."""
    deadline = time.monotonic() + 20
    while not (folder / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code of a program, and what it complained of."""
    _, said = running.communicate(timeout=20)
    return running.returncode, said


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ("code=0", 0),
        ("code=1 result=75", 75),
        ("code=1 result=4", 4),
        ("code=1 own=2", 2),
        ("code=1 own=0", 1),
        ("code=1 own=0 result=75", 75),
        ("code=1 own=abc", 1),
        ("code=1 own=2 result=75", 2),
        ("code=0 own=1", 0),
        ("code=1", 1),
        ("code=137", 137),
    ],
)
def test_a_launched_training_ends_with_its_own_exit_code(
    told: str, code: int, tmp_path: Path
) -> None:
    running = launched(tmp_path, told, "--output", str(tmp_path))

    assert ended(running)[0] == code
    assert {path.name for path in tmp_path.iterdir()} <= {"begun", "result.json"}


def test_where_there_is_no_place_for_an_exit_code_the_result_tells_it(tmp_path: Path) -> None:
    told, output = "code=1 result=75", ["--output", str(tmp_path)]

    running = launched(tmp_path, told, *output, temporary="nowhere")

    assert ended(running)[0] == INTERRUPTED


def test_the_result_of_an_earlier_run_is_not_taken_for_that_of_a_launched_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "result.json").write_text('{"exit_code": 75}')

    running = launched(tmp_path, "code=1", "--output", str(tmp_path))

    assert ended(running)[0] == 1


def test_a_launched_training_is_told_to_stop_and_waited_for(tmp_path: Path) -> None:
    running = launched(tmp_path, "code=1 result=75 waits=1", "--output", str(tmp_path))
    begun(tmp_path)

    running.send_signal(signal.SIGTERM)

    assert ended(running)[0] == INTERRUPTED


def test_a_launcher_is_told_to_stop_once_where_the_whole_process_group_is(tmp_path: Path) -> None:
    running = launched(tmp_path, "", "--output", str(tmp_path), program=COUNTING)
    begun(tmp_path)

    os.killpg(running.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.killpg(running.pid, signal.SIGTERM)

    assert ended(running)[0] == 0
    assert (tmp_path / "heard").read_text() == "TERM"


def test_a_launched_training_must_say_where_its_result_will_be(tmp_path: Path) -> None:
    code, said = ended(launched(tmp_path, "code=0"))

    assert code == errors.InputError.exit_code
    assert "--output" in said


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_a_template_of_slurm_is_a_script_that_leaves_time_for_a_checkpoint(path: Path) -> None:
    text = path.read_text()
    options = re.findall(r"^#SBATCH (--[\w-]+)", text, re.M)

    subprocess.run(["bash", "-n", str(path)], check=True)
    assert {"--signal", "--requeue", "--open-mode", "--time"} <= set(options)
    # Slurm reads options up to the first command.
    assert not re.search(r"^[^#\n].*\n(.*\n)*#SBATCH", text, re.M)


def ran_by_slurm(
    path: Path, folder: Path, *, srun: str, stands: str, first: str = ""
) -> tuple[int, str]:
    """Runs a template with programs that stand in for Slurm's; its exit code, what scontrol heard.

    Args:
        srun: what it does.
        stands: how the job stands at the end.
        first: what the shell does before the template.
    """
    for name, does in {
        "srun": srun,
        "scontrol": f'echo "$1" >>told; [ "$1" = show ] && echo "JobId=7 {stands}"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    (folder / "first").write_text(first)
    search = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {
        "PATH": search,
        "PYTHONPATH": str(ROOT),
        "BASH_ENV": str(folder / "first"),
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(
        ["bash", str(path), "trainer", "train", "--output", str(folder)],
        env=os.environ | own,
        cwd=folder,
        check=False,
    )
    return done.returncode, (folder / "told").read_text()


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_a_job_of_slurm_that_is_stopped_before_it_began_is_queued_again(
    path: Path, tmp_path: Path
) -> None:
    # The signal comes while the template's first line of work is read.
    first = """trap 'case $BASH_COMMAND in "export SRUN"*) kill -TERM $$ ;; esac' DEBUG\n"""

    code, told = ran_by_slurm(
        path, tmp_path, srun="touch started", stands="JobState=RUNNING Requeue=1", first=first
    )

    assert code == INTERRUPTED
    assert not (tmp_path / "started").exists()
    assert told == "show\nrequeue\n"


# What `scontrol show job` says in Slurm 22.05 while a job ends, and whether it is to go on by its
# own doing: not where somebody cancelled it or wants no more of it, or Slurm queues it again.
STANDS = {
    "told to stop": ("JobState=RUNNING Reason=None Requeue=1 PreemptTime=None", True),
    "out of time": ("JobState=COMPLETING Reason=TimeLimit Requeue=1 PreemptTime=None", True),
    "preempted": (
        "JobState=COMPLETING Reason=None Requeue=1 PreemptTime=2026-11-22T19:13:55",
        True,
    ),
    "cancelled": ("JobState=COMPLETING Reason=None Requeue=1 PreemptTime=None", False),
    "not to be queued again": ("JobState=RUNNING Reason=None Requeue=0 PreemptTime=None", False),
}


@pytest.mark.parametrize(("stands", "goes_on"), STANDS.values(), ids=STANDS)
@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_an_interrupted_job_of_slurm_is_queued_again_unless_it_was_cancelled(
    path: Path, stands: str, goes_on: bool, tmp_path: Path
) -> None:
    code, told = ran_by_slurm(path, tmp_path, srun=f"exit {INTERRUPTED}", stands=stands)

    assert code == INTERRUPTED
    assert told == ("show\nrequeue\n" if goes_on else "show\n")


def job() -> dict[str, Any]:
    """The Job of Kubernetes."""
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes/job/job.yaml").read_text())
    return read


def test_a_job_of_kubernetes_fails_on_what_would_fail_again_and_goes_on_after_an_interruption() -> (
    None
):
    rules = job()["spec"]["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule
    }

    assert codes == {"FailJob": sorted(HOPELESS), "Ignore": [INTERRUPTED]}
    names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    assert names == {container["name"]}
    # Without it the rules are refused.
    assert job()["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_a_pod_has_time_for_its_checkpoint_and_is_no_root() -> None:
    pod = job()["spec"]["template"]["spec"]

    assert pod["terminationGracePeriodSeconds"] >= 300
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001


def test_eight_gpus_of_a_pod_train_by_the_launcher_with_the_training_s_own_exit_code(
    tmp_path: Path,
) -> None:
    changes = yaml.safe_load((DEPLOY / "kubernetes/eight_gpus/kustomization.yaml").read_text())
    operations = yaml.safe_load(changes["patches"][0]["patch"])
    (words,) = [it["value"] for it in operations if it["path"].endswith("/args")]
    (tmp_path / "accelerate").write_text(
        '#!/bin/sh\necho "$@"\necho 2 >"$TRAINER_EXIT_CODE_FILE"\nexit 1\n'
    )
    (tmp_path / "accelerate").chmod(0o755)
    search = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])

    done = subprocess.run(
        words,
        env=os.environ | {"PATH": search, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == errors.InputError.exit_code, done.stderr
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    config = presets.folder() / "accelerate/eight_gpus.yaml"
    launcher = f"launch --config_file {config} --no_python"
    assert done.stdout == f"{launcher} {' '.join(container['args'])}\n"


def spot() -> dict[str, Any]:
    """The task of SkyPilot."""
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "skypilot/spot.yaml").read_text())
    return read


def test_a_task_of_skypilot_recovers_from_interruptions_alone() -> None:
    recovery = spot()["resources"]["job_recovery"]

    assert recovery["recover_on_exit_codes"] == [INTERRUPTED]
    assert "max_restarts_on_errors" not in recovery


@pytest.mark.parametrize(("gpus", "launchers"), [(1, []), (8, ["accelerate"])])
def test_a_task_of_skypilot_trains_on_as_many_gpus_as_there_are(
    gpus: int, launchers: list[str], tmp_path: Path
) -> None:
    programs = tmp_path / "trainer/bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for name in ("trainer", "accelerate"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $@"\nexit 75\n')
        (programs / name).chmod(0o755)
    told = {"HOME": str(tmp_path), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus)}

    done = subprocess.run(
        ["bash", "-c", spot()["run"]],
        env=os.environ | spot()["envs"] | told,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == INTERRUPTED
    (line,) = done.stdout.splitlines()
    assert line.endswith("train /data/photos.yaml --output /data/runs/portrait")
    assert line.split()[: len(launchers)] == launchers
    assert ("--num_processes 8" in line) == (gpus == 8)


def test_the_page_names_every_file_for_clusters() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    paths = [path for path in files if path.name != "kustomization.yaml"]
    names = {path.relative_to(ROOT).as_posix() for path in paths}

    assert len(names) >= 6
    assert {name for name in names if "kubernetes" in name} <= set(re.findall(r"[\w./-]+", PAGE))
    # The entry of the image has a page of its own.
    assert {name for name in names if name not in PAGE} == {"configs/deploy/container/entry"}
