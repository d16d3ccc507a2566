"""Rows of the section sample: pictures of prompts on the way, and pictures kept out of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from options.case import Case
from options.matrix import Leaves, Row, acts, idle
from options.probe import composed_of
from PIL import Image
from tiny import never

from trainer.data.dataset import Batch
from trainer.events import Event, MeasuresEvent, SampleEvent
from trainer.job import RunFolder
from trainer.looking import looks_of
from trainer.stepping import Stepper

Shows = Callable[[Case], None]

QUICK: Leaves = {"max_train_steps": 4, "sample_inference_steps": 2, "learning_rate": 0.05}
PROMPTED: Leaves = {**QUICK, "validation_prompts": ["a TOK, at home", "a dog"]}
HELD_OUT: Leaves = {"max_train_steps": 4, "validation_images": 1}


@dataclass(frozen=True)
class Watched:
    """A training that was looked at.

    Args:
        folder: of the run.
        events: between its steps.
        trained: numbers of the pictures that its steps showed.
        predictions: of the denoiser, steps apart.
    """

    folder: RunFolder
    events: list[Event]
    trained: set[int]
    predictions: int

    def pictures(self) -> dict[tuple[int, str], bytes]:
        """Pixels of every picture, by step and prompt."""
        told = [event for event in self.events if isinstance(event, SampleEvent)]
        paths = {(one.step, one.prompt): self.folder.root / one.path for one in told}
        assert sorted(paths.values()) == sorted(self.folder.samples.rglob("*.png"))
        return {place: np.asarray(Image.open(path)).tobytes() for place, path in paths.items()}

    def measured(self) -> dict[int, float]:
        """The loss of held-out pictures by step."""
        told = [event for event in self.events if isinstance(event, MeasuresEvent)]
        return {e.step: e.values["validation/loss"] for e in told if "validation/loss" in e.values}


def watched(case: Case, more: Leaves) -> Watched:
    config, folder = case.config(more), RunFolder(case.lab.folder())
    composed, _ = composed_of(config, folder.root)
    training, trained, calls = composed.training, set[int](), [0]
    take = Stepper.take

    def listen(self: Stepper, batches: list[Batch], *given: object, **named: object) -> object:
        trained.update(number for batch in batches for number in batch.numbers)
        before = calls[0]
        figures = take(self, batches, *given, **named)  # type: ignore[arg-type]
        calls[0] = before
        return figures

    def count(*_: object) -> None:
        calls[0] += 1

    hook = training.denoiser.register_forward_pre_hook(count)
    looks = looks_of(composed.config, training, composed.held_out, folder)
    with patch.object(Stepper, "take", listen):
        events = list(training.steps(folder, never, looks))
    hook.remove()
    return Watched(folder, events, trained, calls[0])


def is_drawn_before_and_after(case: Case) -> None:
    pictures = watched(case, case.row.flipped).pictures()
    assert watched(case, {}).pictures() == {}
    prompts = PROMPTED["validation_prompts"]
    assert set(pictures) == {(step, prompt) for step in (0, 4) for prompt in prompts}
    assert len(set(pictures.values())) == 4
    assert watched(case, case.row.flipped).pictures() == pictures


def is_drawn_on_the_way(case: Case) -> None:
    pictures = watched(case, case.row.flipped).pictures()
    prompt = "A photograph of a TOK"
    assert set(pictures) == {(0, prompt), (3, prompt), (4, prompt)}
    assert watched(case, {}).pictures() == {}


def takes_so_many_predictions(case: Case) -> None:
    # Two pictures before and two after, each of so many denoising steps.
    assert watched(case, {}).predictions == 4 * 2
    assert watched(case, case.row.flipped).predictions == 4 * 3


def is_followed_more_closely(case: Case) -> None:
    usual, other = watched(case, {}).pictures(), watched(case, case.row.flipped).pictures()
    assert set(usual) == set(other)
    assert all(usual[place] != other[place] for place in usual)


def is_kept_out(case: Case) -> None:
    without, held = watched(case, {}), watched(case, case.row.flipped)
    assert held.trained < without.trained
    assert len(held.trained) == len(without.trained) - 1
    assert without.measured() == {}
    assert set(held.measured()) == {0, 1, 2, 3, 4}
    assert len(set(held.measured().values())) == 5


def is_measured_then(case: Case) -> None:
    assert set(watched(case, case.row.flipped).measured()) == {0, 3, 4}


SAMPLE: list[Row] = [
    acts(
        "validation_prompts",
        "files",
        "each is a picture by the base model and by the trained one, the same in every such run",
        is_drawn_before_and_after,
        base=QUICK,
        flipped={"validation_prompts": PROMPTED["validation_prompts"]},
    ),
    acts(
        "sample_steps",
        "files",
        "pictures of the instance prompt are made on the way",
        is_drawn_on_the_way,
        base=QUICK,
        flipped={"sample_steps": 3},
    ),
    acts(
        "sample_inference_steps",
        "files",
        "a picture takes so many predictions",
        takes_so_many_predictions,
        base={**PROMPTED, "sample_guidance_scale": 1.0},
        flipped={"sample_inference_steps": 3},
    ),
    acts(
        "sample_guidance_scale",
        "files",
        "pictures are others",
        is_followed_more_closely,
        base=PROMPTED,
        flipped={"sample_guidance_scale": 1.5},
        families=("sd15", "sdxl"),
    ),
    acts(
        "validation_images",
        "batch",
        "one picture is never shown to a step, and its loss is told",
        is_kept_out,
        base={"max_train_steps": 4},
        flipped={"validation_images": 1, "validation_steps": 1},
    ),
    acts(
        "validation_steps",
        "files",
        "its loss is told after so many steps",
        is_measured_then,
        base=HELD_OUT,
        flipped={"validation_steps": 3},
    ),
    *idle("no pictures are made on the way", sample_inference_steps=3, sample_guidance_scale=2.0),
    *idle("no pictures are held out", validation_steps=2),
]
