"""One training on Modal, from the folder of this project. See docs/clusters.md.

    modal volume create trainer-data
    modal volume put trainer-data photos.yaml
    modal volume put trainer-data photos
    modal run --detach configs/deploy/modal/train.py --config photos.yaml --output runs/portrait
    modal volume get trainer-data runs/portrait/outputs

Where Modal takes the GPU away, the training leaves a checkpoint and goes on elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import modal

PROJECT = Path(__file__).resolve().parents[3] if modal.is_local() else Path("/src")
PARTS = ("README.md", "LICENSE", "NOTICE", "constraints.txt", "pyproject.toml")
# The same command would fail again: something given is wrong, the loss is not finite, memory is too
# small, no checkpoint can be used.
FINAL = (2, 3, 4, 6)
SECONDS_OF_A_DAY = 24 * 60 * 60
# Where the volume is.
DATA = Path("/data")

image = modal.Image.debian_slim(python_version="3.11").apt_install("gcc", "libc6-dev")
for part in PARTS:
    image = image.add_local_file(PROJECT / part, f"/src/{part}", copy=True)
for part in ("configs", "trainer"):
    image = image.add_local_dir(
        PROJECT / part, f"/src/{part}", copy=True, ignore=["**/__pycache__"]
    )
image = image.run_commands("pip install --constraint /src/constraints.txt /src")

# For base models that want a login.
token = modal.Secret.from_dict({"HF_TOKEN": os.environ.get("HF_TOKEN", "")})
app = modal.App("trainer", image=image)
data = modal.Volume.from_name("trainer-data", create_if_missing=True)
models = modal.Volume.from_name("trainer-models", create_if_missing=True)


@app.function(
    volumes={str(DATA): data, "/models": models},
    env={"HF_HOME": "/models", "XDG_CACHE_HOME": str(DATA / "cache")},
    secrets=[token],
    memory=48 * 1024,
    timeout=SECONDS_OF_A_DAY,
    retries=modal.Retries(max_retries=10, backoff_coefficient=1.0),
    single_use_containers=True,
)
def train(config: str, output: str, gpus: int) -> int:
    """Trains, or goes on from the last checkpoint.

    Args:
        config: configuration below the volume's folder.
        output: run folder there.
        gpus: of this machine.

    Returns:
        The training's exit code: 0, or one that the same command would end with again.

    Raises:
        RuntimeError: the training ended with another; Modal begins it again.
    """
    training = subprocess.Popen(command(config, output, gpus), cwd=DATA)
    try:
        code = training.wait()
    finally:
        # Where the GPU is taken away or the call is cancelled, there is half a minute.
        if training.poll() is None:
            training.terminate()
            training.wait()
        data.commit()
    if code and code not in FINAL:
        raise RuntimeError(f"the training ended with exit code {code}")
    return code


def command(config: str, output: str, gpus: int) -> Sequence[str]:
    """The training's command on some GPUs of one machine."""
    training = ["trainer", "train", str(DATA / config), "--output", str(DATA / output)]
    if gpus == 1:
        return training
    # A launcher makes 1 of every exit code: `launched` gives the training's own.
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    return ["bash", str(PROJECT / "configs/deploy/launched"), *launcher, *training]


@app.local_entrypoint()
def main(config: str, output: str, gpu: str = "L40S") -> None:
    """Trains with a configuration of the volume, on GPUs such as `H100` or `H100:8`."""
    gpus = int(gpu.partition(":")[2] or 1)
    sys.exit(train.with_options(gpu=gpu).remote(config, output, gpus))
