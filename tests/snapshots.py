"""What a tiny training has learnt after each step, and which gradients its optimizer was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data as photographs
from tiny import never

from trainer import base_model, engine, optim, results
from trainer.base_model import Precision
from trainer.config import ModelConfig, TrainingConfig
from trainer.data.dataset import Batch
from trainer.engine import Composition
from trainer.errors import Interrupted
from trainer.events import Event, StepEvent
from trainer.families.base import Conditioning, Family
from trainer.job import RunFolder
from trainer.training import Training

Learnt = dict[str, torch.Tensor]
SIZE = 64
PRECISE = Precision(*[torch.float32] * 4)


def composition(config: TrainingConfig, folder: Path) -> tuple[Composition, list[Event]]:
    """A training before its first step with what it was made of, and what was said."""
    composing = engine.compose(config, RunFolder(folder))
    events: list[Event] = []
    while True:
        try:
            events.append(next(composing))
        except StopIteration as end:
            return end.value, events


def learnt(training: Training) -> Learnt:
    """Everything learnt so far, copied, under the names that a checkpoint has for it."""
    return {
        f"{component}.{name}": tensor.clone()
        for component, tensors in training.trainables.tensors().items()
        for name, tensor in tensors.items()
    }


def watched(training: Training, folder: Path) -> tuple[list[Learnt], list[Event]]:
    """What has been learnt before the first step and after each, and what was said."""
    states, events = [learnt(training)], []
    for event in training.steps(RunFolder(folder), never):
        events.append(event)
        if isinstance(event, StepEvent):
            states.append(learnt(training))
    return states, events


def changed(before: Learnt, after: Learnt, start: str) -> set[str]:
    """Names with this start whose tensors are not the same to the bit."""
    return {n for n in after if n.startswith(start) and not torch.equal(before[n], after[n])}


def stopped_after(step: int, config: TrainingConfig, folder: Path) -> list[Event]:
    """Trains and is stopped once this step is done."""
    events: list[Event] = []

    def wished() -> bool:
        return any(isinstance(event, StepEvent) and event.step >= step for event in events)

    with pytest.raises(Interrupted):
        for event in engine.run(config, RunFolder(folder), wished):
            events.append(event)
    return events


def deliver(composed: Composition, folder: Path) -> list[Event]:
    """Writes the files of a training whose steps are done, and has them read back."""
    delivery = results.deliver(
        composed.config, composed.base, composed.precision, composed.training, RunFolder(folder)
    )
    return list(delivery)


def skip_reading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the readers: they are slow, and change no file but their own report."""

    def nothing(*_: Any) -> Any:
        yield from ()
        return []

    monkeypatch.setattr(results, "verify", nothing)


def fresh(folder: Path) -> Family:
    """The base model as it is on disk."""
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), PRECISE)


def encoded(family: Family, caption: str) -> Conditioning:
    """A caption as a family encodes it, without what learns from it."""
    with torch.no_grad():
        return family.encode_text([caption])


def base_tensors(module: torch.nn.Module) -> Learnt:
    """A model's own tensors under its own names, whatever was put on its layers since."""
    return {
        name.replace(".base_layer.", ".").replace(".table.", "."): tensor
        for name, tensor in module.state_dict().items()
        if not any(word in name for word in ("lora_", "lokr_", "hada_", ".added."))
    }


def loss_of(training: Training, batch: Batch) -> torch.Tensor:
    """The loss of one batch, before anything was learnt."""
    return training.stepper.loss(training.passes.ask(batch), step=0)[0]


def gradient(training: Training, batch: Batch) -> torch.Tensor:
    """The gradient of one batch's loss with respect to everything that learns, in one vector."""
    for parameter in training.parameters:
        parameter.grad = None
    loss_of(training, batch).backward()
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
            for p in training.parameters
        ]
    )


@dataclass
class Gradients:
    """The optimizer's gradients in each step, before and after clipping; None: not asked for."""

    before: list[list[torch.Tensor | None]] = field(default_factory=list)
    after: list[list[torch.Tensor | None]] = field(default_factory=list)


def record_gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    """Listens to the clipping of all gradients."""
    seen, clip = Gradients(), optim.clip

    def listen(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        seen.before.append([None if p.grad is None else p.grad.clone() for p in parameters])
        norm = clip(parameters, max_norm)
        seen.after.append([None if p.grad is None else p.grad.clone() for p in parameters])
        return norm

    monkeypatch.setattr(optim, "clip", listen)
    return seen


def norm_of(gradients: list[torch.Tensor | None]) -> float:
    """The Euclidean norm of all of them together."""
    return sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5


def write_pictures(
    folder: Path, count: int, *, photograph: Callable[[], Any] = photographs.astronaut
) -> Path:
    """Crops of a real photograph in the trained size, without captions: 0.png, 1.png …"""
    folder.mkdir(parents=True)
    pixels = photograph()
    for number in range(count):
        corner = 35 * number
        crop = Image.fromarray(pixels[corner : corner + 200, corner : corner + 200])
        crop.resize((SIZE, SIZE)).save(folder / f"{number}.png")
    return folder
