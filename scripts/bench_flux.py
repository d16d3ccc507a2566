"""Times training steps of FLUX.1 [dev] in its true size, with random weights, and their memory.

`make` writes a base model of random numbers made on the GPU; nothing is downloaded. `run` trains
on it in one case after another, each in a process of its own, and writes step times and peaks of
memory to a JSON file. A case that fails is recorded, and the rest goes on. Options: bench_flux.py
make --help, bench_flux.py run --help. See docs/gpu.md.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_prepare
import click
import make_tiny_models
import torch
from safetensors.torch import save_file

from trainer import base_model, engine
from trainer.base_model import BaseModel
from trainer.config import ModelConfig, TrainingConfig
from trainer.errors import TrainerError
from trainer.estimate import estimate
from trainer.events import Event, RunEvent, StepEvent
from trainer.job import RunFolder
from trainer.machine import device_name
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve

GIB = 2**30
SEED = 0
# Of linear layers and convolutions: outputs of a few thousand inputs of size 1 have size 1.
DEVIATION = 0.02
SHARD_BYTES = 4 * GIB
# Where `make` writes down what it made.
MADE = "bench.json"

# What the true model's configurations have otherwise than a tiny one's.
# Source: the files of black-forest-labs/FLUX.1-dev.
TRUE_SIZES: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {
        "sample_size": 1024,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "num_decoder_layers": 24,
    },
}
T5_LAYERS = ("num_layers", "num_decoder_layers")

PHOTOS = 4
MEGAPIXELS = 1.6
# Steps that still pay for allocations and compiled kernels: no part of the usual time.
WARM_UP_STEPS = 3
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
# Lines of what a crashed process said last.
LAST_WORDS = 5


@dataclass(frozen=True)
class Case:
    """A training that is measured.

    Args:
        leaves: options over the preset's.
        preset: what it starts from; None: the defaults.
    """

    leaves: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None


def _square(side: int) -> dict[str, Any]:
    return {"resolution_width": side, "resolution_height": side}


_LORA = {
    "rank": 16,
    "target_unet_modules": ["to_k", "to_q", "to_v", "to_out.0"],
    "mixed_precision": "bf16",
}
_CKPT = {"gradient_checkpointing": True}

CASES: Mapping[str, Case] = {
    **{f"lora-{side}": Case({**_LORA, **_square(side)}) for side in (512, 768, 1024)},
    **{f"lora-{side}-ckpt": Case({**_LORA, **_CKPT, **_square(side)}) for side in (512, 768, 1024)},
    "dora-1024-ckpt": Case({**_LORA, **_CKPT, **_square(1024), "use_dora": True}),
    # At the sizes that the presets have.
    "flux-24gb": Case(preset="flux-24gb"),
    "flux-16gb": Case(preset="flux-16gb"),
    "flux-12gb": Case(preset="flux-12gb"),
    "full-512": Case(_square(512), preset="flux-full-80gb"),
    "full-1024": Case(_square(1024), preset="flux-full-80gb"),
}


def make_base_model(
    folder: Path, *, small: bool, t5_layers: int, device: torch.device, shard_bytes: int
) -> None:
    """Writes FLUX.1 [dev] with random weights in bf16.

    Args:
        folder: new.
        small: the same in a few megabytes.
        t5_layers: of T5, where it is not small; the true one has 24.
        device: where random numbers are made.
        shard_bytes: of the weights, at most this many are in memory at one time.
    """
    base = describe(folder, small=small, t5_layers=t5_layers)
    counts = {}
    for part in TRUE_SIZES:
        (replaced,) = (folder / part).glob("*.safetensors")
        replaced.unlink()
        model = base_model.skeleton(base, part)
        counts[part] = sum(p.numel() for p in model.parameters())
        write_weights(model, replaced, device=device, shard_bytes=shard_bytes)
    made = {"small": small, "t5_layers": None if small else t5_layers, "parameters": counts}
    (folder / MADE).write_text(json.dumps(made, indent=2) + "\n")


def describe(folder: Path, *, small: bool, t5_layers: int) -> BaseModel:
    """Writes tokenizers, schedule and configurations; the weights beside them are tiny ones."""
    make_tiny_models.make_flux(folder)
    for part, values in TRUE_SIZES.items():
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        if not small:
            config |= values
            config |= {name: t5_layers for name in T5_LAYERS if part == "text_encoder_2"}
        file.write_text(json.dumps(config, indent=2) + "\n")
    return base_model.locate(ModelConfig(model_url=str(folder)))


def write_weights(
    model: torch.nn.Module, like: Path, *, device: torch.device, shard_bytes: int
) -> None:
    """Writes random weights in bf16, shard by shard.

    Args:
        model: with shapes alone.
        like: the file that the weights would be in, were they one.
        device: where they are made.
        shard_bytes: of a shard, unless one tensor is larger.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards = list(_in_shards(shapes, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{like.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weight(name, shapes[name], generator).cpu() for name in names}
        save_file(tensors, like.with_name(file), metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    like.with_name(f"{like.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms that change nothing, no bias, and normal numbers in everything else."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": generator.device}
    if name.endswith("bias"):
        return torch.zeros(shape, **kind)
    if len(shape) == 1:
        return torch.ones(shape, **kind)
    return torch.empty(shape, **kind).normal_(std=DEVIATION, generator=generator)


def _in_shards(shapes: Mapping[str, torch.Size], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def configuration(case: Case, model: Path, photos: Path, steps: int) -> TrainingConfig:
    """What `train` would make of a case's preset and options."""
    given = {
        "model_url": str(model),
        "images_data_url": str(photos),
        "max_train_steps": steps,
        "tensorboard": False,
        **case.leaves,
    }
    layers = [] if case.preset is None else [load_preset(case.preset)]
    return resolve([*layers, Layer("bench_flux", given, explicit=True)])


def measure(config: TrainingConfig, run_folder: Path, *, deliver: bool) -> dict[str, Any]:
    """Trains, and says what its steps took.

    Without delivery it ends with its last step, before checkpoint, files and their verification.

    Args:
        config: the resolved configuration.
        run_folder: new.
        deliver: go on to the end.

    Raises:
        TrainerError: of the kind that tells what went wrong.
    """
    events = engine.run(config, RunFolder(run_folder), lambda: False)
    return _followed(events, config.run.max_train_steps, deliver=deliver)


def _followed(events: Iterable[Event], total: int, *, deliver: bool) -> dict[str, Any]:
    """Times and peaks: until the first step, in the steps, after them."""
    told: dict[str, Any] = {}
    seconds: list[float] = []
    started = _from_here()
    for event in events:
        if isinstance(event, RunEvent):
            told = {"trained_parameters": event.details["trained_parameters"]}
            told["preparing"] = {"seconds": time.perf_counter() - started, **_memory()}
            started = _from_here()
        if isinstance(event, StepEvent):
            seconds.append(event.seconds)
            if event.step == total:
                told["step_seconds"] = usual_seconds(seconds)
                told["steps"] = {"each": seconds, "last_loss": event.loss, **_memory()}
                started = _from_here()
                if not deliver:
                    break
    if deliver:
        told["delivery"] = {"seconds": time.perf_counter() - started, **_memory()}
    peaks = [told[stage]["peak_gib"] for stage in ("preparing", "steps")]
    told["peak_gib"] = None if None in peaks else max(peaks)
    told["host_peak_gib"] = bench_prepare.peak_megabytes() / 2**10
    return told


def usual_seconds(seconds: Sequence[float]) -> float:
    """The median of the steps after the warm-up."""
    return statistics.median(seconds[WARM_UP_STEPS:])


def _from_here() -> float:
    """The time now; peaks of memory begin anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def _memory() -> dict[str, float | None]:
    """The device's memory in GiB: most in tensors, most held by torch, and all in use now."""
    if not torch.cuda.is_available():
        return {"peak_gib": None, "reserved_peak_gib": None, "device_gib": None}
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB,
        "device_gib": (whole - free) / GIB,
    }


def forecast(config: TrainingConfig) -> dict[str, Any]:
    """What `estimate` says of the same training."""
    told = estimate(config)
    peak = None if told.footprint is None else told.footprint.peak_bytes / GIB
    return {"forecast_gib": peak, "forecast_notes": list(told.notes)}


def machine() -> dict[str, Any]:
    """What figures depend on beside the case."""
    gpu = torch.cuda.is_available()
    return {
        "device": device_name(),
        "device_gib": torch.cuda.get_device_properties(0).total_memory / GIB if gpu else None,
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def apart(command: Sequence[str], answer: Path, *, limit: float, **variables: str) -> Any:
    """The answer of another process, or how it failed.

    Args:
        command: of the process.
        answer: JSON file that it writes.
        limit: seconds that it may take.
        variables: of its environment, beside those here.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit,
            env={**os.environ, **variables},
        )
    except subprocess.TimeoutExpired:
        return {"status": "time limit", "message": f"not through after {limit:g} seconds"}
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-LAST_WORDS:])
        return {"status": "crash", "message": f"ended with {done.returncode}: {last}"}
    return json.loads(answer.read_text())


def with_ratio(told: dict[str, Any]) -> dict[str, Any]:
    """The same with the measured peak over the forecast one, where both are there."""
    peak, expected = told.get("peak_gib"), told.get("forecast_gib")
    if peak is None or expected is None:
        return told
    return {**told, "ratio": peak / expected}


def line(name: str, told: Mapping[str, Any]) -> str:
    """One case for people."""
    if told["status"] != "done":
        return f"{name:16} {told['status']}: {told['message']}"
    peak = "no GPU" if told["peak_gib"] is None else f"{told['peak_gib']:.2f} GiB at most"
    ratio = f", {told['ratio']:.3f} of the forecast" if "ratio" in told else ""
    return f"{name:16} {told['step_seconds'] * 1000:8.0f} ms a step, {peak}{ratio}"


@click.group(help=__doc__)
def main() -> None:
    """Makes a base model, or measures trainings on it."""


@main.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--small", is_flag=True, help="A few megabytes, to try the benchmark itself.")
@click.option(
    "--t5-layers",
    default=2,
    help="Of T5, whose true number is 24; it takes no part in steps, and 0.4 GB of disk a layer.",
)
def make(folder: Path, small: bool, t5_layers: int) -> None:
    """Writes the base model into FOLDER, which must not exist: about 25 GB."""
    if folder.exists():
        raise click.UsageError(f"{folder} exists; give another folder or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_base_model(
        folder, small=small, t5_layers=t5_layers, device=device, shard_bytes=SHARD_BYTES
    )
    print((folder / MADE).read_text(), end="")


@main.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON; added to.")
@click.option("--cases", default=",".join(CASES), help="Which, with commas between.")
@click.option("--steps", default=12, type=click.IntRange(min=WARM_UP_STEPS + 1), help="Of each.")
@click.option("--limit", default=300.0, help="Seconds that a case may take.")
@click.option("--compare-estimate", is_flag=True, help="Ask `estimate` for its forecast, too.")
@click.option("--deliver", is_flag=True, help="Go on to checkpoint, files and verification.")
def run(
    folder: Path,
    out: Path,
    cases: str,
    steps: int,
    limit: float,
    compare_estimate: bool,
    deliver: bool,
) -> None:
    """Measures cases on the base model in FOLDER, one by one; those in the file stay there."""
    names = cases.split(",")
    if unknown := set(names) - CASES.keys():
        raise click.UsageError(
            f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}"
        )
    model = json.loads((folder / MADE).read_text())
    told = {"machine": machine(), "model": model, "cases": {}}
    if out.exists():
        earlier = json.loads(out.read_text())
        if any(earlier[facts] != told[facts] for facts in ("machine", "model")):
            raise click.UsageError(f"{out} is of another machine or model; give another file")
        told = earlier
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        bench_prepare.make_photographs(
            place / "photos", count=PHOTOS, megapixels=MEGAPIXELS, faces=False
        )
        for case in names:
            told["cases"][case] = _measured(
                folder, place, case, steps, limit, compare=compare_estimate, deliver=deliver
            )
            print(line(case, told["cases"][case]), flush=True)
            # After each case: whatever ends the next one, this one is there.
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(told, indent=2) + "\n")


def _measured(
    model: Path, place: Path, name: str, steps: int, limit: float, *, compare: bool, deliver: bool
) -> dict[str, Any]:
    """One case, its parts each in a new process, which writes into `place` beside the photos."""
    told = {"settings": {"preset": CASES[name].preset, **CASES[name].leaves, "steps": steps}}
    modes = (["forecast"] if compare else []) + ["deliver" if deliver else "steps"]
    answer, run_folder = place / "answer.json", place / "run"
    for mode in modes:
        words = [mode, name, str(model), str(place), str(steps)]
        command = [sys.executable, str(Path(__file__).resolve()), "measure", *words]
        told |= apart(
            command,
            answer,
            limit=limit,
            HF_HUB_OFFLINE="1",
            # Neither step times nor prepared pictures are left to the user's own trainings.
            XDG_CACHE_HOME=str(place / "cache"),
        )
        answer.unlink(missing_ok=True)
        shutil.rmtree(run_folder, ignore_errors=True)
    return with_ratio(told)


@main.command(name="measure", hidden=True)
@click.argument("mode", type=click.Choice(["forecast", "steps", "deliver"]))
@click.argument("name", type=click.Choice(list(CASES)))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("place", type=click.Path(path_type=Path))
@click.argument("steps", type=int)
def measure_alone(mode: str, name: str, model: Path, place: Path, steps: int) -> None:
    """What `run` starts for each case."""
    try:
        config = configuration(CASES[name], model, place / "photos", steps)
        if mode == "forecast":
            told = forecast(config)
        else:
            told = measure(config, place / "run", deliver=mode == "deliver")
            told["status"] = "done"
    except TrainerError as error:
        told = {"status": error.kind, "message": error.message}
    (place / "answer.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
