"""What only a GPU can show: half precision, its scaler, 8-bit state, resume on the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import configuration, losses, train

from trainer import engine
from trainer.errors import Interrupted
from trainer.events import StepEvent, VerifyEvent
from trainer.job import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "all weights": {"use_lora": False, "learning_rate": 1e-5},
    "8-bit": {"optimizer": "adamw8bit"},
    "uncached": {"cache_latents": False, "gradient_checkpointing": True},
    "pivotal": {
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "num_class_images": 2,
        "class_inference_steps": 2,
        "segmenter": "luminance",
        "clip_seg_mask_prompt": "head",
    },
    "pivotal, waiting denoiser": {
        "train_text_encoder_ti": True,
        "disable_unet_during_ti_training": True,
        "gradient_checkpointing": True,
    },
    "text encoders": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
    "all text weights": {
        "use_lora": False,
        "train_text_encoder": True,
        "extract_rank": 4,
        "learning_rate": 1e-5,
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_on_the_gpu_and_its_files_are_verified(
    precision: str, form: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"mixed_precision": precision, **FORMS[form]}
    events = train(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    statuses = {event.status for event in events if isinstance(event, VerifyEvent)}
    assert len(losses(events)) == 4
    assert all(math.isfinite(loss) for loss in losses(events))
    assert "passed" in statuses
    assert "failed" not in statuses


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy"])
def test_a_stopped_run_goes_on_on_the_gpu(
    optimizer: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    config = configuration(
        sdxl_folder, photo_folder, optimizer=optimizer, learning_rate=rate, mixed_precision="fp16"
    )
    whole = train(config, tmp_path / "whole")
    first: list[Any] = []

    def wished() -> bool:
        return any(isinstance(event, StepEvent) and event.step >= 2 for event in first)

    with pytest.raises(Interrupted):
        for event in engine.run(config, RunFolder(tmp_path / "parts"), wished):
            first.append(event)
    rest = train(config, tmp_path / "parts")
    assert losses(rest) == pytest.approx(losses(whole)[2:], rel=1e-3)


def test_a_step_whose_fp16_gradients_overflow_is_tried_again_until_it_counts(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    # The scaler starts at 2**16: the first attempts overflow, and still every step is taken.
    config = configuration(sd15_folder, photo_folder, mixed_precision="fp16")
    events = train(config, tmp_path)
    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert len(norms) == 4
    assert all(math.isfinite(norm) for norm in norms)
