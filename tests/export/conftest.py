"""Trained adapters, made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from trained_adapters import TrainedAdapter, train

from trainer.export.facts import TrainingFacts


@pytest.fixture(scope="session")
def trained(
    sd15_folder: Path, sdxl_folder: Path, flux_folder: Path, flux2_folder: Path
) -> Callable[..., TrainedAdapter]:
    """`train` for a family by name, remembered by its arguments."""
    folders = {
        "sd15": sd15_folder,
        "sdxl": sdxl_folder,
        "flux": flux_folder,
        "flux2": flux2_folder,
    }

    @cache
    def remembered(family: str, algorithm: str = "lora", **options: object) -> TrainedAdapter:
        return train(folders[family], family, algorithm, **options)

    return remembered


@pytest.fixture
def facts() -> TrainingFacts:
    """A training as headers and cards may tell it."""
    return TrainingFacts(
        output_name="astronaut",
        base_model="owner/base",
        instance_prompts=('a "TOK" portrait: in space',),
        num_images=5,
        width=64,
        height=96,
        captions={"a portrait of TOK": 1, "TOK": 4},
        settings={
            "seed": 42,
            "learning_rate": 1e-4,
            "snr_gamma": 5.0,
            "images_data_url": "/private/place",
        },
    )
