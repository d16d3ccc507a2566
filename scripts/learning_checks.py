"""What each option must teach in the small world, as figures with bounds.

Bounds were fixed before anything was trained, but for that on the subject's colours; hardly any
picture of the base model's passes for the subject. Every figure is of several seeds, of training
and pictures alike; of one seed, ours is not compared with the loop with faults.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import faulty_loop
import torch
from diffusers import StableDiffusionXLPipeline
from faulty_loop import Course
from learning import (
    CLASS,
    FLUX,
    FLUX_MASKED,
    FLUX_WORDS,
    PLACES,
    SDXL,
    STYLE,
    World,
    measure,
    save,
    share_in_style,
    untold,
    write_photos,
    write_style,
)
from make_world import sampled, sheet
from rich.console import Console
from rich.table import Table
from world_pictures import BACKGROUNDS, COLOURS

from trainer.job import RunFolder

SAMPLES = Path(__file__).parent.parent / "tests" / "samples"
# Who makes pictures by each family's base model, in a folder for photographs and runs.
WORLDS: Mapping[str, Callable[[Path], World]] = {
    "sdxl": lambda work: World(SAMPLES / "world", work, SDXL),
    "flux": lambda work: World(
        SAMPLES / "flux_world",
        work,
        FLUX,
        draws_class=False,
        masked=FLUX_MASKED,
        words=FLUX_WORDS,
        few=8,
    ),
}

PRIOR: Mapping[str, Any] = {"with_prior_preservation": True, "class_prompt": f"a {CLASS}"}
MADE_IN_TRAINING: Mapping[str, Any] = {
    "num_class_images": 40,
    "class_inference_steps": 20,
    "class_guidance_scale": 3.0,
}
# Given class pictures show more than those of a prompt, and hold the subject back more.
GIVEN: Mapping[str, Any] = {"prior_loss_weight": 0.5}
PIVOTAL: Mapping[str, Any] = {"train_text_encoder_ti": True}
WHOLE: Mapping[str, Any] = {"use_lora": False, "learning_rate": 1e-4}
# Of class pictures that are given.
CLASS_SEED = 77
INKS_AND_GROUNDS = tuple(product(COLOURS, BACKGROUNDS))
# The one ground of the pictures that masks are tried on.
GROUND = "pink"

Figures = Mapping[str, float]
# The values of figures by seed.
Spreads = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Bound:
    """What a figure must be.

    Args:
        least: at least this.
        most: at most this.
    """

    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value keeps it."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


@dataclass(frozen=True)
class Bench:
    """What a check works with.

    Args:
        world: the base model.
        seed: of trainings and pictures.
        count: of pictures of each kind.
        steps: of a training.
    """

    world: World
    seed: int
    count: int
    steps: int

    def train(
        self,
        name: str,
        photos: Path,
        *leaves: Mapping[str, Any],
        stopped_after: int | None = None,
    ) -> Path:
        """Trains with these leaves, later ones over earlier ones."""
        joined: dict[str, Any] = {"seed": self.seed, "max_train_steps": self.steps}
        for layer in leaves:
            joined |= layer
        place = f"{name}-{self.seed}"
        return self.world.train(place, photos, joined, stopped_after=stopped_after)

    @property
    def photos(self) -> Path:
        """Photographs of the subject, with captions that tell of their grounds."""
        return write_photos(self.world.work / "photos")

    @property
    def prior(self) -> Mapping[str, Any]:
        """Prior preservation by pictures of the base model.

        They are made in training where it draws the class by its name alone; else they are made
        before, of captions that it knows, and given.
        """
        if self.world.draws_class:
            return {**PRIOR, **MADE_IN_TRAINING}
        folder = self.world.work / "class"
        told = [f"a {ink} {CLASS} on a {ground} background" for ink, ground in INKS_AND_GROUNDS] * 2
        pictures = self.world.pictures(None, told, seed=CLASS_SEED)
        for number, (picture, caption) in enumerate(zip(pictures, told, strict=True)):
            save(folder / f"{number}.png", picture)
            (folder / f"{number}.txt").write_text(caption)
        return {**PRIOR, **GIVEN, "class_images_url": str(folder)}

    def shown(self, run: Path | None, **options: Any) -> Any:
        """What pictures with a run show; kept to be looked at."""
        learnt = measure(self.world, run, count=self.count, seed=1000 * self.seed, **options)
        name = "base" if run is None else run.name
        if strength := options.get("strength"):
            name = f"{name}-at-{strength:g}"
        sheet(learnt.pictures).save(self.world.work / f"{name}.png")
        return learnt


def of_base(bench: Bench) -> Figures:
    """Of the base model's pictures, hardly any shows the subject, and its class is as asked."""
    base = bench.shown(None)
    style = share_in_style(bench.world, None, count=bench.count, seed=1000 * bench.seed)
    return {
        "the base model: pictures that pass for the subject": base.likeness,
        "the base model: pictures that pass for the style": style,
        "the base model: plain figures as asked": base.kept,
    }


def of_prior(bench: Bench) -> Figures:
    """A subject is learnt on any ground; with prior preservation its class stays."""
    run = bench.train("prior", bench.photos, bench.prior)
    without = bench.shown(bench.train("lora", bench.photos))
    learnt = bench.shown(run)
    half = bench.shown(run, strength=0.5)
    return {
        "LoRA with prior: likeness": learnt.likeness,
        "LoRA with prior: background as asked": learnt.background,
        "LoRA with prior: plain figures as asked": learnt.kept,
        "LoRA without prior: likeness": without.likeness,
        "LoRA without prior: plain figures as asked": without.kept,
        "prior preservation: gain of plain figures": learnt.kept - without.kept,
        "strength: mean likeness at 1 above that at 0.5": (
            learnt.mean_likeness - half.mean_likeness
        ),
    }


def of_masks(bench: Bench) -> Figures:
    """The ground of all pictures is learnt without masks, and not with them."""
    places = tuple((GROUND, position) for _, position in PLACES)
    plain = write_photos(bench.world.work / "ground", places, told=False)
    masked = write_photos(bench.world.work / "masked", places, told=False, masked=True)
    runs = {
        "without": bench.train("unmasked", plain, bench.world.masked),
        "with": bench.train("masked", masked, bench.world.masked),
    }
    seen = {
        name: untold(bench.world, run, GROUND, count=bench.count, seed=1000 * bench.seed)
        for name, run in {**runs, "base": None}.items()
    }
    return {
        "masks: ground learnt without": seen["without"][0],
        "masks: ground learnt with": seen["with"][0],
        "masks: ground of the base model's pictures": seen["base"][0],
        "masks: mean likeness without": seen["without"][1],
        "masks: mean likeness with": seen["with"][1],
    }


def of_tokens(bench: Bench) -> Figures:
    """New words learn the subject faster than an old one, and by themselves."""
    few = {"max_train_steps": bench.steps // bench.world.few}
    plain = bench.shown(bench.train("plain", bench.photos, few))
    pivotal = bench.shown(bench.train("pivotal", bench.photos, few, PIVOTAL))
    alone = {"train_text_encoder_ti_frac": 1.0, "learning_rate": 1e-9}
    words = bench.shown(bench.train("words", bench.photos, PIVOTAL, alone, bench.world.words))
    base = bench.shown(None)
    return {
        "few steps: mean likeness by a plain trigger": plain.mean_likeness,
        "few steps: mean likeness by pivotal tuning": pivotal.mean_likeness,
        "pivotal tuning: gain over a plain trigger": pivotal.mean_likeness - plain.mean_likeness,
        "new words alone: gain of mean likeness over the base model": (
            words.mean_likeness - base.mean_likeness
        ),
        "new words alone: gain of the subject's colours": words.coloured - base.coloured,
    }


def of_forms(bench: Bench) -> Figures:
    """Every form of an adapter learns the subject."""
    forms: Mapping[str, Mapping[str, Any]] = {
        "DoRA": {"use_dora": True},
        "LoKr": {"lora_type": "lokr", "learning_rate": 5e-3},
        "LoHa": {"lora_type": "loha", "learning_rate": 2e-3},
    }
    return {
        f"{form}: likeness": bench.shown(bench.train(form, bench.photos, leaves)).likeness
        for form, leaves in forms.items()
    }


def of_all_weights(bench: Bench) -> Figures:
    """All weights learn, and a LoRA taken from their change shows what they learnt."""
    figures = {}
    for rank in (16, 32):
        name = f"whole{rank}"
        run = bench.train(name, bench.photos, WHOLE, {"extract_rank": rank})
        whole = bench.shown(run)
        lora = _only_lora(run)
        figures["all weights: likeness"] = whole.likeness
        extracted = bench.shown(lora)
        figures[f"extraction at rank {rank}: share of likeness kept"] = (
            extracted.mean_likeness / whole.mean_likeness
        )
    return figures


def of_style(bench: Bench) -> Figures:
    """A style is learnt from pictures of other things."""
    photos = write_style(bench.world.work / "style")
    leaves = {"instance_prompt": f"a picture {STYLE}", "caption_mode": "style"}
    run = bench.train("style", photos, leaves)
    share = share_in_style(bench.world, run, count=bench.count, seed=1000 * bench.seed)
    return {"style: pictures that show it": share}


def of_resume(bench: Bench) -> Figures:
    """A training that is stopped in the middle and goes on ends in the same bytes."""
    few = {"max_train_steps": bench.steps // 4}
    kinds = (bench.prior, PIVOTAL, few)
    unbroken = bench.train("unbroken", bench.photos, *kinds)
    broken = bench.train("broken", bench.photos, *kinds, stopped_after=bench.steps // 8)
    files = sorted(RunFolder(unbroken).outputs.rglob("*.safetensors"))
    assert len(files) > 2
    same = [
        file.read_bytes() == (broken / file.relative_to(unbroken)).read_bytes() for file in files
    ]
    return {"stopped in the middle: files of the same bytes": sum(same) / len(same)}


def of_faults(bench: Bench) -> Figures:
    """What faults of reference scripts cost, all of them in one plain loop beside ours."""
    places = tuple((GROUND, position) for _, position in PLACES)
    masked = write_photos(bench.world.work / "masked", places, told=False, masked=True)
    ours = bench.shown(bench.train("pivotal", bench.photos, PIVOTAL))
    ground, likeness = untold(
        bench.world,
        bench.train("masked", masked),
        GROUND,
        count=bench.count,
        seed=1000 * bench.seed,
    )
    theirs = _by_loop(bench, bench.photos, token_rate=SDXL["text_encoder_lr"])
    with_tokens = measure(theirs, None, count=bench.count, seed=1000 * bench.seed)
    sheet(with_tokens.pictures).save(bench.world.work / f"faults-{bench.seed}.png")
    their_ground, their_likeness = untold(
        _by_loop(bench, masked), None, GROUND, count=bench.count, seed=1000 * bench.seed
    )
    # As often as without any training is not learnt.
    usual, _ = untold(bench.world, None, GROUND, count=bench.count, seed=1000 * bench.seed)
    return {
        "ours: mean likeness": ours.mean_likeness,
        "with faults: mean likeness": with_tokens.mean_likeness,
        "ours: background as asked": ours.background,
        "with faults: background as asked": with_tokens.background,
        "ours: mean likeness by masked pictures": likeness,
        "with faults: mean likeness by masked pictures": their_likeness,
        "ours: ground of masked pictures not learnt": 1 - max(0.0, ground - usual),
        "with faults: ground of masked pictures not learnt": 1 - max(0.0, their_ground - usual),
    }


def _by_loop(bench: Bench, photos: Path, token_rate: float | None = None) -> LoopWorld:
    course = Course(
        steps=bench.steps,
        learning_rate=SDXL["learning_rate"],
        rank=SDXL["rank"],
        target_modules=SDXL["target_unet_modules"],
        batch_size=SDXL["batch_size"],
        seed=bench.seed,
        token_rate=token_rate,
    )
    return LoopWorld(faulty_loop.train(bench.world.folder, photos, course), token_rate is not None)


@dataclass(frozen=True)
class LoopWorld:
    """Makes pictures with what the loop with faults has learnt.

    Args:
        pipeline: with all of it.
        has_tokens: whether new tokens stand for the identifier.
    """

    pipeline: StableDiffusionXLPipeline
    has_tokens: bool

    def pictures(
        self, run: Path | None, prompts: Sequence[str], *, seed: int, strength: float = 1.0
    ) -> torch.Tensor:
        """As `World.pictures` for the base model of the loop: there is no other run."""
        assert run is None
        assert strength == 1.0
        told = [faulty_loop.named(text) if self.has_tokens else text for text in prompts]
        return sampled(self.pipeline, told, seed=seed)


CHECKS: Mapping[str, Callable[[Bench], Figures]] = {
    "base": of_base,
    "prior": of_prior,
    "masks": of_masks,
    "tokens": of_tokens,
    "forms": of_forms,
    "whole": of_all_weights,
    "style": of_style,
    "resume": of_resume,
    "faults": of_faults,
}
# The loop with faults trains no other family.
OF_SDXL = frozenset({"faults"})
# In continuous integration: one seed, few pictures.
FAST = ("base", "prior")

BOUNDS: Mapping[str, Bound] = {
    "the base model: pictures that pass for the subject": Bound(most=0.01),
    "the base model: pictures that pass for the style": Bound(most=0.01),
    "the base model: plain figures as asked": Bound(least=0.9),
    "LoRA with prior: likeness": Bound(least=0.9),
    "LoRA with prior: background as asked": Bound(least=0.9),
    "LoRA without prior: likeness": Bound(least=0.9),
    "prior preservation: gain of plain figures": Bound(least=0.2),
    "strength: mean likeness at 1 above that at 0.5": Bound(least=0.05),
    "masks: ground learnt without": Bound(least=0.8),
    "masks: ground learnt with": Bound(most=0.5),
    "masks: mean likeness with": Bound(least=0.6),
    "pivotal tuning: gain over a plain trigger": Bound(least=0.0),
    "new words alone: gain of mean likeness over the base model": Bound(least=0.1),
    "new words alone: gain of the subject's colours": Bound(least=0.3),
    "DoRA: likeness": Bound(least=0.9),
    "LoKr: likeness": Bound(least=0.9),
    "LoHa: likeness": Bound(least=0.9),
    "all weights: likeness": Bound(least=0.9),
    "extraction at rank 16: share of likeness kept": Bound(least=0.9),
    "extraction at rank 32: share of likeness kept": Bound(least=0.9),
    "style: pictures that show it": Bound(least=0.9),
    "stopped in the middle: files of the same bytes": Bound(least=1.0),
}


def _only_lora(run: Path) -> Path:
    """A copy of a run that has of its results only the extracted LoRA."""
    copied = Path(shutil.copytree(run, run.with_name(f"{run.name}-lora"), dirs_exist_ok=True))
    folder = RunFolder(copied)
    result = folder.read_result()
    assert result is not None
    kept = tuple(file for file in result.files if file.role == "diffusers_lora")
    folder.write_result(result.model_copy(update={"files": kept}))
    return copied


def run_checks(
    names: Sequence[str], seeds: Sequence[int], *, world: World, count: int, steps: int
) -> Spreads:
    """Every figure of these checks by seed."""
    figures: Spreads = {}
    for seed in seeds:
        bench = Bench(world, seed, count, steps)
        for name in names:
            started = time.perf_counter()
            for figure, value in CHECKS[name](bench).items():
                figures.setdefault(figure, {})[seed] = value
                click.echo(f"seed {seed}  {figure}: {value:.3f}", err=True)
            click.echo(f"  {name}: {time.perf_counter() - started:.0f} s", err=True)
    return figures


def show(figures: Spreads) -> list[str]:
    """Prints every figure with its spread and its bound; names those that miss it."""
    table = Table(title="learning in the small world")
    for heading in ("figure", "mean", "lowest to highest", "bound", ""):
        table.add_column(heading, overflow="fold")
    missed = []
    for figure, by_seed in figures.items():
        values = list(by_seed.values())
        mean, bound = statistics.mean(values), BOUNDS.get(figure)
        holds = bound is None or bound.holds(mean)
        missed += [] if holds else [figure]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        told = "" if bound is None else str(bound)
        verdict = "" if bound is None else "ok" if holds else "MISSED"
        table.add_row(figure, f"{mean:.3f}", spread, told, verdict)
    Console(width=120).print(table)
    return missed


def worse_than_with_faults(figures: Spreads) -> list[str]:
    """Figures in which ours is worse than the loop with faults by more than two deviations."""
    worse = []
    for figure, by_seed in figures.items():
        own, _, what = figure.partition(": ")
        if own != "ours" or len(by_seed) < 2:
            continue
        ours, theirs = list(by_seed.values()), list(figures[f"with faults: {what}"].values())
        spread = max(statistics.stdev(ours), statistics.stdev(theirs))
        if statistics.mean(ours) < statistics.mean(theirs) - 2 * spread:
            worse.append(f"worse than with faults: {what}")
    return worse


def _unmeasured(names: Sequence[str], figures: Spreads) -> list[str]:
    """Figures that have a bound, and that no check gave, where all that have bounds ran."""
    ran_all = set(names) >= CHECKS.keys() - OF_SDXL
    return sorted(BOUNDS.keys() - figures.keys()) if ran_all else []


def kept(path: Path, asked: Mapping[str, Any], figures: Spreads) -> None:
    """Writes figures as JSON, beside those that the file has of other checks and seeds.

    Raises:
        ClickException: the file is of another family, or of other steps or pictures.
    """
    earlier = json.loads(path.read_text()) if path.exists() else {}
    for name, value in asked.items():
        if earlier and earlier[name] != value:
            message = f"{path} has figures with {name} {earlier[name]}, not {value}"
            raise click.ClickException(message)
    joined = earlier.get("figures", {})
    for figure, by_seed in figures.items():
        values = joined.get(figure, {}) | {str(seed): value for seed, value in by_seed.items()}
        joined[figure] = dict(sorted(values.items(), key=lambda pair: int(pair[0])))
    machine = {"processor": platform.machine(), "torch": torch.__version__}
    path.write_text(json.dumps({**asked, **machine, "figures": joined}, indent=2) + "\n")


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--fast", is_flag=True, help="One seed and few checks, as continuous integration.")
@click.option("--seeds", default=3, type=click.IntRange(1), help="How many.")
@click.option("--only", multiple=True, type=click.Choice(tuple(CHECKS)), help="These checks.")
@click.option("--count", default=40, type=click.IntRange(4), help="Pictures of each kind.")
@click.option("--steps", default=800, type=click.IntRange(10, 800), help="Of a training.")
@click.option("--family", default="sdxl", type=click.Choice(tuple(WORLDS)), help="Base model.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that is kept.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file, to write or extend.")
def main(
    fast: bool,
    seeds: int,
    only: Sequence[str],
    count: int,
    steps: int,
    family: str,
    work: Path | None,
    out: Path | None,
) -> None:
    """Runs the checks, and fails where a bound is missed."""
    possible = [name for name in CHECKS if family == "sdxl" or name not in OF_SDXL]
    names = only or (FAST if fast else possible)
    if unknown := set(names) - set(possible):
        raise click.ClickException(f"not measured on {family}: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        place = WORLDS[family](work or Path(temporary))
        place.work.mkdir(parents=True, exist_ok=True)
        numbers = range(1) if fast else range(seeds)
        figures = run_checks(names, numbers, world=place, count=count, steps=steps)
    missed = [
        *show(figures),
        *worse_than_with_faults(figures),
        *_unmeasured(names, figures),
    ]
    if out is not None:
        kept(out, {"family": family, "steps": steps, "pictures": count}, figures)
    if missed:
        raise click.ClickException(f"missed: {'; '.join(missed)}")
