"""Presets named after a GPU fit into it, counted on models of their true size without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_random_models import describe

from trainer import base_model
from trainer.base_model import Precision
from trainer.memory import training_footprint
from trainer.presets import list_presets, load_preset
from trainer.resolve import Layer, resolve

# For the driver, kernels' own workspaces and what allocation wastes.
SPARE = 2**30

# How many weights the published denoisers have.
PUBLISHED = {"flux": 11_901_408_320, "sdxl": 2_567_463_684}
GIGABYTES = {
    preset.name: int(preset.name.rpartition("-")[2].removesuffix("gb"))
    for preset in list_presets()
    if preset.name.endswith("gb")
}


# Of each family one that changes how weights are kept; the others in a thorough run.
SAMPLE = ("sdxl-8gb", "flux-12gb")


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_of_true_size_have_the_published_number_of_weights(
    family: str, tmp_path: Path
) -> None:
    base = describe(family, tmp_path, small=False, t5_layers=24)
    denoiser = base_model.skeleton(base, base.family.denoiser_name)
    assert sum(p.numel() for p in denoiser.parameters()) == PUBLISHED[family]


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.thorough)
        for name in GIGABYTES
    ],
)
def test_a_preset_fits_the_gpu_it_is_named_after(name: str, tmp_path: Path) -> None:
    describe(name.partition("-")[0], tmp_path, small=False, t5_layers=24)
    values = {
        "images_data_url": "photos",
        "model_url": str(tmp_path),
        "resolution_width": 1024,
        "resolution_height": 1024,
    }
    given = {**values, **load_preset(name).values, "model_url": str(tmp_path)}
    config = resolve([Layer("test", given, explicit=True)])
    narrow = torch.bfloat16
    assert config.adapter.use_lora or config.adapter.weights_dtype == "bf16"
    vae = torch.float32 if config.model.upscale_vae_32bit else narrow
    precision = Precision(frozen=narrow, denoiser=narrow, vae=vae, text_encoders=narrow)
    config = config.with_leaf("mixed_precision", "bf16")
    base = base_model.locate(config.model)
    footprint = training_footprint(base, precision, torch.device("cpu"), config)
    told = f"{footprint.peak_bytes / 2**30:.2f} GiB"
    assert footprint.peak_bytes + SPARE <= GIGABYTES[name] * 10**9, told
