"""Times the start and the end of whole trainings against what no training can start without.

A base model, if none is given one of SDXL's structure with random weights, is trained for one step
on photographs by `trainer train`, in processes of its own: with an empty cache folder, then again
with what the first kept. Before them, a bare process imports torch and diffusers and reads all
weights once. Everything is timed from outside, from the start of a process, and of several rounds
the shortest counts: files are in the system's memory, and other work only adds. Where other work
goes on, set OMP_NUM_THREADS=1. Options: bench_start.py --help. See docs/benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_prepare
import click
import make_random_models
import torch
from gpu_measures import machine
from gpu_rows import commit, today
from make_random_models import narrow_sdxl

ROOT = Path(__file__).parent.parent
BARE = Path(__file__).with_name("bare_start.py")
TRAININGS = ("first", "second")
# Of a second training's start, in bare starts; and its preparation, in those of the first.
START_BOUND, PREPARATION_BOUND = 1.3, 0.2
# Seconds from the files' verification to the end of the process.
TAIL_BOUND = 1.0
PHOTOS, MEGAPIXELS, RESOLUTION = 4, 2.0, 256
TRUE_CHANNELS = 320


def bare(model: Path) -> float:
    """Seconds of a process that imports and reads, and no more."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(BARE), str(model)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout) - start


def training(model: Path, photos: Path, folder: Path, home: Path) -> dict[str, float]:
    """Seconds of a training of one step.

    Args:
        folder: a new run folder.
        home: for the user's cache folder.
    """
    options = {
        "model_url": model,
        "images_data_url": photos,
        "resolution_width": RESOLUTION,
        "resolution_height": RESOLUTION,
        "mixed_precision": "bf16",
        "max_train_steps": 1,
        "tensorboard": False,
        "output": folder,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    start = time.time()
    subprocess.run(
        [sys.executable, "-m", "trainer", "train", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)},
    )
    end = time.time()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return spans(events, start, end)


def spans(events: Sequence[Mapping[str, Any]], start: float, end: float) -> dict[str, float]:
    """What the events of a training say of its parts, in seconds.

    Args:
        events: each with its `time`.
        start: when its process was started.
        end: when that had ended.
    """
    step = next(event for event in events if event["event"] == "step")
    verified = next(e for e in events if e["event"] == "file" and e["role"] == "verification")
    return {
        "start": step["time"] - step["seconds"] - start,
        "delivery": verified["time"] - step["time"],
        "tail": end - verified["time"],
    }


def figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is bounded, of the shortest of all rounds."""
    floor = min(told["bare"] for told in rounds)
    first, second = (min(told[name]["start"] for told in rounds) for name in TRAININGS)
    tail = min(told[name]["tail"] for told in rounds for name in TRAININGS)
    found = {
        "second start to bare start": (second / floor, START_BOUND),
        "second preparation to first": (
            max(0.0, second - floor) / max(first - floor, 1e-9),
            PREPARATION_BOUND,
        ),
        "seconds after verification": (tail, TAIL_BOUND),
    }
    return {
        name: {"value": value, "bound": bound, "met": value <= bound}
        for name, (value, bound) in found.items()
    }


def make_model(folder: Path, channels: int, *, small: bool) -> Path:
    """A base model of SDXL's structure with random weights, in a new folder."""
    sizes = narrow_sdxl(channels) if channels < TRUE_CHANNELS else None
    make_random_models.make_base_model(
        "sdxl", folder, small=small, t5_layers=1, device=torch.device("cpu"), sizes=sizes
    )
    return folder


def weights_of(model: Path) -> dict[str, int]:
    """Megabytes of the weights of each part of a base model."""
    files = sorted(model.glob("*/*.safetensors"))
    return {
        part: sum(file.stat().st_size for file in files if file.parent.name == part) // 10**6
        for part in dict.fromkeys(file.parent.name for file in files)
    }


def measure(place: Path, model: Path, rounds: int) -> dict[str, Any]:
    """Times trainings of a base model on photographs.

    Args:
        place: for photographs, runs and what is kept.
        model: the base model's folder.
    """
    photos = place / "photos"
    bench_prepare.make_photographs(photos, count=PHOTOS, megapixels=MEGAPIXELS, faces=False)
    told = []
    for number in range(rounds):
        home = place / f"home-{number}"
        seconds: dict[str, Any] = {"bare": bare(model)}
        for name in TRAININGS:
            seconds[name] = training(model, photos, place / f"{name}-{number}", home)
        told.append(seconds)
    return {"megabytes": weights_of(model), "rounds": told, "figures": figures(told)}


def lines(told: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    return [
        f"{what:30}{figure['value']:8.3f}  "
        f"{'within' if figure['met'] else 'NOT within'} {figure['bound']:g}"
        for what, figure in told["figures"].items()
    ]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--channels",
    default=96,
    type=click.IntRange(32, TRUE_CHANNELS),
    help="Of the UNet's first block, a multiple of 32; 320: the model in its true size.",
)
@click.option("--model", type=click.Path(path_type=Path), help="A folder, trained instead.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="The shortest counts.")
@click.option("--small", is_flag=True, help="A tiny model, to try the benchmark itself.")
@click.option("--remark", default="", help="On the machine, such as what else it does.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON, written anew.")
def main(
    *, channels: int, model: Path | None, rounds: int, small: bool, remark: str, out: Path | None
) -> None:
    """Measures, prints the figures and writes them down."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = model or make_model(place / "model", channels, small=small)
        told = measure(place, model, rounds)
    print(*lines(told), sep="\n")
    if out is not None:
        facts = {
            "machine": {
                **machine(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            "remark": remark,
            "date": today(),
            "commit": commit(),
        }
        out.write_text(json.dumps({**facts, "cases": {"start": told}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
