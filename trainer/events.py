"""What a training says while it runs: one stream that every display and log reads.

The engine yields these; `events.jsonl`, the progress bar, TensorBoard and W&B each take the
same stream. Plain data, no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

# What the loss of held-out pictures is called among measures.
VALIDATION_LOSS = "validation/loss"


@dataclass(frozen=True)
class Event:
    """Base of all events; `kind` is its name in `events.jsonl`."""

    kind: ClassVar[str] = "event"

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON can hold it."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True)
class RunEvent(Event):
    """A run begins or goes on.

    Args:
        start_step: steps already done (0 for a new run).
        total_steps: steps the run will have in all.
        steps_per_epoch: optimizer steps in one pass over the pictures.
        num_examples: training pictures that an epoch shows, each as often as it is repeated, at
            each of its sizes.
        details: what is trained on what, as names and plain values.
        num_pictures: training pictures, each counted once.
        num_sizes: sizes that each is trained at.
    """

    kind = "run"
    start_step: int
    total_steps: int
    steps_per_epoch: int
    num_examples: int
    details: dict[str, Any]
    num_pictures: int = 0
    num_sizes: int = 1


@dataclass(frozen=True)
class StageEvent(Event):
    """Progress of a stage such as `prepare`, `encode captions` or `verify`: done of total."""

    kind = "stage"
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepEvent(Event):
    """One optimizer step is done.

    Args:
        step: number of the finished step, from 1.
        epoch: pass over the pictures it belongs to, from 0.
        loss: mean loss over the step's examples.
        learning_rate: of the denoiser's group, as used in this step.
        grad_norm: norm of all gradients before clipping.
        seconds: time the step took; the only field that differs between equal runs.
        smoothed_loss: mean of the losses so far, see `measures.Smoothed`.
    """

    kind = "step"
    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    smoothed_loss: float


@dataclass(frozen=True)
class MeasuresEvent(Event):
    """What was measured after a step beside its loss.

    Args:
        step: steps done.
        values: by name, as curves have them: `validation/loss`, `train/prodigy_d`, and for each
            new token `tokens/TEXT_ENCODER/TOKEN`, the norm of its vector.
    """

    kind = "measures"
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class SampleEvent(Event):
    """A picture of a validation prompt was made on the way.

    Args:
        step: steps done; at 0 the base model made it.
        number: of the prompt in `validation_prompts`; its pictures of all steps start from the
            same noise.
        prompt: as the user wrote it.
        path: relative to the run folder.
        seconds: its share of the time of all pictures; as that of a step it differs between equal
            runs.
        left: pictures that are still to be made on the way.
    """

    kind = "sample"
    step: int
    number: int
    prompt: str
    path: str
    seconds: float = 0.0
    left: int = 0


@dataclass(frozen=True)
class PhaseEvent(Event):
    """From the next step on other parts learn than before.

    Args:
        step: steps done.
        learning: the parts that learn now: `denoiser`, `text_encoders`, `tokens`.
        frozen: the parts that learnt before and stay as they are from now on.
    """

    kind = "phase"
    step: int
    learning: tuple[str, ...]
    frozen: tuple[str, ...]


@dataclass(frozen=True)
class NoteEvent(Event):
    """Something the user should know: kind as in `config.Note`, field and message."""

    kind = "note"
    note: str
    field: str
    message: str


@dataclass(frozen=True)
class NoteAtStep(NoteEvent):
    """A note on what was seen after a step: one that is taken again tells it again."""

    step: int


@dataclass(frozen=True)
class CheckpointEvent(Event):
    """A checkpoint of this step is durable on disk."""

    kind = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True)
class MemoryEvent(Event):
    """How much memory a training took, told at its end.

    Args:
        peaks: part of the training to the most bytes at one time: of `tensors` on a GPU, `reserved`
            for them there, and of the `process` in the computer's memory since it began.
    """

    kind = "memory"
    peaks: dict[str, dict[str, int]]


@dataclass(frozen=True)
class FileEvent(Event):
    """A result file is written; `role` says what it is, `path` is relative to the run folder."""

    kind = "file"
    role: str
    path: str


@dataclass(frozen=True)
class VerifyEvent(Event):
    """A result file was read back by one reader.

    Args:
        path: the file, relative to the run folder.
        reader: who read it, such as `diffusers` or `lycoris`.
        status: `passed`, `failed` or `not checked`.
        largest_difference: largest relative difference of effective weights, if checked.
    """

    kind = "verify"
    path: str
    reader: str
    status: str
    largest_difference: float | None


@dataclass(frozen=True)
class PublishedEvent(Event):
    """The result files are on the hub.

    Args:
        repository: as `owner/name`.
        url: address of what was sent.
        private: whether others were kept from seeing it.
    """

    kind = "published"
    repository: str
    url: str
    private: bool
