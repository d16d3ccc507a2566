"""Forecasts of memory, remembered: on one machine the same training is foreseen once."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from typing import Any

import diffusers
import peft
import torch
import transformers

from trainer.base_model import BaseModel, Precision
from trainer.cache import cache_folder
from trainer.config import TrainingConfig
from trainer.data.store import Store, key_of
from trainer.leaves import PLACES
from trainer.memory import Footprint, Forecast
from trainer.sections.subjects import class_sources

# Part of every key: raised when the same training takes another amount of memory by code here.
_VERSION = 1
_MAX_BYTES = 2**22

# Leaves that nothing takes more or less memory for: where things lie, how long and how fast.
_OF_NO_SIZE = PLACES | {
    *("seed", "max_train_steps", "num_train_epochs", "learning_rate", "text_encoder_lr"),
    *("instance_prompt", "output_name", "checkpointing_steps"),
}


class Foreseen:
    """Footprints of trainings of a base model on one device, from the user's cache folder.

    Args:
        base: as found.
        device: where the trainings run.
    """

    def __init__(self, base: BaseModel, device: torch.device) -> None:
        self._base, self._device = base, device
        self._store = Store(cache_folder() / "forecasts", _MAX_BYTES)

    def footprint(self, config: TrainingConfig, precision: Precision) -> Footprint:
        """As `Forecast.footprint`, which raises the same."""
        key = self._key(config, precision)
        remembered = self._store.get(key)
        if remembered is not None:
            return Footprint(**json.loads(remembered))
        footprint = self._forecast.footprint(config, precision)
        self._store.put(key, json.dumps(asdict(footprint)).encode())
        return footprint

    @cached_property
    def _forecast(self) -> Forecast:
        return Forecast(self._base, self._device)

    @cached_property
    def _models(self) -> dict[str, Any]:
        """The configurations of the base model's parts."""
        family = self._base.family
        parts = (family.denoiser_name, "vae", *family.text_encoder_names)
        return {part: self._base.configurations.read_json(f"{part}/config.json") for part in parts}

    def _key(self, config: TrainingConfig, precision: Precision) -> str:
        values = config.values()
        facts = {
            "version of forecasts": _VERSION,
            "configuration": {n: v for n, v in values.items() if n not in _OF_NO_SIZE},
            "class pictures": [
                (source.prompt, source.url is None) for source in class_sources(config.subjects())
            ],
            "family": self._base.family_name,
            "models": self._models,
            "number formats": str(precision),
            "device": self._device.type,
            "libraries": [m.__version__ for m in (torch, diffusers, transformers, peft)],
        }
        return key_of("forecast of a training", facts)
