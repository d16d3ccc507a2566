"""Times training steps of SD 1.5, SDXL and FLUX.1 [dev] in true size on a GPU, and their memory.

`run` makes base models of random numbers where they are not there yet, and trains on them in one
case after another, each in a process of its own, by the engine that `trainer train` uses. What each
case took goes to a JSON file, beside what was foretold of it and what it must reach. A case that
fails is recorded, and the rest goes on. `plan` writes such a file without a GPU. Options:
bench_gpu.py run --help. See docs/gpu.md and docs/benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import bench_prepare
import click
import torch
from count_step import counted, rounded
from gpu_cases import CASES, FAL_STEPS, SMALL, Case
from gpu_measures import ceilings, machine, measure
from gpu_rows import UNMEASURED, commit, line, row, settings_of, today, unknown_options, write
from make_random_models import MADE, TRUE_SIZES, describe, make_base_model
from step_meter import TIMED_STEPS, Meter

from trainer import base_model
from trainer.config import TrainingConfig
from trainer.errors import TrainerError
from trainer.fitting import fitted
from trainer.machine import precision_of
from trainer.presets import load_preset
from trainer.resolve import Layer, resolve

# As many as a step of the largest case sees, and as many of its class.
PHOTOS = 12
MEGAPIXELS = 1.6
# Lines of what a crashed process said last.
LAST_WORDS = 5
# Options that change how a step is run, not what it computes.
MANNER = frozenset({"cuda_graph", "compile_blocks", "channels_last", "attention", "tf32"})


def configuration(
    case: Case, model: Path, photos: Path, steps: int, *, small: bool = False
) -> TrainingConfig:
    """What `train` would make of a case's preset and options."""
    given = {
        "model_url": str(model),
        "images_data_url": str(photos),
        "mixed_precision": "bf16",
        "max_train_steps": steps,
        "tensorboard": False,
        **case.leaves,
        **(SMALL if small else {}),
    }
    if given.get("with_prior_preservation"):
        given["class_images_url"] = str(photos)
    layers = [] if case.preset is None else [load_preset(case.preset)]
    return resolve([*layers, Layer("bench_gpu", given, explicit=True)])


def counts_of(config: TrainingConfig) -> dict[str, Any]:
    """What a step computes, reads and keeps, without taking one.

    Raises:
        TrainerError: it cannot be trained so.
    """
    base = base_model.locate(config.model)
    config = fitted(config, base)
    for field in ("resolution_width", "resolution_height"):
        if config.leaf(field) is None:
            config = config.with_leaf(field, base.native_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"counted": rounded(counted(config, base, precision_of(config), device))}


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


@dataclass(frozen=True)
class Bench:
    """How cases are measured.

    Args:
        models: folder with a base model of each family.
        place: a folder of its own, with the photographs.
        steps: that are timed.
        limit: seconds that a process may take.
        small: whether these are small models.
        whole: steps of whole trainings; None: steps alone.
    """

    models: Path
    place: Path
    steps: int
    limit: float
    small: bool
    whole: int | None

    def answer(self, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """What was counted and measured of a case, each in a new process, or how it failed.

        Args:
            known: its earlier row.
        """
        case = CASES[name]
        told: dict[str, Any] = {
            "settings": settings_of(case),
            "date": today(),
            "commit": commit(),
        }
        if unknown := unknown_options(case):
            return told | unknown
        is_same = known.get("settings") == told["settings"]
        earlier = {n: value for n, value in known.items() if is_same and n != "message"}
        counts = earlier if "counted" in earlier else self.apart("count", name)
        told["counted"] = counts.get("counted")
        if self.whole is not None:
            return earlier | told | self._whole(name)
        kept = {n: earlier[n] for n in ("whole", "whole_seconds") if n in earlier}
        return told | kept | self.apart("steps", name)

    def _whole(self, name: str) -> dict[str, Any]:
        """A whole training, timed from the start of its process to the end of it."""
        started = time.perf_counter()
        told = self.apart("whole", name)
        seconds = time.perf_counter() - started
        if told["status"] != "done" or not torch.cuda.is_available():
            return told
        figures = {"whole_seconds": seconds, "peak_gib": told["peak_gib"]}
        return {"status": "done", **figures, "whole": {**told, "steps_taken": self.whole}}

    def apart(self, mode: str, name: str) -> dict[str, Any]:
        """What a process of its own says, which writes into the folder."""
        answer, run_folder = self.place / "answer.json", self.place / "run"
        model = self.models / CASES[name].family
        steps = self.steps if self.whole is None else self.whole
        words = [mode, name, str(model), str(self.place), str(steps), *["--small"] * self.small]
        told: dict[str, Any] = apart(
            [sys.executable, str(Path(__file__).resolve()), "measure", *words],
            answer,
            limit=self.limit,
            HF_HUB_OFFLINE="1",
            # Neither step times nor prepared pictures are left to the user's own trainings.
            XDG_CACHE_HOME=str(self.place / "cache" / mode),
            # Kernels inside of a captured graph are seen only so.
            TEARDOWN_CUPTI="0",
        )
        answer.unlink(missing_ok=True)
        shutil.rmtree(run_folder, ignore_errors=True)
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        return told


def chosen(patterns: str) -> list[str]:
    """The cases that any of some patterns, with commas between, means."""
    wanted = patterns.split(",")
    if lost := [each for each in wanted if not any(fnmatch(name, each) for name in CASES)]:
        raise click.UsageError(f"no case {', '.join(lost)}; there are {', '.join(CASES)}")
    return [name for name in CASES if any(fnmatch(name, each) for each in wanted)]


def begun(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The file so far; one that was only planned becomes this machine's."""
    told = {**facts, "cases": {}}
    if not out.exists():
        return told
    earlier = json.loads(out.read_text())
    told["cases"] = earlier["cases"]
    if earlier["machine"]["device"] == UNMEASURED:
        return told
    if any(earlier[name] != facts[name] for name in ("machine", "small")):
        raise click.UsageError(f"{out} is of another machine or of other models; give another file")
    return {**earlier, "ceilings": facts["ceilings"]}


def make_missing(folder: Path, families: Sequence[str], *, small: bool, t5_layers: int) -> None:
    """Makes those base models that are not in a folder yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for family in families:
        place = folder / family
        if (place / MADE).exists():
            continue
        # What was begun and not ended.
        shutil.rmtree(place, ignore_errors=True)
        make_base_model(family, place, small=small, t5_layers=t5_layers, device=device)
        print(f"{place}: {json.loads((place / MADE).read_text())['parameters']}", flush=True)


@click.group(help=__doc__)
def main() -> None:
    """Makes base models, measures trainings on them, or says what is foretold."""


SMALL_OPTION = click.option(
    "--small", is_flag=True, help="Models of a few megabytes, to try the benchmark itself."
)
CASES_OPTION = click.option("--cases", default="*", help="Which: patterns with commas between.")
T5_OPTION = click.option(
    "--t5-layers",
    default=2,
    help="Of T5, whose true number is 24; it takes no part in steps, and 0.4 GB of disk a layer.",
)


@main.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--families", default=",".join(TRUE_SIZES), help="Which, with commas between.")
@SMALL_OPTION
@T5_OPTION
def make(folder: Path, families: str, small: bool, t5_layers: int) -> None:
    """Writes base models into FOLDER where they are not there yet: 2, 7 and 25 GB."""
    make_missing(folder, families.split(","), small=small, t5_layers=t5_layers)


@main.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON; added to.")
@CASES_OPTION
def plan(out: Path, cases: str) -> None:
    """Counts cases and writes what is foretold of them; needs no GPU, and some seconds for each."""
    told = begun(out, {"machine": {"device": UNMEASURED}, "ceilings": {}, "small": False})
    known: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in TRUE_SIZES:
            describe(family, Path(folder) / family, small=False, t5_layers=24)
        for name in chosen(cases):
            counts = _planned(CASES[name], Path(folder), known)
            made = {"settings": settings_of(CASES[name]), "date": today(), "commit": commit()}
            told["cases"][name] = row(CASES[name], made | counts, UNMEASURED)
            print(line(name, told["cases"][name]), flush=True)
            write(out, told)


def _planned(case: Case, models: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The counts of a case, or why there are none; cases that compute the same have the same."""
    if unknown := unknown_options(case):
        return unknown
    same = {name: value for name, value in settings_of(case).items() if name not in MANNER}
    key = json.dumps(same, sort_keys=True)
    if key not in known:
        try:
            config = configuration(case, models / case.family, models / "photos", 1)
            known[key] = {"status": UNMEASURED, **counts_of(config)}
        except TrainerError as error:
            known[key] = {"status": error.kind, "message": error.message}
    return dict(known[key])


@main.command(context_settings={"show_default": True})
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON; added to.")
@click.option(
    "--models",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of base models; those that are missing are made: 2, 7 and 25 GB.",
)
@CASES_OPTION
@SMALL_OPTION
@T5_OPTION
@click.option("--steps", default=TIMED_STEPS, type=click.IntRange(min=2), help="Timed, of each.")
@click.option("--limit", default=300.0, help="Seconds that a process may take.")
@click.option(
    "--whole",
    is_flag=False,
    flag_value=FAL_STEPS,
    type=int,
    help=f"Whole trainings of so many steps, {FAL_STEPS} by itself, from start to verified files.",
)
def run(*, out: Path, models: Path, cases: str, t5_layers: int, **how: Any) -> None:
    """Measures cases one by one; those in the file stay there."""
    names, small = chosen(cases), how["small"]
    if not (small or torch.cuda.is_available()):
        message = "no GPU is here: give --small to try the benchmark, or use `plan`"
        raise click.UsageError(message)
    families = list(dict.fromkeys(CASES[name].family for name in names))
    make_missing(models, families, small=small, t5_layers=t5_layers)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(models, Path(folder), **how)
        told = begun(out, {**bench.apart("machine", names[0]), "small": small})
        bench_prepare.make_photographs(
            bench.place / "photos", count=PHOTOS, megapixels=MEGAPIXELS, faces=False
        )
        for name in names:
            answer = bench.answer(name, told["cases"].get(name, {}))
            told["cases"][name] = row(CASES[name], answer, told["ceilings"]["bf16_tflops"])
            print(line(name, told["cases"][name]), flush=True)
            # After each case: whatever ends the next one, this one is there.
            write(out, told)


@main.command(name="measure", hidden=True)
@click.argument("mode", type=click.Choice(["machine", "count", "steps", "whole"]))
@click.argument("name", type=click.Choice(list(CASES)))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("place", type=click.Path(path_type=Path))
@click.argument("steps", type=int)
@SMALL_OPTION
def measure_alone(mode: str, name: str, model: Path, place: Path, steps: int, small: bool) -> None:
    """What `run` starts for each case."""
    try:
        told = _measured(mode, CASES[name], model, place, steps, small=small)
    except TrainerError as error:
        told = {"status": error.kind, "message": error.message}
    (place / "answer.json").write_text(json.dumps(told))


def _measured(
    mode: str, case: Case, model: Path, place: Path, steps: int, *, small: bool
) -> dict[str, Any]:
    if mode == "machine":
        return {"machine": machine(), "ceilings": ceilings()}
    meter = Meter(steps) if mode == "steps" else None
    length = steps if meter is None else meter.steps
    config = configuration(case, model, place / "photos", length, small=small)
    if mode == "count":
        return counts_of(config)
    told = {"status": "done", **measure(config, place / "run", meter)}
    # Nothing that a processor takes says anything of a GPU.
    return told if torch.cuda.is_available() else {"status": "done", "last_loss": told["last_loss"]}


if __name__ == "__main__":
    main()
