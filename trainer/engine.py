"""One training from a resolved configuration to verified files, as a stream of events.

With `training` and `results` the only composer: they join the base model, data, objective,
adapter, optimizer, checkpoints and exporters, and name no family. Whoever iterates decides what
is shown and logged; stopping is asked for by a function, so no callbacks are needed.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from trainer import base_model, checkpoint, frozen, optim, results
from trainer.base_model import BaseModel, Precision
from trainer.concepts import joined, make_classes, prepare_concepts
from trainer.config import Note, RunConfig, TrainingConfig
from trainer.config_files import write_config
from trainer.data.buckets import bucket_table
from trainer.data.dataset import Dataset
from trainer.data.plan import Plan, Portion
from trainer.data.prepared import Example
from trainer.durable import write_text
from trainer.encoding import (
    Encodings,
    Text,
    common_identifiers,
    cut_captions,
    encode_pictures,
    tokenizer_of,
)
from trainer.errors import InputError, Interrupted, OutOfMemoryError
from trainer.events import Event, NoteEvent, PhaseEvent, RunEvent, StepEvent
from trainer.families.base import Family, token_encoders
from trainer.job import RunFolder
from trainer.machine import (
    accelerator_of,
    completed,
    device_name,
    precision_of,
    refuse_updates_in_backward,
)
from trainer.measurements import measurement_key, record_measurement
from trainer.remedies import remedies
from trainer.schedule import Schedule
from trainer.sources.captions import listed
from trainer.stages import Value, retold
from trainer.tokens import TokenNames, pool_at_end_of_text, refuse_taken, token_names
from trainer.trainables import build as trainables_of
from trainer.training import Training, identity

Stop = Callable[[], bool]

# Steps that still pay for allocations and caches: not counted when the usual time is taken.
_WARM_UP_STEPS = 3


def run(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    """Trains, or goes on training, and leaves verified files in the run folder.

    Args:
        config: the resolved configuration.
        folder: the run folder; a checkpoint of the same configuration in it is gone on from.
        stop: asked after every event; true ends the run, after steps with a checkpoint.

    Raises:
        TrainerError: of the kind that tells what went wrong.
    """
    try:
        yield from _run(config, folder, stop)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ", maxsplit=1)[0]
        raise OutOfMemoryError(reason, remedies(config)) from error


def _run(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    composing = compose(config, folder)
    composed = yield from _interruptible(composing, stop, "stopped before the first step")
    training = composed.training
    yield from training.resume(folder)
    if training.accelerator.is_main_process:
        write_text(folder.config, write_config(composed.config))
    yield _run_event(composed)
    yield from _timed(training.steps(folder, stop), composed)
    # The others would wait for files and readers longer than their communication allows.
    is_main_process = training.accelerator.is_main_process
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()
    if is_main_process:
        delivery = results.deliver(
            composed.config, composed.base, composed.precision, training, folder
        )
        yield from _interruptible(
            delivery, stop, "stopped before all files were written and verified"
        )


@dataclass(frozen=True)
class Composition:
    """A training before its first step, with what it was made of.

    Args:
        config: with everything that the checkpoint and the machine decided.
        base: the base model as it was found.
        precision: the number formats it was loaded in.
        training: ready to go.
    """

    config: TrainingConfig
    base: BaseModel
    precision: Precision
    training: Training


def compose(config: TrainingConfig, folder: RunFolder) -> Generator[Event, None, Composition]:
    """Everything up to the first step: pictures, base model, encodings, adapter, optimizer."""
    accelerator = accelerator_of(config.run)
    base = base_model.locate(config.model, vae_is_explicit=config.is_explicit("vae_url"))
    config = completed(config, base)
    refuse_updates_in_backward(config, accelerator)
    _refuse_early(config, base)
    checkpoint.refuse_other(folder.checkpoints, identity(config, accelerator))
    yield from map(_as_event, config.resolved.notes)
    if accelerator.is_main_process:
        folder.create()
    notes: list[Note] = []
    preparing = prepare_concepts(config, folder, accelerator)
    instances, classes = yield from _noted(preparing, notes)
    names = token_names(config.token)
    given, portions = joined(config.subjects(), instances, classes)
    notes += [] if names is None else _notes_on_captions(names, given)
    plan = _plan(config.run, accelerator, portions, given)
    total_steps = plan.total_steps(config.run.max_train_steps, config.run.num_train_epochs)
    schedule = Schedule.of(config.token, config.adapter, total_steps)
    family, contents = _loaded(config, base, accelerator.device, names)
    # Quantised, a base model makes other class pictures.
    maker = f"{contents} {config.model.quantization}"
    classes |= yield from make_classes(config, folder, accelerator, family, maker)
    examples, portions = joined(config.subjects(), instances, classes)
    plan = replace(plan, portions=portions, sizes=tuple(e.target for e in examples))
    dataset = Dataset(examples, plan, config.data, with_pixels=not config.data.cache_latents)
    trainables = trainables_of(config, family, names)
    notes += [*_notes_on_views(dataset), *trainables.notes]
    if names is not None and config.token.ti_pooling == "eos":
        notes += _pool_at_end(family, names)
    text = Text(
        family,
        dataset.all_captions(),
        names,
        accelerator.device,
        # Weights of one format need none, and some of T5's must not be narrowed to fp16.
        autocast=accelerator.autocast if config.adapter.train_text_encoder else nullcontext,
    )
    yield from cut_captions(family, dataset.all_captions(), names, config.data.instance_prompt)
    if names is None:
        yield from common_identifiers(family, [c.token for c in config.subjects() if c.token])
    if not schedule.text_learns_at(0):
        yield from text.keep()
    pictures = None
    if config.data.cache_latents:
        pictures = yield from encode_pictures(family, dataset, accelerator.device)
    training = Training(
        config,
        family,
        accelerator,
        dataset,
        trainables=trainables,
        schedule=schedule,
        encodings=Encodings(text, pictures),
        base_contents=contents,
    )
    notes += training.notes
    yield from map(_as_event, notes)
    return Composition(config.with_notes(*notes), base, precision_of(config), training)


def _loaded(
    config: TrainingConfig, base: BaseModel, device: torch.device, names: TokenNames | None
) -> tuple[Family, str]:
    """The base model as it is trained, and the digest of what it was made of.

    Args:
        device: where weights are quantised.
        names: of the new tokens, if any are to be learnt.

    Raises:
        InputError: it cannot be read, or knows a new token already.
    """
    family = base_model.load(base, precision_of(config))
    contents = base_model.contents_digest(family)
    for text_encoder in token_encoders(family) if names else ():
        assert names is not None
        refuse_taken(names, tokenizer_of(family, text_encoder), component=text_encoder)
    frozen.freeze(
        family.denoiser,
        quantization=config.model.quantization,
        offload_blocks=config.run.offload_blocks,
        device=device,
    )
    return family, contents


def _noted(
    stage: Generator[Event, None, Value], notes: list[Note]
) -> Generator[Event, None, Value]:
    """A stage whose notes on options that do not act as given go into the configuration."""

    def tell(event: Event) -> Iterator[Event]:
        if isinstance(event, NoteEvent) and event.note in ("yielded", "ignored"):
            kind: Any = event.note
            notes.append(Note(kind=kind, field=event.field, message=event.message))
        yield event

    return retold(stage, tell)


def _plan(
    run: RunConfig,
    accelerator: Accelerator,
    portions: tuple[Portion, ...],
    examples: Sequence[Example],
) -> Plan:
    return Plan(
        portions=portions,
        batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=run.seed,
        sizes=tuple(example.target for example in examples),
    )


def _refuse_early(config: TrainingConfig, base: BaseModel) -> None:
    """What would only fail in the first step, found before any weights are read."""
    base_model.objective_of(base, config.loss).check_maximum(config.loss.max_timestep_trained)
    optim.refuse_unavailable(config.optim)
    denoiser = base_model.skeleton(base, base.family.denoiser_name)
    frozen.refuse_unavailable(config.model.quantization)
    frozen.refuse_too_many(denoiser, config.run.offload_blocks)


def _notes_on_captions(names: TokenNames, examples: Sequence[Example]) -> list[Note]:
    """Pictures that teach new tokens nothing, and class pictures that teach them the class.

    Raises:
        InputError: no picture teaches them anything.
    """
    identifiers = " or ".join(f"`{name}`" for name in names.identifiers)
    # Each picture once, at whatever sizes it is trained.
    examples = [example for example in examples if example.scale == 0]
    own = [e for e in examples if not e.is_class]
    without = [e.name for e in own if not names.occurs_in(e.caption)]
    if len(without) == len(own):
        raise InputError.of(
            "token_abstraction",
            f"no caption has {identifiers}, so the new tokens would learn nothing",
            "write it into the captions or the instance_prompt, give the word that stands there, "
            "or set `train_text_encoder_ti: false`",
        )
    of_class = [e.name for e in examples if e.is_class and names.occurs_in(e.caption)]
    remarks = {
        f"pictures have captions without {identifiers} and teach the new tokens nothing": without,
        f"class pictures have captions with {identifiers}, which then learns the class": of_class,
    }
    return [
        Note(
            kind="warning",
            field="token_abstraction",
            message=f"{len(found)} {remark}: {listed(found)}",
        )
        for remark, found in remarks.items()
        if found
    ]


def _notes_on_views(dataset: Dataset) -> list[Note]:
    """Pictures of which the masks leave nothing to see, and offsets without room.

    Raises:
        InputError: nothing is left of any picture.
    """
    unseen = dataset.unseen()
    if len(unseen) == sum(not example.is_class for example in dataset.examples):
        raise InputError.of(
            "images_data_url",
            "the masks keep nothing of what is seen of any picture",
            "paint white what lies in the middle window, or set `center_crop: false`",
        )
    notes = [
        Note(kind="ignored", field=option, message="no picture is longer than its window there")
        for option in dataset.offsets_without_room()
    ]
    if dataset.plan.filled:
        message = (
            f"{dataset.plan.filled} places an epoch are filled with pictures of the same size, "
            "which then count more; to fill none, set `batch_size: 1` with "
            "`gradient_accumulation_steps`"
        )
        field = "enable_bucket" if dataset.data.enable_bucket else "priority"
        notes.append(Note(kind="warning", field=field, message=message))
    if unseen:
        which = listed(list(dict.fromkeys(unseen)))
        message = f"the masks keep nothing of what is seen of {which}: they teach nothing"
        notes.append(Note(kind="warning", field="images_data_url", message=message))
    return notes


def _pool_at_end(family: Family, names: TokenNames) -> list[Note]:
    """Pools at the end of the text from now on; a note where that changes no conditioning."""
    caption = "".join(names.all_tokens())
    with torch.no_grad():
        before = family.encode_text([caption])
        for name in token_encoders(family):
            pool_at_end_of_text(family.pipeline.components[name], tokenizer_of(family, name))
        after = family.encode_text([caption])
    if any(not torch.equal(before[name], after[name]) for name in before):
        return []
    message = "this base model takes nothing from a pooled vector that new tokens could move"
    return [Note(kind="ignored", field="ti_pooling", message=message)]


def _as_event(note: Note) -> NoteEvent:
    return NoteEvent(note.kind, note.field, note.message)


def _timed(steps: Iterator[Event], composed: Composition) -> Iterator[Event]:
    """The steps, whose usual time is remembered for estimates of trainings like this one.

    A run that goes on from a checkpoint has not seen all phases, and is not remembered.
    """
    is_whole = composed.training.step == 0
    phases: list[list[float]] = [[]]
    for event in steps:
        if isinstance(event, PhaseEvent):
            phases.append([])
        if isinstance(event, StepEvent):
            phases[-1].append(event.seconds)
        yield event
    accelerator = composed.training.accelerator
    usual = _usual_seconds(phases)
    if usual is not None and is_whole and accelerator.is_main_process:
        key = measurement_key(
            composed.config,
            family=composed.base.family_name,
            device=device_name(),
            num_processes=accelerator.num_processes,
        )
        record_measurement(key, usual)


def _usual_seconds(phases: Sequence[Sequence[float]]) -> float | None:
    """The mean over the phases of each one's usual time of a step, weighted by their steps."""
    settled = [phase[_WARM_UP_STEPS:] for phase in phases if len(phase) > _WARM_UP_STEPS]
    if not settled:
        return None
    steps = sum(map(len, settled))
    return sum(statistics.median(phase) * len(phase) for phase in settled) / steps


def _run_event(composed: Composition) -> RunEvent:
    config, training = composed.config, composed.training
    scales = [example.scale for example in training.dataset.examples if not example.is_class]
    return RunEvent(
        start_step=training.step,
        total_steps=training.total_steps,
        steps_per_epoch=training.dataset.plan.steps_per_epoch,
        num_examples=training.dataset.plan.num_examples,
        details={
            "family": composed.base.family_name,
            "model": config.model.model_url,
            "method": config.adapter.lora_type if config.adapter.use_lora else "all weights",
            "trained_parameters": training.num_trained_parameters,
            "resolution": ", ".join(_resolutions(training.dataset)),
            "device": str(training.accelerator.device),
            "processes": training.accelerator.num_processes,
            "precision": str(composed.precision.frozen).removeprefix("torch."),
        },
        num_pictures=scales.count(0),
        num_sizes=len(set(scales)),
    )


def _resolutions(dataset: Dataset) -> tuple[str, ...]:
    """The trained size, or each of several with its pictures."""
    counts = Counter(example.target for example in dataset.examples)
    if len(counts) == 1:
        ((height, width),) = counts
        return (f"{width}x{height}",)
    return bucket_table(counts)


def _interruptible(
    stage: Generator[Event, None, Value], stop: Stop, message: str
) -> Generator[Event, None, Value]:
    """A stage without steps that ends early when asked to: every step done is in a checkpoint."""

    def tell(event: Event) -> Iterator[Event]:
        yield event
        if stop():
            raise Interrupted(message, "run the same command to go on")

    return retold(stage, tell)
