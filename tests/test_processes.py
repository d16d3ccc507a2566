"""Several processes, crashes and signals, through the command line as users meet them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snapshots
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from tiny import SMALL, digests

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


# A batch holds pictures of one size: where sizes differ, batches of another length are others.
SAME_GLOBAL_BATCH = [
    (["--enable-bucket=false", "--batch-size", "4"], ["--enable-bucket=false"]),
    (["--gradient-accumulation-steps", "2", "--batch-size", "2"], []),
]


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "together"), SAME_GLOBAL_BATCH)
def test_two_processes_train_like_one_with_the_same_global_batch(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, alone: list[str], together: list[str]
) -> None:
    one = run(command(sd15_folder, photo_folder, tmp_path / "one", *alone))
    two = run(
        command(sd15_folder, photo_folder, tmp_path / "two", *together, "--batch-size", "2"),
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["status"] == "done"


# Each needs something of the other process: gradients of rows, of text encoders, class pictures.
TOGETHER: dict[str, dict[str, Any]] = {
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
def test_two_processes_teach_words_and_share_class_pictures_as_one_does(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    # Five pictures of two a process: the second batch of an epoch leaves the second process idle.
    subject = snapshots.write_pictures(tmp_path / "subject", 5)
    of_class = snapshots.write_pictures(tmp_path / "class", 3, photograph=photographs.cat)
    common = {"model_url": str(sdxl_folder), "images_data_url": str(subject), **SMALL}
    words = TOGETHER["tokens"] | {"class_images_url": str(of_class)}
    for processes, batch_size in ((1, 4), (2, 2)):
        (tmp_path / str(processes)).mkdir()
        leaves = {
            name: common | own | {"batch_size": batch_size, "max_train_steps": 4}
            for name, own in (TOGETHER | {"tokens": words}).items()
        }
        (tmp_path / f"{processes}.json").write_text(json.dumps(leaves))
        cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache-{processes}")}
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        program = str(Path(__file__).parent / "several_processes.py")
        done = subprocess.run(
            [
                *launcher,
                program,
                str(tmp_path / f"{processes}.json"),
                str(tmp_path / str(processes)),
            ],
            env=ENVIRONMENT | cache | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    for name in TOGETHER:
        one, first, second = (
            tmp_path / place for place in (f"1/{name}.0", f"2/{name}.0", f"2/{name}.1")
        )
        facts = [json.loads(Path(f"{path}.json").read_text()) for path in (one, first, second)]
        tensors = [load_file(f"{path}.safetensors") for path in (one, first, second)]
        assert len(facts[0]["losses"]) == 4
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
