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

from trainer import (
    base_model,
    checkpoint,
    class_images,
    contents,
    frozen,
    heap,
    optim,
    pace,
    recomputing,
    results,
)
from trainer.affordable import affordable
from trainer.base_model import BaseModel, Precision
from trainer.concepts import hold_out, joined, make_classes, prepare_concepts
from trainer.config import Note, RunConfig, TrainingConfig
from trainer.config_files import write_config
from trainer.data.buckets import bucket_table
from trainer.data.dataset import Dataset
from trainer.data.plan import Plan, Portion
from trainer.data.prepared import Example
from trainer.determinism import deterministic
from trainer.durable import write_text
from trainer.encoded import shelf_of_captions, shelf_of_pictures
from trainer.encoding import (
    Encodings,
    Text,
    encode_pictures,
    tokenizer_of,
)
from trainer.errors import Interrupted
from trainer.events import Event, NoteEvent, PhaseEvent, RunEvent, StepEvent
from trainer.families.base import Family, token_encoders
from trainer.job import RunFolder
from trainer.looking import looks_of
from trainer.machine import (
    accelerator_of,
    completed,
    device_name,
    precision_of,
    refuse_updates_in_backward,
)
from trainer.measurements import measurement_key, record_measurement
from trainer.out_of_memory import Place, out_of_memory, ran_out_of_memory
from trainer.peaks import telling_peaks
from trainer.previews import EMPTY
from trainer.processes import ALONE, Launched, Processes
from trainer.readahead import read_ahead
from trainer.remarks import notes_on_captions, notes_on_views, notes_on_words, pool_at_end
from trainer.resident import Pictures
from trainer.schedule import Schedule
from trainer.sharding import asked_for, refuse_in_shards
from trainer.spread import Spread
from trainer.stages import Value, retold
from trainer.tokens import TokenNames, refuse_taken, token_names
from trainer.trainables import build as trainables_of
from trainer.training import WARM_UP_STEPS, Training

Stop = Callable[[], bool]


def run(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    """Trains, or goes on training, and leaves verified files in the run folder.

    Args:
        config: the resolved configuration.
        folder: the run folder; a checkpoint of the same configuration in it is gone on from.
        stop: asked after every event; true ends the run, after steps with a checkpoint.

    Raises:
        TrainerError: of the kind that tells what went wrong.
    """
    with Launched(config.run.rank_timeout, folder, stop) as processes:
        for event in _run_here(config, folder, processes.wishing(stop), processes):
            processes.hear(event)
            yield event


def _run_here(
    config: TrainingConfig, folder: RunFolder, stop: Stop, processes: Processes
) -> Iterator[Event]:
    place = Place()
    events = _run(config, folder, stop, processes)
    try:
        with deterministic(config.run.deterministic and torch.cuda.is_available()):
            for event in telling_peaks(events, apart=class_images.STAGE):
                place.hear(event)
                yield event
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        ending = yield from out_of_memory(
            error,
            config,
            where=place.words,
            kept_step=place.kept_step,
            num_processes=processes.count,
        )
        raise ending from error


def _run(
    config: TrainingConfig, folder: RunFolder, stop: Stop, processes: Processes
) -> Iterator[Event]:
    composing = compose(config, folder, processes)
    composed = yield from _interruptible(composing, stop, "stopped before the first step")
    training = composed.training
    yield from training.resume(folder)
    processes.wait()
    if training.accelerator.is_main_process:
        write_text(folder.config, write_config(composed.config))
    yield _run_event(composed)
    with heap.kept(training.accelerator.device.type == "cpu"):
        looks = looks_of(composed.config, training, composed.held_out, folder)
        yield from _timed(training.steps(folder, stop, looks), composed)
    training.put_together()
    processes.wait()
    # Nothing more is computed together; that of a launcher of one process ends here too.
    training.accelerator.end_training()
    if processes.is_main:
        delivery = results.deliver(
            composed.config, composed.base, composed.precision, training, folder
        )
        with processes.writing():
            yield from _interruptible(
                delivery, stop, "stopped before all files were written and verified"
            )
    processes.wait()


@dataclass(frozen=True)
class Composition:
    """A training before its first step, with what it was made of.

    Args:
        config: with everything that the checkpoint and the machine decided.
        base: the base model as it was found.
        precision: the number formats it was loaded in.
        training: ready to go.
        held_out: numbers of the pictures that are kept out of it.
    """

    config: TrainingConfig
    base: BaseModel
    precision: Precision
    training: Training
    held_out: tuple[int, ...] = ()


def compose(
    config: TrainingConfig, folder: RunFolder, processes: Processes = ALONE
) -> Generator[Event, None, Composition]:
    """Everything up to the first step: pictures, base model, encodings, adapter, optimizer."""
    spread = Spread(accelerator_of(config.run), processes, asked_for())
    accelerator = spread.accelerator
    base = base_model.locate(config.model, vae_is_explicit=config.is_explicit("vae_url"))
    config = _settled(config, base, spread)
    began_with = checkpoint.settings_of(folder.checkpoints)
    config, room = affordable(config, base, spread, began_with)
    spread = replace(spread, room=room)
    checkpoint.refuse_other(folder.checkpoints, spread.identity_of(config))
    yield from map(_as_event, config.resolved.notes)
    if accelerator.is_main_process:
        folder.create()
    # While pictures are prepared and encoders work.
    with read_ahead(contents.weights_of(base, base.family.denoiser_name)):
        return (yield from _composed(config, base, folder, spread))


def _composed(
    config: TrainingConfig, base: BaseModel, folder: RunFolder, spread: Spread
) -> Generator[Event, None, Composition]:
    """The training of a settled configuration."""
    accelerator, processes = spread.accelerator, spread.processes
    notes: list[Note] = []
    preparing = prepare_concepts(config, folder, processes)
    instances, classes = yield from _noted(preparing, notes)
    names = token_names(config.token)
    given, portions = joined(config.subjects(), instances, classes)
    keep = {"count": config.sample.validation_images, "seed": config.run.seed}
    portions, held_out = hold_out(portions, given, **keep)
    notes += [] if names is None else notes_on_captions(names, given)
    plan = _plan(config.run, accelerator, portions, given)
    total_steps = plan.total_steps(config.run.max_train_steps, config.run.num_train_epochs)
    schedule = Schedule.of(config.token, config.adapter, total_steps)
    family, held = _loaded(config, base, spread, names)
    # Quantised, a base model makes other class pictures.
    maker = f"{held} {config.model.quantization}"
    classes |= yield from make_classes(config, folder, processes, family, maker, accelerator.device)
    examples, portions = joined(config.subjects(), instances, classes)
    portions, held_out = hold_out(portions, examples, **keep)
    plan = replace(plan, portions=portions, sizes=tuple(e.target for e in examples))
    dataset = Dataset(examples, plan, config.data, with_pixels=not config.data.cache_latents)
    trainables = trainables_of(config, family, names)
    notes += [*notes_on_views(dataset), *trainables.notes]
    if names is not None and config.token.ti_pooling == "eos":
        notes += pool_at_end(family, names)
    yield from notes_on_words(config, family, dataset, names)
    learns_text = bool(trainables.text_encoders or trainables.new_tokens)
    text = Text(
        family,
        dataset.all_captions(),
        names,
        accelerator.device,
        # Weights of one format need none, and some of T5's must not be narrowed to fp16.
        autocast=accelerator.autocast if config.adapter.train_text_encoder else nullcontext,
        processes=processes,
        shelf=None if learns_text else shelf_of_captions(family, accelerator.device),
        lends=config.adapter.use_lora and config.adapter.adapter_layers == "ours",
    )
    if prompts := config.preview_prompts():
        text.add((*prompts, EMPTY))
    if not schedule.text_learns_at(0):
        yield from text.keep()
    pictures = yield from _pictures(config, family, dataset, spread)
    training = Training(
        config,
        family,
        spread,
        dataset,
        trainables=trainables,
        schedule=schedule,
        encodings=Encodings(family, text, pictures, accelerator.device),
        base_contents=held,
    )
    notes += training.notes
    yield from map(_as_event, notes)
    return Composition(config.with_notes(*notes), base, precision_of(config), training, held_out)


def _pictures(
    config: TrainingConfig, family: Family, dataset: Dataset, spread: Spread
) -> Generator[Event, None, Pictures | None]:
    """All pictures encoded, where that is done once."""
    if not config.data.cache_latents:
        return None
    device = spread.accelerator.device
    shelf = shelf_of_pictures(family, device)
    return (
        yield from encode_pictures(
            family,
            dataset,
            device,
            spread.processes,
            shelf,
            keeps_vae=bool(config.preview_prompts()),
        )
    )


def _loaded(
    config: TrainingConfig, base: BaseModel, spread: Spread, names: TokenNames | None
) -> tuple[Family, str]:
    """The base model as it is trained, and the digest of what it holds.

    Encoders of which all may be kept that they would make are read when they are needed.

    Args:
        spread: its device quantises weights.
        names: of the new tokens, if any are to be learnt.

    Raises:
        InputError: it cannot be read, or knows a new token already.
    """
    learns_text = config.adapter.train_text_encoder or config.token.train_text_encoder_ti
    spared = set() if learns_text else {*base.family.text_encoder_names}
    spared |= {"vae"} if config.data.cache_latents else set()
    family = contents.opened(base, precision_of(config), spared, remember=spread.processes.is_main)
    held = contents.contents_digest(family)
    for text_encoder in token_encoders(family) if names else ():
        assert names is not None
        refuse_taken(names, tokenizer_of(family, text_encoder), component=text_encoder)
    frozen.freeze(
        family.denoiser,
        quantization=config.model.quantization,
        offload_blocks=config.run.offload_blocks,
        device=spread.accelerator.device,
    )
    return family, held


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


def _settled(config: TrainingConfig, base: BaseModel, spread: Spread) -> TrainingConfig:
    """The configuration with what checkpoint, machine and launcher decide.

    Raises:
        InputError: something that would only fail later, before any weights are read.
    """
    denoiser = base_model.skeleton(base, base.family.denoiser_name)
    config = completed(config, base, denoiser)
    num_processes, device = spread.accelerator.num_processes, spread.accelerator.device
    refuse_updates_in_backward(config, num_processes)
    pace.refuse_impossible(config, num_processes, on_gpu=device.type == "cuda")
    if spread.sharding is not None:
        refuse_in_shards(config, num_processes)
        config = config.with_notes(*spread.sharding.notes)
    base_model.objective_of(base, config.loss).check_maximum(config.loss.max_timestep_trained)
    optim.refuse_unavailable(config.optim)
    frozen.refuse_unavailable(config.model.quantization)
    frozen.refuse_too_many(denoiser, config.run.offload_blocks)
    return pace.without_meaning(config, denoiser)


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
    # Steps that are read together are told with their mean: none of the first such.
    warm_up = max(WARM_UP_STEPS, composed.config.run.report_steps or 0)
    usual = _usual_seconds(phases, warm_up)
    if usual is not None and is_whole and accelerator.is_main_process:
        key = measurement_key(
            composed.config,
            family=composed.base.family_name,
            device=device_name(),
            num_processes=accelerator.num_processes,
        )
        record_measurement(key, usual)


def _usual_seconds(phases: Sequence[Sequence[float]], warm_up: int) -> float | None:
    """The mean over the phases of each one's usual time of a step, weighted by their steps."""
    settled = [phase[warm_up:] for phase in phases if len(phase) > warm_up]
    if not settled:
        return None
    steps = sum(map(len, settled))
    return sum(statistics.median(phase) * len(phase) for phase in settled) / steps


def _run_event(composed: Composition) -> RunEvent:
    config, training = composed.config, composed.training
    trained = training.dataset.trained
    scales = [example.scale for example in trained]
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
            "steps": str(training.pace),
            "activations": recomputing.words(config),
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
