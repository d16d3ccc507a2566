"""The loop: from a step's number to an update of the trained weights.

Everything random in a step is drawn from (seed, purpose, position of the example), so a step
depends on nothing but its number and the weights it starts from.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from trainer import checkpoint, encoding, loss, objectives, optim, tokens
from trainer.config import Note, TrainingConfig
from trainer.data.dataset import Batch, Dataset
from trainer.encoding import Encodings
from trainer.errors import Interrupted, NonFiniteError
from trainer.events import CheckpointEvent, Event, NoteEvent, PhaseEvent, StepEvent
from trainer.families.base import Family, LatentDistribution
from trainer.job import RunFolder
from trainer.schedule import Part, Schedule
from trainer.trainables import Trainables
from trainer.updates import Updates

# Halvings that fp16's scaler may need to come down from its first scale of 2**16, and some.
_MOST_ATTEMPTS = 24

# Leaves that say where pictures and base model are; what they hold has digests of its own.
_PLACES = (
    *("images_data_url", "captions_file_url", "class_images_url"),
    *("face_detector_path", "face_restorer_path", "clipseg_url"),
    *("model_url", "model_family", "single_file_config", "revision", "variant", "vae_url"),
)


def identity(config: TrainingConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What of a run's identity is known before its pictures are read."""
    left_out = {*_PLACES, *config.resolved.ignored_options}
    values = {name: v for name, v in config.result_values().items() if name not in left_out}
    if values.get("concepts"):
        values["concepts"] = [
            {name: value for name, value in concept.items() if name not in _PLACES}
            for concept in values["concepts"]
        ]
    return values | {"number of processes": accelerator.num_processes}


class Training:
    """The state of one training: the only owner of weights, optimizer and step.

    Args:
        config: the resolved configuration.
        family: the loaded base model.
        accelerator: device, processes and precision.
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
        accelerator: Accelerator,
        dataset: Dataset,
        *,
        trainables: Trainables,
        schedule: Schedule,
        encodings: Encodings,
        base_contents: str,
    ) -> None:
        self.config = config
        self.family = family
        self.accelerator = accelerator
        self.dataset = dataset
        self.trainables = trainables
        self.schedule = schedule
        self.text = encodings.text
        self.pictures = encodings.pictures
        self.base_contents = base_contents
        self.step = 0
        self.last_checkpoint: int | None = None
        self.losses: list[float] = []
        self.objective = family.objective_class.from_scheduler(
            family.pipeline.scheduler, config.loss
        )
        self.denoiser = family.denoiser
        self.notes = self._long_warm_up()
        self.parameters = trainables.of(trainables.parameters)
        self._spread_denoiser = accelerator.prepare_model(self.denoiser)
        if self.pictures is None:
            family.pipeline.vae.to(accelerator.device)
        self.updates = Updates(
            trainables.groups(config.optim),
            config.optim,
            seed=config.run.seed,
            in_backward=config.optim.fused_backward and trainables.whole,
        )
        self.optimizer = self.updates.optimizer
        self.course = optim.build_schedule(self.optimizer, config.optim, self.total_steps)
        self.accelerated_optimizer = accelerator.prepare_optimizer(self.optimizer)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps

    @property
    def num_trained_parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(parameter.numel() for parameter in self.parameters)

    def resume(self, folder: RunFolder) -> Iterator[Event]:
        """Goes to the newest usable checkpoint in the run folder, if there is one.

        Raises:
            CheckpointError: none is usable, or they belong to another configuration.
        """
        loaded = checkpoint.load_newest(folder.checkpoints, config_values=self._identity())
        if loaded is not None:
            for warning in loaded.warnings:
                yield NoteEvent("warning", "checkpoints", warning)
            self._restore(loaded.checkpoint)

    def steps(self, folder: RunFolder, stop: Callable[[], bool]) -> Iterator[Event]:
        """The remaining steps; publishes checkpoints on the way, at the end and when stopped.

        Raises:
            Interrupted: `stop` said so; the checkpoint of the last step is published.
            NonFiniteError: loss, gradients or weights are not finite; checkpoints are untouched.
        """
        batches_of_steps = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=range(self.step, self.total_steps),
            num_workers=self.config.run.num_workers if self.pictures is None else 0,
            collate_fn=list,
        )
        self.denoiser.train()
        every = self.config.run.checkpointing_steps
        loading = iter(batches_of_steps)
        parts: frozenset[Part] | None = None
        while self.step < self.total_steps:
            earlier, parts = parts, self.schedule.parts_at(self.step)
            if parts != earlier:
                yield from self._enter_phase(parts)
            started = time.perf_counter()
            yield self._one_step(next(loading), started)
            stopping = self.step < self.total_steps and self._any_process(stop())
            if stopping or self.step % every == 0 or self.step == self.total_steps:
                yield from self._publish(folder)
            if stopping:
                raise Interrupted(
                    f"stopped after step {self.step} of {self.total_steps}; its checkpoint is kept",
                    "run the same command to go on from there",
                )

    def _enter_phase(self, parts: frozenset[Part]) -> Iterator[Event]:
        """Lets these parts learn, and freezes for good what has learnt enough."""
        self.trainables.learn(parts)
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

    def _one_step(self, batches: Sequence[Batch], started: float) -> StepEvent:
        learning_rate = float(self.course.get_last_lr()[0])
        for _ in range(_MOST_ATTEMPTS):
            step_loss, grad_norm, updated = self._attempt(batches)
            if updated:
                break
        else:
            raise self._non_finite(step_loss, grad_norm, batches)
        if "tokens" in self.schedule.parts_at(self.step):
            for new_tokens in self.trainables.new_tokens.values():
                tokens.retract(new_tokens, self.config.token.token_retraction)
        self.course.step()
        self.step += 1
        self.losses.append(step_loss)
        return StepEvent(
            step=self.step,
            epoch=self.dataset.plan.epoch_of(self.step - 1),
            loss=step_loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - started,
        )

    def _attempt(self, batches: Sequence[Batch]) -> tuple[float, float, bool]:
        """Gradients and update of a step; fp16's scaler skips the update where they overflow.

        Returns:
            The step's loss, the norm of its gradients before clipping, and whether the
            weights were updated.

        Raises:
            NonFiniteError: the loss, or without a scaler the gradient, is not finite.
        """
        total = torch.zeros((), device=self.accelerator.device)
        self.updates.begin(self.step)
        for batch in batches:
            last = batch is batches[-1]
            waiting = self.accelerator.no_sync(self.family.denoiser)
            with contextlib.nullcontext() if last else waiting:
                batch_loss = self._loss(batch)
                self.accelerator.backward(batch_loss)
            total += batch_loss.detach()
        self._average_text_gradients()
        step_loss = float(self.accelerator.reduce(total, "mean"))
        self.accelerator.unscale_gradients(self.accelerated_optimizer)
        if self.updates.in_backward:
            grad_norm = float(self.updates.norm())
        else:
            grad_norm = float(optim.clip(self.parameters, self.config.optim.max_grad_norm))
        scaler = self.accelerator.scaler
        if not math.isfinite(step_loss) or (scaler is None and not math.isfinite(grad_norm)):
            raise self._non_finite(step_loss, grad_norm, batches)
        if self.updates.is_piecewise:
            self.updates.apply()
        else:
            self.accelerated_optimizer.step()
            self.accelerated_optimizer.zero_grad(set_to_none=True)
        # With a scaler, gradients that overflowed change nothing: the update is left out.
        return step_loss, grad_norm, math.isfinite(grad_norm)

    def _loss(self, batch: Batch) -> torch.Tensor:
        device, seed, settings = self.accelerator.device, self.config.run.seed, self.config.loss
        distribution = self._distribution(batch)
        shape = distribution.mean.shape[1:]
        draw = objectives.normal(seed, "posterior", batch.positions, shape).to(device)
        latents = distribution.mean + distribution.std * draw
        noise = objectives.noise_for(seed, batch.positions, shape, settings.noise_offset).to(device)
        timesteps = self._timesteps(batch).to(device)
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        text = self.text.of(batch.captions)
        geometry = {name: sizes.to(device) for name, sizes in batch.geometry.items()}
        geometry["guidance"] = torch.full((len(latents),), settings.guidance_scale, device=device)
        prediction = self.family.predict(noisy_latents, timesteps, text, geometry)
        return loss.diffusion_loss(
            prediction,
            self.objective.target(latents, noise, timesteps),
            shares=batch.weights.to(device),
            is_class=batch.is_class.to(device),
            mask=None if batch.masks is None else batch.masks.to(device),
            snr=self.objective.snr(timesteps),
            snr_gamma=settings.snr_gamma,
            prediction_type=self.objective.prediction_type,
        )

    def _average_text_gradients(self) -> None:
        """The mean over the processes of gradients that the denoiser's wrapper does not see."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.trainables.of(("text_encoders", "tokens")):
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _distribution(self, batch: Batch) -> LatentDistribution:
        device = self.accelerator.device
        if self.pictures is not None:
            views = list(zip(batch.numbers, batch.flipped, strict=True))
            return encoding.stack_latents(self.pictures, views, device)
        assert batch.pixels is not None
        names = [self.dataset.examples[number].name for number in batch.numbers]
        return encoding.encode(self.family, batch.pixels.to(device), names)

    def _timesteps(self, batch: Batch) -> torch.Tensor:
        # All pictures of a batch have one size.
        height, width = batch.geometry["target_size"][0].tolist()
        side = self.family.pipeline.vae_scale_factor
        return self.objective.sample_timesteps(
            self.config.run.seed,
            batch.positions,
            minimum=self.config.loss.min_timestep_trained,
            maximum=self.config.loss.max_timestep_trained,
            latent_size=(height // side, width // side),
        )

    def _non_finite(
        self, step_loss: float, grad_norm: float, batches: Sequence[Batch]
    ) -> NonFiniteError:
        names = [self.dataset.examples[n].name for batch in batches for n in batch.numbers]
        timesteps = [int(t) for batch in batches for t in self._timesteps(batch)]
        what = (
            f"loss {step_loss}, gradient norm {grad_norm} in step {self.step + 1} "
            f"(pictures {', '.join(names)}; timesteps {timesteps})"
        )
        if self.updates.in_backward:
            # What was updated before the value came up cannot be taken back.
            return NonFiniteError(
                f"{what}; with `fused_backward` weights are changed by then",
                f"the same command goes on {self._last_safe()}; if it ends here again, lower "
                "learning_rate, with another --output",
            )
        return NonFiniteError(
            f"{what}; the weights are untouched",
            "lower learning_rate, or set mixed_precision: bf16 or no; checkpoints are kept",
        )

    def _last_safe(self) -> str:
        """From where a run whose weights are spoilt goes on, in words."""
        if self.last_checkpoint is None:
            return "from the start, as there is no checkpoint yet"
        return f"from the last checkpoint, step {self.last_checkpoint}"

    def _any_process(self, flag: bool) -> bool:
        """Whether any process raises the flag: all of them must leave the loop at one step."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be one: settings, processes, pictures, weights."""
        pictures = [
            (e.name, e.sha256, e.caption, e.mask_sha256, e.is_class)
            + (e.original_size, e.size, e.target, e.window)
            for e in self.dataset.examples
        ]
        shares = repr((pictures, self.dataset.plan.portions))
        digest = hashlib.sha256(shares.encode()).hexdigest()
        contents = {"training pictures": digest, "base model's contents": self.base_contents}
        return identity(self.config, self.accelerator) | contents

    def _publish(self, folder: RunFolder) -> Iterator[Event]:
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise NonFiniteError(
                f"weights are not finite after step {self.step}; no checkpoint is made of them",
                f"lower learning_rate; the same command goes on {self._last_safe()}",
            )
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            path = checkpoint.publish(
                folder.checkpoints,
                checkpoint.Checkpoint(
                    step=self.step,
                    tensors={
                        f"{component}.{name}": tensor
                        for component, tensors in self.trainables.tensors().items()
                        for name, tensor in tensors.items()
                    },
                    optimizer=self.optimizer.state_dict(),
                    state={
                        "lr_scheduler": self.course.state_dict(),
                        "scaler": scaler.state_dict() if scaler else None,
                        "losses": self.losses,
                    },
                ),
                config_values=self._identity(),
                keep=self.config.run.checkpoints_total_limit,
            )
            yield CheckpointEvent(self.step, path.relative_to(folder.root).as_posix())
        self.last_checkpoint = self.step
        self.accelerator.wait_for_everyone()

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in saved.tensors.items():
            component, _, rest = name.partition(".")
            tensors.setdefault(component, {})[rest] = tensor
        self.trainables.load(tensors)
        self.optimizer.load_state_dict(saved.optimizer)
        self.course.load_state_dict(saved.state["lr_scheduler"])
        if self.accelerator.scaler is not None and saved.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.losses = list(saved.state["losses"])
        self.step = self.last_checkpoint = saved.step
