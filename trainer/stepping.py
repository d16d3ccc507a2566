"""One optimizer step: from what its forward passes ask to updated weights and figures.

A step has two halves. The first draws everything random and says which rows of the encodings are
shown, see `passes`; the second needs nothing from the processor, so that it can also be recorded
once and played again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from trainer import faults, optim
from trainer.adapted.layers import Copies
from trainer.config import TrainingConfig
from trainer.data.dataset import Batch
from trainer.errors import InputError
from trainer.events import Event, NoteEvent
from trainer.families.base import Family
from trainer.images.crop import Size
from trainer.passes import Asked, Passes
from trainer.readings import Figures
from trainer.recording import CannotRecordError, Recordings, Tensors
from trainer.spread import Spread
from trainer.trainables import Trainables
from trainer.updates import Updates


class Stepper:
    """Takes the steps of one training.

    Args:
        config: the resolved configuration.
        family: the loaded base model; its denoiser is looked up anew in each step.
        spread: device, precision and processes.
        passes: forward passes.
        trainables: what learns.
        updates: from gradients to weights.
        copies: what adapted layers compute with.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: Family,
        spread: Spread,
        *,
        passes: Passes,
        trainables: Trainables,
        updates: Updates,
        copies: Copies,
    ) -> None:
        self._max_grad_norm = config.optim.max_grad_norm
        self._family, self._spread, self._accelerator = family, spread, spread.accelerator
        self.passes, self._trainables = passes, trainables
        self._parameters = trainables.of(trainables.parameters)
        self._updates, self._copies = updates, copies
        self.scaled_optimizer = spread.accelerator.prepare_optimizer(updates.optimizer)
        self.fault = faults.wanted_fault()
        self.recordings: Recordings | None = None
        self._must_record = bool(config.run.cuda_graph)
        self._remarks: list[Event] = []

    def take(self, batches: Sequence[Batch], healthy: torch.Tensor, *, step: int) -> Figures:
        """Takes a step: gradients of all batches, then an update, if they are finite.

        Args:
            batches: one for each forward pass.
            healthy: () bool on the device: whether all steps before were finite.
            step: optimizer steps already done.
        """
        # Whoever strikes in a step must be there in it.
        if self.recordings is not None and self.passes.resident and self.fault is None:
            try:
                return self._played(self.recordings, batches, healthy)
            except CannotRecordError as error:
                self._go_on_plainly(error)
        return self._taken(
            [partial(self.passes.ask, batch) for batch in batches], healthy, step=step
        )

    def leave(self, module: torch.nn.Module) -> None:
        """Gives up what was made for a module that learns no more, before it leaves the device."""
        self._copies.leave(module)

    def forget(self) -> None:
        """Records anew: something else learns from now on."""
        if self.recordings is not None:
            self.recordings.forget()

    def remarks(self) -> list[Event]:
        """What to tell of the steps since the last time this was asked."""
        said, self._remarks = self._remarks, []
        return said

    def _go_on_plainly(self, error: CannotRecordError) -> None:
        """After a failure to record, which did nothing of the step.

        Raises:
            InputError: somebody chose to record.
        """
        if self._must_record:
            raise InputError.of(
                "cuda_graph", f"true, but the GPU cannot record a step: {error}", "leave it out"
            ) from error
        for parameter in self._parameters:
            parameter.grad = None
        self.recordings = None
        message = f"steps are computed without a CUDA graph, which the GPU could not make: {error}"
        self._remarks.append(NoteEvent("warning", "cuda_graph", message))

    def _played(
        self, recordings: Recordings, batches: Sequence[Batch], healthy: torch.Tensor
    ) -> Figures:
        """A step by a recording; plainly until there is one."""
        asked = [self.passes.ask(batch).flat() for batch in batches]
        inputs = {f"{n}.{name}": t for n, one in enumerate(asked) for name, t in one.items()}
        sizes = tuple(batch.size for batch in batches)
        work = partial(self._recordable, sizes)
        return Figures(**recordings.outputs(sizes, work, {**inputs, "healthy": healthy}))

    def _recordable(self, sizes: Sequence[Size], inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """A step from tensors to tensors, without anything that only the processor knows."""
        asked = [Asked.of_flat(inputs, f"{n}.", size) for n, size in enumerate(sizes)]
        # Whoever needs a step's number is not recorded: see `pace`.
        given = [partial(_given, one) for one in asked]
        return vars(self._taken(given, inputs["healthy"], step=0))

    def _taken(
        self, asked: Sequence[Callable[[], Asked]], healthy: torch.Tensor, *, step: int
    ) -> Figures:
        """A step of what is asked one by one: text that learns is encoded as it is asked."""
        figures = self._gradients(asked, healthy, step)
        allowed = healthy & figures.healthy
        scaler = self._accelerator.scaler
        if scaler is None or self._updates.is_piecewise:
            self._updates.apply(allowed)
            return figures
        if bool(allowed):
            self.scaled_optimizer.step()
        else:
            # It looks at gradients alone, and asks less of the next attempt if they overflowed.
            scaler.update()
        self.scaled_optimizer.zero_grad(set_to_none=True)
        return figures

    def _gradients(
        self, asked: Sequence[Callable[[], Asked]], healthy: torch.Tensor, step: int
    ) -> Figures:
        total = torch.zeros((), device=self._accelerator.device)
        finite: list[torch.Tensor] = []
        timesteps: list[torch.Tensor] = []
        self._updates.begin(step, healthy)
        with self._copies.of_this_step():
            for ask in asked:
                one = ask()
                waiting = self._accelerator.no_sync(self._family.denoiser)
                with contextlib.nullcontext() if ask is asked[-1] else waiting:
                    part, part_finite = self.loss(one, step=step)
                    self._accelerator.backward(part)
                total += part.detach()
                finite.append(part_finite)
                timesteps.append(one.timesteps)
        self._spread.average_gradients(self._trainables)
        step_loss = self._accelerator.reduce(total, "mean")
        self._accelerator.unscale_gradients(self.scaled_optimizer)
        if self._updates.in_backward:
            grad_norm = self._updates.norm()
        else:
            grad_norm = optim.clip(self._parameters, self._max_grad_norm)
        return Figures(step_loss, grad_norm, torch.cat(finite), torch.cat(timesteps))

    def loss(self, asked: Asked, *, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a forward pass, and what of each example is finite, see `Figures`.

        Args:
            asked: of the denoiser.
            step: optimizer steps already done.
        """
        batch_loss, finite = self.passes.loss(asked)
        if self.fault is not None:
            is_last = self._accelerator.is_last_process
            batch_loss = self.fault.strike(batch_loss, step=step + 1, is_last_process=is_last)
        return batch_loss, finite


def _given(asked: Asked) -> Asked:
    return asked
