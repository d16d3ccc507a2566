"""Several processes, crashes and signals, through the command line as users meet them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several_processes
import snapshots
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from tiny import SMALL, TWO_LAYERS, digests

from trainer import cli as commands

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(model: Path, photos: Path, output: Path, *flags: str) -> list[str]:
    """The arguments of a small training."""
    values = f"train --model-url {model} --images-data-url {photos} --output {output} --rank 4"
    fixed = "--learning-rate 1e-3 --tensorboard false --max-train-steps 6 --use-dora true"
    few = ["--target-unet-modules", ",".join(TWO_LAYERS["target_unet_modules"])]
    return [*values.split(), *fixed.split(), *few, *flags]


def losses(folder: Path) -> list[float]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return [event["loss"] for event in steps]


def run_in_turn(*trainings: list[str]) -> subprocess.CompletedProcess[str]:
    """Commands one after the other in one new process: imports take longer than a training."""
    program = (
        "import json, sys; from trainer.cli import run; "
        "sys.exit(max(run(arguments) for arguments in json.loads(sys.argv[1])))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, json.dumps(trainings)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
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


# Each needs something of the other process: its share of a batch or of accumulated gradients,
# gradients of rows, of text encoders, class pictures. A batch holds pictures of one size: where
# sizes differ, batches of another length are others.
SIZES = {"max_train_steps": 6, "use_dora": True}
TOGETHER: dict[str, dict[str, Any]] = {
    "batches": SIZES | {"enable_bucket": False},
    "accumulated gradients": SIZES | {"batch_size": 2},
    "tokens": {
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "clip_seg_mask_prompt": "head",
        "segmenter": "luminance",
        "gradient_accumulation_steps": 2,
    },
    "text encoders": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
    "waiting denoiser": {"train_text_encoder_ti": True, "disable_unet_during_ti_training": True},
    "made class pictures": {
        "with_prior_preservation": True,
        "photo_class": "Man",
        "num_class_images": 3,
        "class_inference_steps": 2,
    },
}


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch_does(
    sd15_folder: Path,
    sdxl_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Five pictures of two a process: the second batch of an epoch leaves the second process idle.
    subject = snapshots.write_pictures(tmp_path / "subject", 5)
    of_class = snapshots.write_pictures(tmp_path / "class", 3, photograph=photographs.cat)
    common = {"model_url": str(sdxl_folder), "images_data_url": str(subject), **SMALL, **TWO_LAYERS}
    plain = {"model_url": str(sd15_folder), "images_data_url": str(photo_folder)}
    places = {
        "tokens": {"class_images_url": str(of_class)},
        "batches": plain,
        "accumulated gradients": plain,
    }
    alone, together = (
        {
            name: common | {"batch_size": size} | own | places.get(name, {})
            for name, own in TOGETHER.items()
        }
        for size in (4, 2)
    )
    alone["accumulated gradients"]["gradient_accumulation_steps"] = 2
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-1"))
    for name, leaves in alone.items():
        several_processes.train_one(leaves, tmp_path / f"1/{name}.run", tmp_path / "1" / name)
    (tmp_path / "2.json").write_text(json.dumps(together))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [several_processes.__file__, str(tmp_path / "2.json"), str(tmp_path / "2")]
    own_places = {
        "XDG_CACHE_HOME": str(tmp_path / "cache-2"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        env=ENVIRONMENT | own_places,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    for name, own in TOGETHER.items():
        one, first, second = (
            tmp_path / place for place in (f"1/{name}.0", f"2/{name}.0", f"2/{name}.1")
        )
        facts = [json.loads(Path(f"{path}.json").read_text()) for path in (one, first, second)]
        tensors = [load_file(f"{path}.safetensors") for path in (one, first, second)]
        assert len(facts[0]["losses"]) == own.get("max_train_steps", 4)
        assert facts[1]["losses"] == facts[2]["losses"]
        assert facts[1]["losses"] == pytest.approx(facts[0]["losses"], rel=2e-6)
        assert tensors[1].keys() == tensors[2].keys() == tensors[0].keys()
        assert all(torch.equal(tensors[1][n], tensors[2][n]) for n in tensors[1])
        assert facts[0]["class_images"] == ([0, 1, 2, 3] if "made" in name else [])
    # One process made the first and the third picture, the other the second.
    shares = [
        json.loads(path.read_text())["class_images"] for path in sorted(made_by_two(tmp_path))
    ]
    assert [len(told) - 1 for told in shares] == [2, 1]
    one, two = (
        sorted((tmp_path / place / "made class pictures.run" / "class_images").rglob("*.png"))
        for place in ("1", "2")
    )
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 3
    for path, other in zip(one, two, strict=True):
        # Processes may have another number of threads: sums are rounded in another order.
        assert np.abs(pixels_of(path) - pixels_of(other)).max() <= 1


def made_by_two(folder: Path) -> Iterator[Path]:
    """What each of two processes said of the class pictures that they made."""
    return (folder / "2").glob("made class pictures.?.json")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bytes(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    workers = "--cache-latents false --num-workers 2 --random-flip true"
    # New tokens that learn up to step 4: killed before, gone on with from step 2.
    pivotal = "--train-text-encoder-ti --train-text-encoder-ti-frac 0.7"
    masked = "--clip-seg-mask-prompt head --segmenter luminance"
    flags = f"--checkpointing-steps 2 {workers} {pivotal} {masked}".split()
    whole = command(sdxl_folder, photo_folder, tmp_path / "whole", *flags)
    killed = command(sdxl_folder, photo_folder, tmp_path / "killed", *flags)
    process = start_until_step(killed, tmp_path / "killed", step=3)
    process.kill()
    process.communicate()
    done = run_in_turn(killed, whole)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert digests(tmp_path / "killed" / "outputs") == digests(tmp_path / "whole" / "outputs")


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = long_command(sd15_folder, photo_folder, tmp_path / "run")
    process = start_until_step(arguments, tmp_path / "run", step=2)
    # While it runs, its folder is its own.
    assert commands.run(arguments) == 2
    assert "another training is running" in capsys.readouterr().err

    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)

    assert process.returncode == 75
    was_interrupted(tmp_path / "run", said)
    assert "run the same command again" in said
    assert f"python -m trainer {' '.join(arguments)}" in said


def test_a_wish_of_the_system_to_end_leaves_a_checkpoint_too(
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "run" / "events.jsonl"

    def ask() -> None:
        deadline = time.monotonic() + 60
        while not (log.exists() and '"step": 2,' in log.read_text()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    code = commands.run(long_command(sd15_folder, photo_folder, tmp_path / "run"))
    asking.join()

    assert code == 75
    was_interrupted(tmp_path / "run", capsys.readouterr().err)


def long_command(model: Path, photos: Path, output: Path) -> list[str]:
    """The arguments of a training that is over before its steps are."""
    arguments = command(model, photos, output)
    arguments[arguments.index("--max-train-steps") + 1] = "500"
    return arguments


def was_interrupted(run: Path, said: str) -> None:
    """The run folder and the message of a training that was stopped."""
    result = json.loads((run / "result.json").read_text())
    checkpoints = [path.name for path in (run / "checkpoints").iterdir()]
    assert result["status"] == "interrupted"
    assert checkpoints == [f"step-{len(losses(run))}"]
    assert "error[interrupted]" in said
