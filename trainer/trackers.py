"""The curves and pictures of a training in TensorBoard and Weights & Biases.

Both load their library when a run begins.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Any

from trainer.config import TrainingConfig
from trainer.durable import disk_errors
from trainer.errors import InputError
from trainer.events import Event, MeasuresEvent, RunEvent, SampleEvent, StepEvent
from trainer.job import RunFolder
from trainer.listeners import EventLog, Listener, Quiet


def scalars(event: StepEvent) -> dict[str, float]:
    """The curves that a step adds a point to, by name."""
    return {
        "train/loss": event.loss,
        "train/smoothed_loss": event.smoothed_loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/step_seconds": event.seconds,
        "train/epoch": float(event.epoch),
    }


def sample_name(event: SampleEvent) -> str:
    """What the pictures of one prompt are called, at all steps."""
    return f"samples/{event.number}"


class TensorBoard(Quiet):
    """Writes curves for TensorBoard; a resumed run replaces the points it computes again."""

    def __init__(self, folder: RunFolder) -> None:
        self._logs, self._root = folder.logs, folder.root
        self._curves: Any = None

    def __exit__(self, *_: object) -> None:
        if self._curves is not None:
            self._curves.close()

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """Adds the points of a step."""

    @hear.register
    def _(self, event: RunEvent) -> None:
        module = importlib.import_module("trainer.curves")
        self._curves = module.CurveFile(
            self._logs, first_step=event.start_step + bool(event.start_step)
        )

    @hear.register
    def _(self, event: StepEvent) -> None:
        self._curves.add(event.step, scalars(event))

    @hear.register
    def _(self, event: MeasuresEvent) -> None:
        self._curves.add(event.step, event.values)

    @hear.register
    def _(self, event: SampleEvent) -> None:
        self._curves.add_picture(event.step, sample_name(event), self._root / event.path)


class WeightsAndBiases(Quiet):
    """Sends curves to Weights & Biases; a resumed run goes on in the same place there.

    Raises:
        InputError: the package `wandb` is not installed.
    """

    def __init__(self, config: TrainingConfig, folder: RunFolder) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError.of(
                "wandb",
                "needs the package `wandb`, which is not installed",
                "pip install 'tok-trainer[wandb]', or leave --wandb out",
            ) from error
        self._config = config
        self._folder = folder
        self._run: Any = None

    def __exit__(self, *ended: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(any(ended)))

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """Sends the points of a step."""

    @hear.register
    def _(self, event: RunEvent) -> None:
        place = f"{self._config.fingerprint()} {self._folder.root.resolve()}"
        with disk_errors(self._folder.logs):
            self._folder.logs.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._wandb.init(
                project="tok-trainer",
                name=self._config.output.output_name,
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
                resume="allow",
                dir=str(self._folder.logs),
                config=self._config.values() | event.details,
            )
        except self._wandb.errors.Error as error:
            raise InputError.of(
                "wandb",
                f"Weights & Biases refused the run: {error}",
                "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out",
            ) from error

    @hear.register
    def _(self, event: StepEvent) -> None:
        self._run.log(scalars(event), step=event.step)

    @hear.register
    def _(self, event: MeasuresEvent) -> None:
        self._run.log(event.values, step=event.step)

    @hear.register
    def _(self, event: SampleEvent) -> None:
        image = self._wandb.Image(str(self._folder.root / event.path), caption=event.prompt)
        self._run.log({sample_name(event): image}, step=event.step)


def logs_for(config: TrainingConfig, folder: RunFolder) -> Sequence[Listener]:
    """The listeners that keep a run: always the event log, the curves as configured.

    Raises:
        InputError: a wanted one is not installed.
    """
    wanted: list[Listener] = [EventLog(folder)]
    if config.run.tensorboard:
        wanted.append(TensorBoard(folder))
    if config.run.wandb:
        wanted.append(WeightsAndBiases(config, folder))
    return wanted
