"""The figures of steps, kept on the device until they are read, several steps at once.

Reading a number from a GPU waits for all the work before it. So a step leaves its loss, the norm
of its gradients and whether its values were finite where they are, and one transfer brings those of
several steps. Whether everything so far was finite is known on the device at any time: updates are
let through by that alone. Knows tensors and steps, nothing of how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.errors import NonFiniteError

# What may be not finite in an example, in the order in which one makes the next so.
CAUSES = ("latents", "text", "prediction")

# What is said of each cause and what helps; None: of an update, where all examples were finite.
_WORDS: Mapping[str | None, tuple[str, str]] = {
    "latents": (
        "the VAE gives no finite latents",
        "set upscale_vae_32bit: true, or give a vae_url made for half precision",
    ),
    "text": (
        "a text encoder gives no finite states",
        "set mixed_precision: bf16 or no, or lower text_encoder_lr",
    ),
    "prediction": (
        "the denoiser gives no finite prediction",
        "lower learning_rate, or set mixed_precision: bf16 or no",
    ),
    None: (
        "loss or gradients are not finite",
        "lower learning_rate, or set mixed_precision: bf16 or no",
    ),
}


@dataclass(frozen=True)
class Seen:
    """One example of a step, as a message names it.

    Args:
        name: of its picture.
        caption: as the user wrote it.
    """

    name: str
    caption: str


# A cause, or None where only the update is not finite; an example, and its timestep.
Odd = tuple[str | None, Seen, int]


@dataclass(frozen=True)
class Figures:
    """What a step leaves on the device.

    Args:
        loss: () mean over the examples of all processes.
        grad_norm: () norm of all gradients before clipping.
        finite: (N, 3) whether the latents, the text states and the prediction of each of this
            process's examples are finite, in the order of `CAUSES`.
        timesteps: (N,) of these examples.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    finite: torch.Tensor
    timesteps: torch.Tensor

    @property
    def healthy(self) -> torch.Tensor:
        """() whether an update may be made from this step's gradients."""
        return self.loss.isfinite() & self.grad_norm.isfinite()


@dataclass(frozen=True)
class Reading:
    """The figures of one step on the processor.

    Args:
        step: number of the step, from 1.
        learning_rate: of the denoiser's group, as used in the step.
        loss: see `Figures`.
        grad_norm: see `Figures`.
        odd: the examples of this process in which something is not finite, with its first cause;
            all of them, with no cause, where each is finite by itself.
    """

    step: int
    learning_rate: float
    loss: float
    grad_norm: float
    odd: tuple[Odd, ...]

    @property
    def healthy(self) -> bool:
        """Whether loss and gradients are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class _Unread:
    step: int
    learning_rate: float
    figures: Figures
    examples: tuple[Seen, ...]


class Readings:
    """The steps that were taken and not read yet.

    Args:
        device: where steps are computed.
        every: so many steps are read at once.
    """

    def __init__(self, device: torch.device, every: int) -> None:
        self.healthy = torch.ones((), dtype=torch.bool, device=device)
        self._every = every
        self._unread: list[_Unread] = []

    @property
    def due(self) -> bool:
        """Whether it is time to read."""
        return len(self._unread) >= self._every

    def allow(self, figures: Figures) -> torch.Tensor:
        """() whether this step and all before it were finite, so that weights may be updated."""
        self.healthy = self.healthy & figures.healthy
        return self.healthy

    def take(
        self, step: int, learning_rate: float, figures: Figures, examples: Sequence[Seen]
    ) -> None:
        """Keeps the figures of a step; nothing is waited for.

        Args:
            step: number of the step, from 1.
            learning_rate: as used in it.
            figures: on the device.
            examples: (N,) those of this process.
        """
        self._unread.append(_Unread(step, learning_rate, figures, tuple(examples)))

    def read(self) -> list[Reading]:
        """The figures of all steps since the last reading, in one transfer."""
        unread, self._unread = self._unread, []
        if not unread:
            return []
        parts = [
            part.detach().flatten().to(torch.float32)
            for one in unread
            for part in (
                one.figures.loss,
                one.figures.grad_norm,
                one.figures.finite,
                one.figures.timesteps,
            )
        ]
        values = torch.cat(parts).tolist()
        readings = []
        for one in unread:
            size = 2 + (len(CAUSES) + 1) * len(one.examples)
            readings.append(_reading(one, values[:size]))
            values = values[size:]
        return readings


def _reading(unread: _Unread, values: Sequence[float]) -> Reading:
    loss, grad_norm, *rest = values
    count = len(unread.examples)
    flags, timesteps = rest[: count * len(CAUSES)], rest[count * len(CAUSES) :]
    every: list[Odd] = []
    for number, (example, timestep) in enumerate(zip(unread.examples, timesteps, strict=True)):
        finite = flags[number * len(CAUSES) : (number + 1) * len(CAUSES)]
        causes = (cause for cause, is_finite in zip(CAUSES, finite, strict=True) if not is_finite)
        every.append((next(causes, None), example, int(timestep)))
    odd = [one for one in every if one[0] is not None] or every
    return Reading(unread.step, unread.learning_rate, loss, grad_norm, tuple(odd))


def finite_examples(values: torch.Tensor) -> torch.Tensor:
    """(B,) whether all values of each example (B, …) are finite."""
    return values.detach().isfinite().flatten(1).all(1)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors hold finite values only; the device is waited for once."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def way_on(last_checkpoint: int | None) -> str:
    """What a run in which something was not finite can do next, in words.

    Args:
        last_checkpoint: its step, if there is one.
    """
    if last_checkpoint is None:
        return "as no checkpoint was made yet, the same --output takes changed settings"
    return (
        "changed settings begin anew, with another --output; the same command goes on from the "
        f"last checkpoint, step {last_checkpoint}, which is intact, and would meet this again"
    )


def non_finite(reading: Reading, odd: Sequence[Odd], last_checkpoint: int | None) -> NonFiniteError:
    """The error of a step without finite loss or gradients.

    Args:
        reading: of the step.
        odd: see `Reading`, of all processes.
        last_checkpoint: see `way_on`.
    """
    known = [cause for cause in CAUSES if any(cause == found for found, _, _ in odd)]
    cause = known[0] if known else None
    what, hint = _WORDS[cause]
    where = ", ".join(
        f"`{seen.name}`"
        + f" with caption `{seen.caption}`" * (cause == "text")
        + f" at timestep {timestep}"
        for found, seen, timestep in odd
        if found == cause
    )
    return NonFiniteError(
        f"{what} in step {reading.step} for {where} (loss {reading.loss}, gradient norm "
        f"{reading.grad_norm}); only finite values reached the weights",
        f"{hint}; {way_on(last_checkpoint)}",
    )
