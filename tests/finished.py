"""Finished tiny runs whose results are used, and the pictures that are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import snapshots
from tiny import configuration, never

from trainer import engine
from trainer.job import RunFolder
from trainer.runner import supervise

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "full": {"use_lora": False, "learning_rate": 1e-3, "train_text_encoder": True},
}
# Linear layers and convolutions near the end, whose changes show.
LAYERS = {"target_unet_modules": ["up_blocks.1.resnets.0.conv2", "conv_out", "to_v"]}
# So fast that two steps show in a picture.
FAST = {"learning_rate": 0.5, "max_train_steps": 2, "lr_warmup_steps": 0}


def finished(folder: Path, model: Path, photos: Path, **leaves: Any) -> Path:
    """A run that ends well; its files are not read back."""
    config = configuration(model, photos, **{**FAST, **leaves})
    with pytest.MonkeyPatch.context() as patch:
        snapshots.skip_reading_back(patch)
        result = supervise(config, RunFolder(folder), [], engine=engine.run, stop=never)
    assert result.status == "done", result.error
    return folder


def of_form(folder: Path, form: str, model: Path, photos: Path) -> Path:
    """A run on SD1.5 of one form of what learns."""
    return finished(folder / form, model, photos, **{**LAYERS, **FORMS[form]})
