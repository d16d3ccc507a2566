"""A case of the GPU benchmark as its file has it: asked, foretold, bound, measured and met."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_cases import CASES, Case

from trainer.config import LEAVES

ROOT = Path(__file__).resolve().parent.parent
UNMEASURED = "unmeasured"
# Of every case; without a GPU each says that it is unmeasured.
FIGURES = (
    *("step_ms", "quartiles_ms", "mean_ms", "host_ms", "kernels", "busy_ms", "busy_share"),
    *("mfu", "peak_gib", "whole_seconds"),
)
# A bound, the figure that must keep it, and whether that must not be larger.
BOUNDS = {
    "ms": ("step_ms", True),
    "gib": ("peak_gib", True),
    "mfu": ("mfu", False),
    "whole_seconds": ("whole_seconds", True),
}
# Seconds that the host takes to start one operation, at best and at worst; the share of the ideal
# times that kernels reach, eager and compiled. Assumed, before anything was measured.
HOST_MS = (0.015, 0.025)
EAGER_SHARE = 0.75
COMPILED_SHARE = 0.7


def foretold(leaves: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[float, float]:
    """What a step may take at best and at worst on an H100, by its counts alone.

    Compiled, pointwise work is partly or not at all fused; captured, the host takes no time, and
    so where the trainer chooses; else it may take longer than the GPU.
    """
    if leaves.get("compile_blocks"):
        ideal = counts["products_ms"] / COMPILED_SHARE
        return ideal, max(ideal, counts["roofline_ms"])
    busy = counts["roofline_ms"] / EAGER_SHARE
    if leaves.get("cuda_graph", True):
        return busy, busy * 4 / 3
    fast, slow = (counts["operations"] * each for each in HOST_MS)
    return max(busy, fast), max(busy, slow)


def row(case: Case, told: Mapping[str, Any], tflops: Any) -> dict[str, Any]:
    """A case as the file has it: what was asked, foretold, bound, measured and met.

    Args:
        told: settings, status, and what was counted and measured.
        tflops: what the GPU does at most, if that was measured.
    """
    counts = told.get("counted")
    stated = case.predicted_ms
    predicted = stated or (foretold(case.leaves, counts) if counts else None)
    figures = {name: told.get(name, UNMEASURED) for name in FIGURES}
    if counts and UNMEASURED not in (figures["step_ms"], tflops):
        figures["mfu"] = counts["tflop"] / (figures["step_ms"] / 1e3) / tflops
    peak = figures["peak_gib"]
    ratio = peak / counts["forecast_gib"] if counts and peak != UNMEASURED else UNMEASURED
    asked = {name: bound for name, bound in asdict(case.bounds).items() if bound is not None}
    return {
        **told,
        "predicted_ms": predicted and [round(ms, 1) for ms in predicted],
        "predicted_by": "hand" if stated else "counts",
        "predicted_gib": case.predicted_gib,
        **{f"bound_{name}": bound for name, bound in asked.items()},
        **figures,
        "peak_over_forecast": ratio,
        "met": {name: _is_met(name, bound, figures) for name, bound in asked.items()},
    }


def _is_met(name: str, bound: float, figures: Mapping[str, Any]) -> Any:
    figure, is_most = BOUNDS[name]
    value = figures[figure]
    if value == UNMEASURED:
        return UNMEASURED
    return value <= bound if is_most else value >= bound


def line(name: str, told: Mapping[str, Any]) -> str:
    """One case for people."""
    if told["status"] not in ("done", UNMEASURED):
        return f"{name:34} {told['status']}: {told['message']}"
    low_high = told["predicted_ms"]
    shown = "" if low_high is None else f" (foretold {low_high[0]:.0f} to {low_high[1]:.0f})"
    if told["step_ms"] == UNMEASURED:
        return f"{name:34} {UNMEASURED}{shown}"
    broken = [bound for bound, met in told["met"].items() if met is False]
    words = f", NOT within its bound of {' and '.join(broken)}" if broken else ""
    return (
        f"{name:34} {told['step_ms']:8.1f} ms a step{shown}, {told['host_ms']:.1f} ms of the host, "
        f"{told['peak_gib']:.2f} GiB{words}"
    )


def settings_of(case: Case) -> dict[str, Any]:
    """What a row says was asked for."""
    return {"family": case.family, "preset": case.preset, **case.leaves}


def unknown_options(case: Case) -> dict[str, Any] | None:
    """The answer of a case with options that this trainer does not have."""
    unknown = sorted(case.leaves.keys() - LEAVES.keys())
    if not unknown:
        return None
    return {"status": "unknown options", "message": f"this trainer has no {', '.join(unknown)}"}


def commit() -> str:
    """The commit that is measured, with a plus where files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(out: Path, told: Mapping[str, Any]) -> None:
    """Writes the file whole, its cases in their own order."""
    rows = {name: told["cases"][name] for name in CASES if name in told["cases"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**told, "cases": rows}, indent=1) + "\n")


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()
