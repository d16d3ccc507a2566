"""What one training takes on a GPU, what the GPU is and what it can do at most."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_prepare
import torch
from gpu_rows import UNMEASURED
from step_meter import Meter

from trainer import engine
from trainer.config import TrainingConfig
from trainer.events import Event, RunEvent, StepEvent
from trainer.job import RunFolder
from trainer.machine import device_name

GIB = 2**30
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
# Of square products, and of a copy.
SIDE = 8192
COPIED = 2 * GIB
TRIALS = 20


def measure(config: TrainingConfig, run_folder: Path, meter: Meter | None) -> dict[str, Any]:
    """Trains, and says what its steps took.

    Args:
        config: the resolved configuration.
        run_folder: new.
        meter: of the steps, the last of which ends the training; None: go on to checkpoint, files
            and their verification.

    Raises:
        TrainerError: of the kind that tells what went wrong.
    """
    events = engine.run(config, RunFolder(run_folder), lambda: False)
    total = config.run.max_train_steps
    if meter is None:
        return _followed(events, total, deliver=True)
    with meter.following():
        return _followed(events, total, deliver=False) | meter.figures()


def _followed(events: Iterable[Event], total: int, *, deliver: bool) -> dict[str, Any]:
    """Times and peaks: until the first step, in the steps, after them."""
    told: dict[str, Any] = {}
    started = _from_here()
    for event in events:
        if isinstance(event, RunEvent):
            told = {"trained_parameters": event.details["trained_parameters"]}
            told["preparing"] = {"seconds": time.perf_counter() - started, **_memory()}
            started = _from_here()
        if isinstance(event, StepEvent) and event.step == total:
            told["steps"] = {"seconds": time.perf_counter() - started, **_memory()}
            told["last_loss"] = event.loss
            started = _from_here()
            if not deliver:
                break
    if deliver:
        told["delivery"] = {"seconds": time.perf_counter() - started, **_memory()}
    peaks = [told[stage].get("peak_gib") for stage in ("preparing", "steps")]
    told["host_peak_gib"] = bench_prepare.peak_megabytes() / 2**10
    return told if None in peaks else told | {"peak_gib": max(peaks)}


def _from_here() -> float:
    """The time now; peaks of memory begin anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def _memory() -> dict[str, float]:
    """The device's memory in GiB: most in tensors, most held by torch, and all in use now."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB,
        "device_gib": (whole - free) / GIB,
    }


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


def ceilings() -> dict[str, Any]:
    """What the GPU does at most: dense products in bf16, and copies from its memory to itself."""
    if not torch.cuda.is_available():
        return {"bf16_tflops": UNMEASURED, "copy_gigabytes_per_second": UNMEASURED}
    side = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda")
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product, copy = (
        _usual_seconds(lambda: side @ side),
        _usual_seconds(lambda: target.copy_(source)),
    )
    return {
        "bf16_tflops": 2 * SIDE**3 / product / 1e12,
        "copy_gigabytes_per_second": 2 * COPIED / copy / 1e9,
    }


def _usual_seconds(work: Callable[[], Any]) -> float:
    """The median time of work on the GPU, warmed up."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * TRIALS + 1)]
    for mark in marks:
        work()
        mark.record()
    torch.cuda.synchronize()
    warm = zip(marks[TRIALS:], marks[TRIALS + 1 :], strict=False)
    return statistics.median(one.elapsed_time(other) for one, other in warm) / 1e3
