"""Which looks a configuration asks for between the steps of a training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence

from trainer.config import TrainingConfig
from trainer.durable import disk_errors
from trainer.job import RunFolder
from trainer.looks import Gauges, Look, Moments
from trainer.previews import Previews
from trainer.sampling import Sampler
from trainer.tokens import token_names
from trainer.training import Training
from trainer.validation import HeldOut, history_of

# About so many times in a run held-out pictures are looked at.
_HELD_OUT_LOOKS = 10


def looks_of(
    config: TrainingConfig, training: Training, held_out: Sequence[int], folder: RunFolder
) -> list[Look]:
    """The looks of a training that stands where it begins or goes on.

    Args:
        config: the resolved configuration.
        training: before its next step.
        held_out: numbers of the pictures that are kept out of it.
        folder: of the run.
    """
    if training.step == 0 and training.accelerator.is_main_process:
        _remove_pictures(folder)
    total_steps, looks = training.total_steps, list[Look]()
    tokens = training.trainables.new_tokens
    gauges = Gauges(training.optimizer, tokens, token_names(config.token), total_steps)
    if gauges.has_any:
        looks.append(gauges)
    held_out = [number for number in held_out if training.dataset.counts(number)]
    if held_out:
        every = config.sample.validation_steps or math.ceil(total_steps / _HELD_OUT_LOOKS)
        looks.append(
            HeldOut(
                training.passes,
                training.dataset,
                held_out,
                moments=Moments(every, total_steps, from_base=True),
                spread=training.spread,
                trained=lambda: training.smoothed_loss,
                history=history_of(folder.read_events(), training.step),
            )
        )
    if prompts := config.preview_prompts():
        previews = _previews(config, training, prompts, folder)
        previews.is_cut = training.look_is_cut
        looks.append(previews)
    return looks


def _remove_pictures(folder: RunFolder) -> None:
    """Removes what another training in the folder left, which ended before a checkpoint."""
    if folder.samples.exists():
        with disk_errors(folder.samples):
            shutil.rmtree(folder.samples)


def _previews(
    config: TrainingConfig, training: Training, prompts: Sequence[str], folder: RunFolder
) -> Previews:
    data, sample = config.data, config.sample
    assert data.resolution_width is not None
    assert data.resolution_height is not None
    return Previews(
        training.family,
        training.text,
        prompts,
        Sampler(
            data.resolution_width,
            data.resolution_height,
            sample.sample_inference_steps,
            sample.sample_guidance_scale,
        ),
        seed=config.run.seed,
        moments=Moments(
            sample.sample_steps or training.total_steps, training.total_steps, from_base=True
        ),
        folder=folder,
        spread=training.spread,
    )
