"""The loop: from a step's number to an update of the trained weights.

Everything random in a step is drawn from (seed, purpose, position of the example), so a step
depends on nothing but its number and the weights it starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from trainer import checkpoint, optim, pace, shards, tokens
from trainer.adapted.layers import Copies
from trainer.config import Note, TrainingConfig
from trainer.data.dataset import Batch, Dataset, leave_signals_to_the_training
from trainer.encoding import Encodings
from trainer.errors import Interrupted, NonFiniteError
from trainer.events import CheckpointEvent, Event, NoteEvent, PhaseEvent, StepEvent
from trainer.families.base import Family
from trainer.identity import identity_of_contents
from trainer.job import RunFolder
from trainer.looks import Look, taken
from trainer.machine import precision_of
from trainer.measures import Smoothed
from trainer.pace import Pace, Work, pace_of
from trainer.passes import Passes
from trainer.readings import (
    Reading,
    Readings,
    Seen,
    all_finite,
    non_finite,
    way_on,
)
from trainer.recording import CudaRecorder, Recorder, Recordings
from trainer.schedule import Part, Schedule
from trainer.sharding import put_together, shard
from trainer.spread import Spread
from trainer.stepping import Stepper
from trainer.trainables import Trainables
from trainer.updates import Updates

# Halvings that fp16's scaler may need to come down from its first scale of 2**16, and some.
_MOST_ATTEMPTS = 24

_NOTHING_WHOLE = (
    "an earlier run in this folder ended before its first checkpoint was whole: this one starts "
    "from step 0"
)

# Steps of a phase that still pay for allocations and caches: their times are told apart.
WARM_UP_STEPS = 3

# Steps whose figures are read from a GPU at once; a processor has nothing to wait for.
_STEPS_PER_READING = 10


class Training:
    """The state of one training: the only owner of weights, optimizer and step.

    Args:
        config: the resolved configuration.
        family: the loaded base model.
        spread: device, precision and processes.
        dataset: the batches of this process.
        trainables: what learns in it.
        schedule: which part learns in which step.
        encodings: of captions and pictures.
        base_contents: digest of the base model's weights, schedule and tokenizers.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: Family,
        spread: Spread,
        dataset: Dataset,
        *,
        trainables: Trainables,
        schedule: Schedule,
        encodings: Encodings,
        base_contents: str,
    ) -> None:
        self.config = config
        self.family = family
        self.spread = spread
        self.accelerator = accelerator = spread.accelerator
        self.dataset = dataset
        self.sharding = sharding = spread.sharding
        self.processes = spread.processes
        self.schedule = schedule
        self.encodings = encodings
        self.text = encodings.text
        self.base_contents = base_contents
        self.step = 0
        self.last_checkpoint: int | None = None
        self.look_is_cut = False
        self.losses, self._smoothed = list[float](), Smoothed()
        self.denoiser = family.denoiser
        self.notes = self._long_warm_up()
        # What comes next is communication, which must not wait for one that loads slowly.
        self.processes.wait()
        if sharding is None:
            self._spread_denoiser = accelerator.prepare_model(self.denoiser)
        else:
            trainables = shard(trainables, sharding, accelerator)
            self._spread_denoiser = self.denoiser
        self.trainables = trainables
        self.parameters = trainables.of(trainables.parameters)
        if encodings.pictures is None:
            family.pipeline.vae.to(accelerator.device)
        self.pace = self._paced()
        self.updates = self._prepared_updates()
        self.optimizer = self.updates.optimizer
        self.course = optim.build_schedule(self.optimizer, config.optim, self.total_steps)
        self.readings = Readings(accelerator.device, self._steps_per_reading())
        self.passes = Passes(
            config.loss, family, encodings, seed=config.run.seed, device=accelerator.device
        )
        self.stepper = Stepper(
            config,
            family,
            spread,
            passes=self.passes,
            trainables=trainables,
            updates=self.updates,
            copies=Copies(trainables.modules.values(), precision_of(config).frozen),
        )
        if self.pace.cuda_graph:
            self.record(CudaRecorder())

    def record(self, recorder: Recorder) -> None:
        """Records steps from now on, wherever all that they need lies on the device."""
        optim.make_capturable(self.optimizer, self.config.optim.optimizer)
        self.stepper.recordings = Recordings(recorder)

    def _prepared_updates(self) -> Updates:
        optimization = self.config.optim
        return Updates(
            self.trainables.groups(optimization),
            optimization,
            seed=self.config.run.seed,
            in_backward=optimization.fused_backward and self.trainables.whole,
        )

    def _paced(self) -> Pace:
        """How steps are computed, for which the denoiser is prepared."""
        plan = self.dataset.plan
        has_class = any(portion.class_images for portion in plan.portions)
        passes = plan.batch_size * plan.gradient_accumulation_steps
        work = Work(
            denoiser=self.denoiser,
            steps=self.total_steps,
            sizes=tuple(dict.fromkeys(plan.sizes)),
            examples=2 * passes if has_class else passes,
            room=self.spread.room,
        )
        on_gpu = self.accelerator.device.type == "cuda"
        chosen = pace_of(
            self.config,
            work,
            on_gpu=on_gpu,
            num_processes=self.processes.count,
            in_shards=self.sharding is not None,
        )
        pace.prepare(self.denoiser, chosen)
        return chosen

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps

    @property
    def smoothed_loss(self) -> float:
        """The mean loss of the last steps that were read, see `measures.Smoothed`."""
        return self._smoothed.value

    @property
    def num_trained_parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(parameter.numel() for parameter in self.parameters)

    def resume(self, folder: RunFolder) -> Iterator[Event]:
        """Goes to the newest usable checkpoint in the run folder, if there is one.

        Raises:
            CheckpointError: none is usable, they belong to another configuration, or not all
                processes can read the same one.
        """
        loaded = checkpoint.load_newest(folder.checkpoints, config_values=self._identity())
        if loaded is not None:
            for warning in loaded.warnings:
                yield NoteEvent("warning", "checkpoints", warning)
            self._restore(loaded.checkpoint)
        self.spread.refuse_several_steps(self.step, () if loaded is None else loaded.warnings)
        if self.accelerator.is_main_process:
            keep = self.config.run.checkpoints_total_limit
            removed = checkpoint.tidy(folder.checkpoints, self.step, keep=keep)
            if removed and loaded is None:
                yield NoteEvent("warning", "checkpoints", _NOTHING_WHOLE)

    def steps(
        self, folder: RunFolder, stop: Callable[[], bool], looks: Sequence[Look] = ()
    ) -> Iterator[Event]:
        """The remaining steps; publishes checkpoints on the way, at the end and when stopped.

        Args:
            folder: of the run.
            stop: asked after each step, and by looks that take long.
            looks: taken between steps, before a checkpoint of the same step: one that goes on from
                there has been looked at, or finishes the look that was cut short.

        Raises:
            Interrupted: `stop` said so; the checkpoint of the last step, if any, is published.
            NonFiniteError: loss, gradients or weights are not finite; checkpoints are untouched.
        """
        # What dropout and PEFT's layers draw in training mode comes from no seed of ours.
        self.denoiser.eval()
        every = self.config.run.checkpointing_steps
        loading = self._batches()
        parts: frozenset[Part] | None = None
        if self.step == 0 or self.look_is_cut:
            yield from self._look(looks, stop)
            if self.look_is_cut:
                raise self._interrupted()
        started, warm_at = time.perf_counter(), self.step
        while self.step < self.total_steps:
            earlier, parts = parts, self.schedule.parts_at(self.step)
            if parts != earlier:
                yield from self._read(started)
                yield from self._enter_phase(parts)
                started, warm_at = time.perf_counter(), self.step + WARM_UP_STEPS
            with pace.arithmetic(self.pace):
                self._one_step(next(loading))
            yield from self.stepper.remarks()
            warming_up = self.config.run.report_steps is None and self.step <= warm_at
            if self.readings.due or warming_up:
                yield from self._read(started)
                started = time.perf_counter()
            if any(look.moments.include(self.step) for look in looks):
                yield from self._read(started)
                yield from self._look(looks, stop)
                started = time.perf_counter()
            is_last = self.step == self.total_steps
            stopping = self.look_is_cut or (not is_last and self.processes.any(stop()))
            if stopping or self.step % every == 0 or is_last:
                yield from self._read(started)
                yield from self._publish(folder)
                started = time.perf_counter()
            if stopping:
                raise self._interrupted()

    def _look(self, looks: Sequence[Look], stop: Callable[[], bool]) -> Iterator[Event]:
        finishing = self.look_is_cut
        self.look_is_cut = yield from taken(looks, self.step, stop, self.pace, finishing=finishing)

    def _interrupted(self) -> Interrupted:
        after = f"after step {self.step} of {self.total_steps}; its checkpoint is kept"
        place = "before the first step" if self.step == 0 else after
        return Interrupted(f"stopped {place}", "run the same command to go on")

    def _batches(self) -> Iterator[list[Batch]]:
        """The batches of the remaining steps; their pictures are read ahead."""
        steps = range(self.step, self.total_steps)
        if self.encodings.pictures is not None:
            return (self.dataset[step] for step in steps)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=steps,
            num_workers=self.config.run.num_workers,
            collate_fn=list,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_training,
        )
        return iter(loader)

    def _enter_phase(self, parts: frozenset[Part]) -> Iterator[Event]:
        """Lets these parts learn, and freezes for good what has learnt enough."""
        self.trainables.learn(parts)
        self.stepper.forget()
        # A denoiser that learns nothing has no gradients for its processes to wait for.
        learns = "denoiser" in parts
        self.family.denoiser = self._spread_denoiser if learns else self.denoiser
        earlier = self.schedule.parts_at(self.step - 1) if self.step > 0 else frozenset[Part]()
        if self.step > 0 and parts != earlier:
            optim.enter_phase(
                self.optimizer,
                self.config.optim,
                frozen=self.updates.learners(self.trainables.of(earlier - parts)),
                staying=self.updates.learners(self.trainables.of(earlier & parts)),
            )
        if self.schedule.parts_at(0) != {"denoiser"} and parts != earlier:
            yield PhaseEvent(self.step, tuple(sorted(parts)), tuple(sorted(earlier - parts)))
        if self.text.is_live and not self.schedule.text_learns_at(self.step):
            for text_encoder in self.trainables.text_encoders.values():
                self.stepper.leave(text_encoder)
            yield from self.text.keep()

    def _long_warm_up(self) -> tuple[Note, ...]:
        """What could not be told before the pictures were counted: epochs as steps."""
        optimization, in_epochs = self.config.optim, self.config.run.num_train_epochs
        warms_up = optimization.lr_scheduler != "constant"
        if in_epochs is None or not warms_up or optimization.lr_warmup_steps < self.total_steps:
            return ()
        message = (
            f"{optimization.lr_warmup_steps} warm-up steps fill the whole run of "
            f"{self.total_steps}: the full learning rate is never reached"
        )
        return (Note(kind="warning", field="lr_warmup_steps", message=message),)

    def _steps_per_reading(self) -> int:
        """How many steps are taken between two readings of their figures."""
        if self.accelerator.scaler is not None:
            # Whether its gradients overflow is asked in each step.
            return 1
        on_processor = self.accelerator.device.type == "cpu"
        return self.config.run.report_steps or (1 if on_processor else _STEPS_PER_READING)

    def _one_step(self, batches: Sequence[Batch]) -> None:
        """Takes a step; its figures stay on the device."""
        self.processes.begin(self.step + 1)
        learning_rate = float(self.course.get_last_lr()[0])
        scaler = self.accelerator.scaler
        for _ in range(1 if scaler is None else _MOST_ATTEMPTS):
            figures = self.stepper.take(batches, self.readings.healthy, step=self.step)
            # With a scaler, gradients that overflowed change nothing: once more, scaled less.
            if scaler is None or bool(figures.healthy | ~figures.loss.isfinite()):
                break
        allowed = self.readings.allow(figures)
        if "tokens" in self.schedule.parts_at(self.step):
            for new_tokens in self.trainables.new_tokens.values():
                tokens.retract(new_tokens, self.config.token.token_retraction, allowed)
        self.course.step()
        self.step += 1
        seen = [
            Seen(self.dataset.examples[number].name, caption)
            for batch in batches
            for number, caption in zip(batch.numbers, batch.captions, strict=True)
        ]
        self.readings.take(self.step, learning_rate, figures, seen)

    def _read(self, started: float) -> Iterator[StepEvent]:
        """The events of all steps that were not read yet.

        Args:
            started: when the first of them began.

        Raises:
            NonFiniteError: one of them had no finite loss or gradients.
        """
        readings = self.readings.read()
        seconds = (time.perf_counter() - started) / max(1, len(readings))
        for reading in readings:
            if not reading.healthy:
                raise self._non_finite(reading)
            self.losses.append(reading.loss)
            yield StepEvent(
                step=reading.step,
                epoch=self.dataset.plan.epoch_of(reading.step - 1),
                loss=reading.loss,
                learning_rate=reading.learning_rate,
                grad_norm=reading.grad_norm,
                seconds=seconds,
                smoothed_loss=self._smoothed.add(reading.loss),
            )

    def _non_finite(self, reading: Reading) -> NonFiniteError:
        """What was not finite in a step, in the pictures of all processes."""
        odd = gather_object(list(reading.odd))
        return non_finite(reading, odd, self.last_checkpoint)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one: settings, processes, pictures, weights."""
        return self.spread.identity_of(self.config) | identity_of_contents(
            self.dataset.examples, self.dataset.plan.portions, self.base_contents
        )

    def _publish(self, folder: RunFolder) -> Iterator[Event]:
        state = [value for of_one in self.optimizer.state.values() for value in of_one.values()]
        parts = map(shards.part, self.parameters)
        if self.processes.any(not all_finite([*parts, *filter(torch.is_tensor, state)])):
            raise NonFiniteError(
                f"weights or what the optimizer keeps are not finite after step {self.step}; no "
                "checkpoint is made of them",
                f"lower learning_rate; {way_on(self.last_checkpoint)}",
            )
        # All processes take part in this: weights may be in shards.
        is_main_process = self.accelerator.is_main_process
        learnt = {
            f"{component}.{name}": tensor
            for component, tensors in self.trainables.tensors().items()
            for name, tensor in tensors.items()
        }
        learnt = shards.gathered(learnt, keep=is_main_process)
        optimizer = self.updates.state(keep=is_main_process)
        path = checkpoint.place_of(folder.checkpoints, self.step).relative_to(folder.root)
        published = CheckpointEvent(self.step, path.as_posix())
        if is_main_process:
            scaler = self.accelerator.scaler
            folder.sync_events()
            with self.processes.writing():
                checkpoint.publish(
                    folder.checkpoints,
                    checkpoint.Checkpoint(
                        step=self.step,
                        tensors=learnt,
                        optimizer=optimizer,
                        state={
                            "lr_scheduler": self.course.state_dict(),
                            "scaler": scaler.state_dict() if scaler else None,
                            "losses": self.losses,
                            "look_is_cut": self.look_is_cut,
                        },
                    ),
                    config_values=self._identity(),
                    keep=self.config.run.checkpoints_total_limit,
                )
            yield published
        self.last_checkpoint = self.step
        self.processes.wait()
        if not is_main_process:
            yield published

    def put_together(self) -> None:
        """Ends the training: of shards, the main process gets an ordinary model, others nothing."""
        if self.sharding is not None:
            put_together(self.denoiser, keep=self.accelerator.is_main_process)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in saved.tensors.items():
            component, _, rest = name.partition(".")
            tensors.setdefault(component, {})[rest] = tensor
        self.trainables.load(tensors)
        self.updates.load(saved.optimizer)
        self.course.load_state_dict(saved.state["lr_scheduler"])
        if self.accelerator.scaler is not None and saved.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.losses = list(saved.state["losses"])
        self._smoothed = Smoothed(self.losses)
        self.look_is_cut = bool(saved.state.get("look_is_cut"))
        self.step = self.last_checkpoint = saved.step
