"""Where a training computes: on which device, with which other processes, whole or in shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from trainer import shards
from trainer.capacity import Room
from trainer.config import TrainingConfig
from trainer.errors import CheckpointError
from trainer.identity import identity_of_settings
from trainer.processes import ALONE, Processes
from trainer.schedule import Part
from trainer.sharding import Sharding
from trainer.trainables import Trainables


@dataclass(frozen=True)
class Spread:
    """Where a training computes.

    Args:
        accelerator: device, processes and precision.
        processes: those that train together.
        sharding: how the denoiser is spread over them; None: each has all of it.
        room: memory of a device, where it is foreseen what steps take of it.
    """

    accelerator: Accelerator
    processes: Processes = ALONE
    sharding: Sharding | None = None
    room: Room | None = None

    def identity_of(self, config: TrainingConfig) -> dict[str, Any]:
        """What of a run's identity is known before its pictures are read."""
        return identity_of_settings(
            config,
            num_processes=self.accelerator.num_processes,
            in_shards=self.sharding is not None,
        )

    def refuse_several_steps(self, step: int, warnings: Sequence[str]) -> None:
        """All processes go on from one step: what one alone cannot read is not passed over.

        Args:
            step: that this process would go on from.
            warnings: of the checkpoints that it passed over.

        Raises:
            CheckpointError: another process would go on from another step; all raise it.
        """
        own = (step, "; ".join(warnings))
        ranks = range(self.processes.count)
        places = [place for _, place in self.processes.shared(ranks, lambda _: own)]
        if len({step for step, _ in places}) == 1:
            return
        described = (
            f"process {rank} from step {step}" + f" ({told})" * bool(told)
            for rank, (step, told) in enumerate(places)
        )
        raise CheckpointError(
            f"the processes would go on from different checkpoints: {'; '.join(described)}",
            "see why it cannot be read there, or remove the newer checkpoints",
        )

    def average_gradients(self, trainables: Trainables) -> None:
        """The mean over the processes of gradients that the denoiser's wrapper does not see."""
        if self.accelerator.num_processes == 1:
            return
        parts: tuple[Part, ...] = ("text_encoders", "tokens")
        if self.sharding is not None:
            # Of a sharded denoiser it leaves out the adapters, which every process has whole.
            parts = ("denoiser", *parts)
        shards.average(
            [
                parameter.grad
                for parameter in trainables.of(parts)
                if parameter.grad is not None and not shards.is_sharded(parameter)
            ]
        )
