"""Times training steps on a processor beside bare loops, in alternation, and counts what they do.

It makes a base model with SDXL's structure in small: 70 transformer blocks of 64 to 256 channels,
158 million random weights in bf16. On it the engine trains as `trainer train` does, on one thread.
Beside it runs a loop with nothing in it that could be left out, with our layers or with PEFT's:
forward, loss, backward, clipping, fused AdamW. Times are ratios of CPU seconds within one process;
counts are the same on any machine. Options: bench_step.py --help. See docs/benchmarks/README.md.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import bench_prepare
import click
import make_tiny_models
import torch
from gpu_measures import machine
from gpu_rows import commit, today
from make_random_models import SHARD_BYTES, Sizes, narrow_sdxl, write_weights
from step_contest import FORMS, Setting

from trainer import base_model
from trainer.config import ModelConfig

# SDXL in a fifth of its channels, with a vocabulary and a VAE that are tiny.
STRUCTURE: Sizes = {
    part: {name: value for name, value in values.items() if name != "vocab_size"}
    for part, values in narrow_sdxl(64).items()
    if part != "vae"
}
PHOTOS = 4
MEGAPIXELS = 0.1

# At least this often the interval around a median holds the true one.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Bound:
    """The most that a figure may be.

    Args:
        strict: on a machine that does nothing else.
        loose: on one that is shared, such as those of continuous integration.
    """

    strict: float
    loose: float


@dataclass(frozen=True)
class Case:
    """One contest.

    Args:
        setting: of all its loops.
        loops: by name, see `step_contest.configuration`.
        bounds: of figures: of a race the ratio `a / b` of two loops' times; of loops alone
            `figure of a` or `figure of a / b`.
        race: whether they run in alternation, or each in a process of its own.
    """

    setting: Setting
    loops: Sequence[str]
    bounds: Mapping[str, Bound | None]
    race: bool = True


SMALL_STEP, LARGE_STEP = Setting(128, 1, "bf16"), Setting(256, 4, "bf16")
_BESIDE_BARE_LOOPS: Mapping[str, Bound | None] = {
    "engine-lora / bare-lora": Bound(1.05, 1.10),
    "engine-lora / peft-lora": Bound(1.0, 1.05),
}

CASES: Mapping[str, Case] = {
    "step": Case(SMALL_STEP, ("engine-lora", "bare-lora", "peft-lora"), _BESIDE_BARE_LOOPS),
    "step-fp32": Case(
        replace(SMALL_STEP, mixed_precision="no"),
        ("engine-lora", "bare-lora", "peft-lora"),
        _BESIDE_BARE_LOOPS,
    ),
    "forms": Case(
        SMALL_STEP,
        ("engine-lora", "engine-dora", "engine-lokr"),
        {
            "engine-dora / engine-lora": Bound(1.15, 1.25),
            "engine-lokr / engine-lora": Bound(1.3, 1.4),
        },
    ),
    "loha": Case(
        LARGE_STEP,
        ("engine-lora", "engine-loha"),
        {"engine-loha / engine-lora": Bound(1.3, 1.4)},
    ),
    "loha-fp32": Case(
        replace(LARGE_STEP, mixed_precision="no"),
        ("engine-lora", "engine-loha"),
        {"engine-loha / engine-lora": Bound(1.3, 1.4)},
    ),
    "loha8": Case(
        LARGE_STEP,
        ("engine-lora8", "engine-loha8"),
        {"engine-loha8 / engine-lora8": Bound(1.3, 1.4)},
    ),
    "alone": Case(
        SMALL_STEP,
        ("engine-lora", "bare-lora", "peft-lora", "engine-dora", "peft-dora"),
        {
            "operations of engine-lora": Bound(10_500, 10_500),
            "operations of engine-dora": Bound(14_000, 14_000),
            "operations of bare-lora": None,
            "operations of peft-lora": None,
            "operations of peft-dora": None,
            "host_reads of engine-lora": Bound(0, 0),
            "waiting of engine-lora": Bound(0.02, 0.03),
            "megabytes of engine-lora / bare-lora": Bound(1.10, 1.10),
            "megabytes of engine-lora / peft-lora": None,
            "megabytes of engine-dora / peft-dora": None,
            "first_megabytes of engine-lora / bare-lora": Bound(1.10, 1.10),
        },
        race=False,
    ),
}

# What `step_contest.measured` says of these loops in this setting.
Measure = Callable[[str, Sequence[str], Setting], Mapping[str, Any]]


def make_model(folder: Path, *, small: bool) -> None:
    """Writes the base model; with `small` a tiny one, to try the benchmark itself."""
    make_tiny_models.make_sdxl(folder)
    if small:
        return
    for part, values in STRUCTURE.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")
    base = base_model.locate(ModelConfig(model_url=str(folder)))
    for part in STRUCTURE:
        (replaced,) = (folder / part).glob("*.safetensors")
        replaced.unlink()
        skeleton = base_model.skeleton(base, part)
        write_weights(skeleton, replaced, device=torch.device("cpu"), shard_bytes=SHARD_BYTES)


def median_of_ratios(ones: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The median of the pairs' ratios, and an interval around it.

    The interval lies between order statistics: whatever the distribution, it holds the median with
    at least `CONFIDENCE`; of fewer than six pairs it is from the least ratio to the greatest, and
    holds it less often (Conover 1999, section 3.2).
    """
    ratios = sorted(one / other for one, other in zip(ones, others, strict=True))
    count, left_out, tail = len(ratios), 0, 1
    # `tail` of 2**count outcomes have at most `left_out` ratios below the median.
    while tail / 2**count <= (1 - CONFIDENCE) / 2:
        left_out += 1
        tail += math.comb(count, left_out)
    least = max(left_out - 1, 0)
    return {
        "value": statistics.median(ratios),
        "interval": [ratios[least], ratios[-1 - least]],
        "pairs": count,
    }


def row(case: Case, told: Mapping[str, Any], *, bounded: bool = True) -> dict[str, Any]:
    """A case as the file has it.

    Args:
        told: seconds of each loop's steps, or figures of each loop alone.
        bounded: false where the setting is another than the bounds are for.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, bound in case.bounds.items():
        measured, _, loops = name.rpartition(" of ")
        named = loops.split(" / ")
        if not told.keys() >= set(named):
            continue
        values = [told[loop] if case.race else told[loop][measured] for loop in named]
        if case.race:
            figure = median_of_ratios(*values)
        else:
            figure = {"value": values[0] if len(values) == 1 else values[0] / values[1]}
        figures[name] = figure | (_held(figure["value"], bound) if bound and bounded else {})
    summary = told
    if case.race:
        summary = {loop: {"median_cpu_seconds": statistics.median(s)} for loop, s in told.items()}
    return {
        "settings": asdict(case.setting),
        "date": today(),
        "commit": commit(),
        "loops": summary,
        "figures": figures,
    }


def _held(value: float, bound: Bound) -> dict[str, Any]:
    return {
        "bound": bound.strict,
        "met": value <= bound.strict,
        "loose_bound": bound.loose,
        "met_loosely": value <= bound.loose,
    }


def lines(name: str, told: Mapping[str, Any]) -> list[str]:
    """A case for people."""
    said = []
    for what, figure in told["figures"].items():
        words = f"{name:10} {what:44} {figure['value']:10.4g}"
        if "interval" in figure:
            low, high = figure["interval"]
            words += f"  [{low:.3f}, {high:.3f}] of {figure['pairs']} pairs"
        if "bound" in figure:
            words += f"  {'within' if figure['met'] else 'NOT within'} {figure['bound']:g}"
        said.append(words)
    return said


def measure(case: Case, ask: Measure) -> dict[str, Any]:
    """What a case's loops take: of a race in one process, else in one process each."""
    if case.race:
        return dict(ask("race", case.loops, case.setting))
    told: dict[str, Any] = {}
    for loop in case.loops:
        told |= ask("alone", [loop], case.setting)
    return told


def asker(model: Path, photos: Path, pairs: int) -> Measure:
    """Asks a new process; a race in it has so many rounds."""

    def ask(mode: str, loops: Sequence[str], setting: Setting) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            places = {"model": str(model), "photos": str(photos), "runs": folder}
            asked = {
                "mode": mode,
                "loops": loops,
                "setting": asdict(setting),
                "rounds": pairs,
                "places": places,
            }
            # Neither what is prepared nor step times are left to the user's own trainings.
            own = {"XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            script = str(Path(__file__).with_name("step_contest.py"))
            words = [sys.executable, script, json.dumps(asked), str(answer)]
            done = subprocess.run(
                words, check=False, capture_output=True, text=True, env={**os.environ, **own}
            )
            if done.returncode != 0:
                raise click.ClickException(f"{mode} of {', '.join(loops)} failed:\n{done.stderr}")
            told: dict[str, Any] = json.loads(answer.read_text())
            return told

    return ask


def chosen(patterns: str, forms: str, setting: Mapping[str, Any]) -> dict[str, Case]:
    """The cases that any of some patterns means, with loops of some forms alone.

    Args:
        patterns: of names, with commas between.
        forms: of adapters, likewise.
        setting: what is otherwise than in the cases.
    """
    kept = {}
    for name, case in CASES.items():
        loops = [loop for loop in case.loops if loop.split("-")[1] in forms.split(",")]
        is_meant = any(fnmatch(name, pattern) for pattern in patterns.split(","))
        if is_meant and len(loops) > case.race:
            kept[name] = replace(case, loops=loops, setting=replace(case.setting, **setting))
    if not kept:
        message = f"no case is left; there are {', '.join(CASES)} and forms {', '.join(FORMS)}"
        raise click.UsageError(message)
    return kept


def held(cases: Mapping[str, Any], entry: str) -> bool:
    """Whether all bounds are met.

    Args:
        entry: `met` or `met_loosely`.
    """
    return all(
        figure.get(entry, True) for told in cases.values() for figure in told["figures"].values()
    )


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), help="JSON; rows of other cases stay.")
@click.option("--cases", default="*", help=f"Patterns, with commas: {', '.join(CASES)}.")
@click.option("--forms", default=",".join(FORMS), help="Of adapters, with commas between.")
@click.option("--pairs", default=20, type=click.IntRange(min=2), help="Steps of each loop.")
@click.option("--resolution", type=int, help="Another one than the case's; no bounds then.")
@click.option("--batch-size", type=int, help="Likewise.")
@click.option("--small", is_flag=True, help="A tiny model, to try the benchmark itself.")
@click.option("--check", "entry", flag_value="met", help="Fail unless all bounds are met.")
@click.option("--check-loose", "entry", flag_value="met_loosely", help="For shared machines.")
def main(
    *,
    out: Path | None,
    cases: str,
    forms: str,
    pairs: int,
    small: bool,
    entry: str | None,
    **setting: int | None,
) -> None:
    """Measures cases one by one and prints their figures."""
    other = {name: value for name, value in setting.items() if value is not None}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place / "model", small=small)
        bench_prepare.make_photographs(
            place / "photos", count=PHOTOS, megapixels=MEGAPIXELS, faces=False
        )
        ask = asker(place / "model", place / "photos", pairs)
        for name, case in chosen(cases, forms, other).items():
            told[name] = row(case, measure(case, ask), bounded=not (other or small))
            print(*lines(name, told[name]), sep="\n", flush=True)
            if out is not None:
                write(out, told, small=small)
    if entry is not None and not held(told, entry):
        sys.exit(1)


def write(out: Path, told: Mapping[str, Any], *, small: bool) -> None:
    """Writes the file whole, cases in their own order."""
    facts = {
        "machine": {**machine(), "capability": torch.backends.cpu.get_cpu_capability()},
        "small": small,
    }
    earlier = json.loads(out.read_text()) if out.exists() else {}
    if earlier and any(earlier[name] != facts[name] for name in facts):
        raise click.UsageError(f"{out} is of another machine or of other models; give another file")
    rows = earlier.get("cases", {}) | told
    ordered = {name: rows[name] for name in CASES if name in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "cases": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
