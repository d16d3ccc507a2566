"""Several processes, crashes and signals, through the command line as users meet them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import digests

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(model: Path, photos: Path, output: Path, *flags: str) -> list[str]:
    """The arguments of a small training."""
    values = f"train --model-url {model} --images-data-url {photos} --output {output} --rank 4"
    fixed = "--learning-rate 1e-3 --tensorboard false --max-train-steps 6 --use-dora true"
    return [*values.split(), *fixed.split(), *flags]


def losses(folder: Path) -> list[float]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return [event["loss"] for event in steps]


def run(arguments: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, *launcher, "-m", "trainer", *arguments]
    return subprocess.run(
        launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def start_until_step(arguments: list[str], output: Path, step: int) -> subprocess.Popen[str]:
    """A training that has logged this step and still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = output / "events.jsonl"
        if log.exists() and f'"step": {step},' in log.read_text():
            return process
        time.sleep(0.02)
    raise AssertionError(f"never saw step {step}: {process.communicate()[0]}")


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_global_batch(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    one = run(command(sd15_folder, photo_folder, tmp_path / "one", "--batch-size", "4"))
    two = run(
        command(sd15_folder, photo_folder, tmp_path / "two", "--batch-size", "2"),
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["status"] == "done"


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    workers = "--cache-latents false --num-workers 2 --random-flip true"
    flags = f"--checkpointing-steps 2 {workers}".split()
    whole = run(command(sdxl_folder, photo_folder, tmp_path / "whole", *flags))
    arguments = command(sdxl_folder, photo_folder, tmp_path / "killed", *flags)
    process = start_until_step(arguments, tmp_path / "killed", step=3)
    process.kill()
    process.communicate()
    again = run(arguments)
    assert (whole.returncode, again.returncode) == (0, 0), whole.stderr + again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert digests(tmp_path / "killed" / "outputs") == digests(tmp_path / "whole" / "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    arguments = command(sd15_folder, photo_folder, tmp_path / "run")
    arguments[arguments.index("--max-train-steps") + 1] = "500"
    process = start_until_step(arguments, tmp_path / "run", step=2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert process.returncode == 75
    assert result["status"] == "interrupted"
    assert checkpoints == [f"step-{len(losses(tmp_path / 'run'))}"]
    assert "error[interrupted]" in said
    assert str(tmp_path / "run") in said


def test_a_second_training_in_the_same_folder_is_refused(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    arguments = command(sd15_folder, photo_folder, tmp_path / "run")
    arguments[arguments.index("--max-train-steps") + 1] = "500"
    process = start_until_step(arguments, tmp_path / "run", step=1)
    second = run(arguments)
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert "another training is running" in second.stderr
