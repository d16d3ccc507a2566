"""What a training will take: steps, memory, time and cost, as far as they can be known.

Steps come from the pictures, memory from a step on tensors without data, time from a
measurement of the same training on this machine. What is not known stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer import base_model, recomputing
from trainer.capacity import device_memory, fits
from trainer.config import Concept, TrainingConfig
from trainer.data.plan import Plan, Portion
from trainer.errors import InputError
from trainer.images.crop import Size
from trainer.inspection import held_out_of, inspect_concepts
from trainer.machine import completed, device_name, precision_of
from trainer.measurements import measured_seconds_per_step, measurement_key
from trainer.memory import Footprint, Forecast
from trainer.remedies import Advice, advise
from trainer.sections.subjects import class_sources


@dataclass(frozen=True)
class Estimate:
    """What a training will take; None stands for unknown.

    Args:
        num_examples: pictures that an epoch shows, each as often as it is repeated, at each of
            its sizes where they are known.
        steps: optimizer steps.
        epochs: passes over the pictures, the last one perhaps in part.
        device: what the figures hold for.
        footprint: memory on that device and trained parameters, of each process.
        advice: what would save memory, where the device has too little.
        seconds: for all steps, without loading, class pictures, encoding, looks and writing.
        hourly: price of this machine per hour, where it was given.
        notes: why something is unknown or left out.
    """

    num_examples: int
    steps: int
    epochs: float
    device: str
    footprint: Footprint | None
    advice: Advice | None
    seconds: float | None
    hourly: float | None
    notes: tuple[str, ...]

    @property
    def cost(self) -> float | None:
        """Price of the steps, in the currency of `hourly`."""
        if self.hourly is None or self.seconds is None:
            return None
        return self.seconds / 3600 * self.hourly

    def as_dict(self) -> dict[str, Any]:
        """The estimate as JSON can hold it; `cost` is there only where a price was given."""
        footprint = self.footprint
        values = {
            "examples": self.num_examples,
            "steps": self.steps,
            "epochs": round(self.epochs, 2),
            "device": self.device,
            "trained_parameters": footprint.trained_parameters if footprint else None,
            "peak_memory_gib": round(footprint.peak_bytes / 2**30, 3) if footprint else None,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }
        if self.advice is not None:
            values["advice"] = self.advice.lines()
            values["saved_gib"] = self.advice.saved_gib()
        if self.hourly is not None:
            values["cost"] = None if self.cost is None else round(self.cost, 4)
        return values | {"notes": list(self.notes)}


def estimate(config: TrainingConfig, *, hourly: float | None = None) -> Estimate:
    """Estimates a training in one process on this machine, without loading any weights.

    Args:
        config: the resolved configuration.
        hourly: price of this machine per hour.

    Raises:
        InputError: the pictures cannot be used.
    """
    notes = _notes_on_class_images(config.subjects())
    given, base, footprint, advice, seconds = config, None, None, None, None
    try:
        base = base_model.locate(config.model, vae_is_explicit=config.is_explicit("vae_url"))
        config = completed(config, base)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        forecast = Forecast(base, device)
        capacity = device_memory(device)
        config = recomputing.decided(config, forecast, capacity, device)
        footprint = forecast.footprint(config, precision_of(config))
        if config.run.gradient_checkpointing and given.run.gradient_checkpointing is None:
            notes.append(f"for want of memory, activations are {recomputing.words(config)}")
        if not fits(footprint.peak_bytes, capacity):
            advice = advise(given, base, capacity=capacity, device=device, forecast=forecast)
    except (InputError, OSError) as error:
        reason = str(error).removeprefix("error[input]: ")
        notes.append(f"memory and time are unknown: {reason}")
    plan = _plan(config)
    steps = plan.total_steps(config.run.max_train_steps, config.run.num_train_epochs)
    # By the base model, every so many steps, and after the last.
    looks = 1 + math.ceil(steps / (config.sample.sample_steps or steps))
    if prompts := config.preview_prompts():
        notes.append(f"{looks * len(prompts)} pictures on the way: their time is left out")
    if base is not None and footprint is not None:
        key = measurement_key(
            config, family=base.family_name, device=device_name(), num_processes=1
        )
        seconds_per_step = measured_seconds_per_step(key)
        if seconds_per_step is None:
            notes.append("time is unknown: no such training was measured on this machine yet")
        else:
            seconds = seconds_per_step * steps
    return Estimate(
        num_examples=plan.num_examples,
        steps=steps,
        epochs=steps / plan.steps_per_epoch,
        device=device_name(),
        footprint=footprint,
        advice=advice,
        seconds=seconds,
        hourly=hourly,
        notes=tuple(notes),
    )


def _plan(config: TrainingConfig) -> Plan:
    """The batches of one process; class pictures change nothing of the steps.

    Raises:
        InputError: the pictures cannot be used.
    """
    portions: list[Portion] = []
    sizes: list[Size | None] = []
    reports = inspect_concepts(config)
    held = held_out_of(config, reports)
    subjects = zip(config.subjects(), reports, strict=True)
    for place, (concept, report) in enumerate(subjects, start=1):
        uses = [
            (target, picture.repeats)
            for picture in report.usable
            if (place, picture.name) not in held
            for target in (picture.target, *picture.smaller)
        ]
        numbers = range(len(sizes), len(sizes) + len(uses))
        repeated = zip(numbers, uses, strict=True)
        instances = tuple(n for n, (_, repeats) in repeated for _ in range(repeats))
        portions.append(Portion(instances=instances, repeats=concept.repeats))
        sizes += [target for target, _ in uses]
    return Plan(
        portions=tuple(portions),
        batch_size=config.run.batch_size,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        num_processes=1,
        process_index=0,
        seed=config.run.seed,
        sizes=tuple(size for size in sizes if size is not None),
    )


def _notes_on_class_images(concepts: Sequence[Concept]) -> list[str]:
    counts: dict[str, int] = {}
    for source in class_sources(concepts):
        if source.url is None:
            # Sources with the same words share their pictures in the cache.
            counts[source.prompt] = max(source.count, counts.get(source.prompt, 0))
    if not counts:
        return []
    count = sum(counts.values())
    return [
        f"{count} class pictures are made first, once for all trainings: their time is left out"
    ]
