"""Commands of trainings that take a second, and what they leave."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from tiny import TWO_LAYERS, digests

TRACE = "Traceback"


def command(model: Path, photos: Path, output: Path, **leaves: Any) -> list[str]:
    """The arguments of a training of two layers."""
    given = {
        "model_url": model,
        "images_data_url": photos,
        "rank": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "target_unet_modules": ",".join(TWO_LAYERS["target_unet_modules"]),
        **leaves,
    }
    flags = []
    for name, value in given.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return ["train", "--output", str(output), *flags]


def photographs(folder: Path, source: Path) -> Path:
    """The two smallest of the test photographs."""
    folder.mkdir(parents=True)
    for path in sorted(source.glob("*.jpg"), key=lambda path: path.stat().st_size)[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def events(run: Path) -> list[dict[str, Any]]:
    """The whole lines of the event log."""
    log = run / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def steps(run: Path) -> list[tuple[int, float]]:
    """Number and loss of every logged step."""
    return [(e["step"], e["loss"]) for e in events(run) if e["event"] == "step"]


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    """Waits until a running training has logged this step."""
    end = time.monotonic() + seconds
    while not any(number >= step for number, _ in steps(run)):
        assert time.monotonic() < end, f"step {step} never came"
        time.sleep(0.01)


def line_of_step(run: Path, step: int) -> int:
    """Which line of the event log, from 0, tells of a step."""
    return next(n for n, e in enumerate(events(run)) if e["event"] == "step" and e["step"] == step)


def results(run: Path) -> dict[str, str]:
    """Digests of all result files."""
    return digests(run / "outputs")


def checkpoints(run: Path) -> dict[str, str]:
    """Digests of all files of checkpoints."""
    return digests(run / "checkpoints")


def kind_of_file(path: Path, root: Path) -> str:
    """A path below the root, numbers and digests left out."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", path.relative_to(root).as_posix())
