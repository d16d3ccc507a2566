"""The engine against a training on one page: equal losses in each step, equal weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
import reference
import torch
from PIL import Image
from reference import Recipe
from skimage import data as photographs
from tiny import compose, configuration, losses, never

from trainer.families import load_family
from trainer.job import RunFolder

# The subject and its class: crops of two real photographs, at the trained size already.
SIZE = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pictures")
    for name, photograph, count in (
        ("subject", photographs.astronaut(), 5),
        ("class", photographs.cat(), 3),
    ):
        (root / name).mkdir()
        for number in range(count):
            corner = 40 * number
            crop = photograph[corner : corner + 200, corner : corner + 200]
            Image.fromarray(crop).resize((SIZE, SIZE)).save(root / name / f"{number}.png")
    return root / "subject", root / "class"


COMMON = {
    "resolution_width": SIZE,
    "resolution_height": SIZE,
    "max_train_steps": 20,
    "batch_size": 2,
    "learning_rate": 2e-4,
    "snr_gamma": None,
    "rank": 4,
    "tensorboard": False,
    "instance_prompt": "A photograph of a TOK",
}
# fal's defaults, with a smaller rank, batch and length.
PIVOTAL = {
    "use_dora": True,
    "train_text_encoder_ti": True,
    "with_prior_preservation": True,
    "photo_class": "Man",
    "segmenter": "luminance",
    "clip_seg_mask_prompt": "head",
    "snr_gamma": 0.5,
    "cache_latents": False,
    "center_crop": False,
    "random_rotation_start": -2,
    "random_rotation_end": 2,
    "max_train_steps": 10,
}
PRIOR_AND_MASKS = {
    "with_prior_preservation": True,
    "photo_class": "Man",
    "segmenter": "luminance",
    "clip_seg_mask_prompt": "head",
    "max_train_steps": 10,
}
FLOW = {"denoiser": "transformer", "steps": 10, "learning_rate": 1e-3}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "plain LoRA": ({"max_train_steps": 10}, {"steps": 10}, 1e-6),
    "pivotal with prior and masks": (
        PIVOTAL,
        {"use_dora": True, "pivot": 5, "masked": True, "rotation": 2, "snr_gamma": 0.5}
        | {"steps": 10},
        1e-6,
    ),
    "v-prediction": (
        {"snr_gamma": 5.0, "max_train_steps": 10},
        {"snr_gamma": 5.0, "steps": 10},
        1e-6,
    ),
    "full fine-tune": (
        {"use_lora": False, "learning_rate": 1e-4, "max_train_steps": 10},
        {"rank": None, "learning_rate": 1e-4, "steps": 10},
        1e-4,
    ),
    "FLUX.1 with prior and masks": (
        PRIOR_AND_MASKS | {"learning_rate": 1e-3},
        FLOW | {"masked": True, "targets": load_family("flux").target_modules},
        1e-6,
    ),
    "FLUX.2": (
        {"max_train_steps": 10, "learning_rate": 1e-3},
        FLOW | {"targets": load_family("flux2").target_modules},
        1e-6,
    ),
}
FOLDERS = {
    "v-prediction": "velocity_folder",
    "FLUX.1 with prior and masks": "flux_folder",
    "FLUX.2": "flux2_folder",
}


@pytest.fixture
def velocity_folder(tmp_path: Path) -> Path:
    return make_tiny_models.make_sdxl(tmp_path / "model", prediction_type="v_prediction")


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_computes_what_the_reference_computes(
    name: str, folders: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    leaves, recipe, tolerance = RECIPES[name]
    subject, of_class = folders
    base: Path = request.getfixturevalue(FOLDERS.get(name, "sdxl_folder"))
    prior = "with_prior_preservation" in leaves
    expected, learnt = reference.train(
        base,
        Recipe(
            pictures=sorted(subject.iterdir()),
            class_pictures=tuple(sorted(of_class.iterdir())) if prior else (),
            **recipe,
        ),
    )
    own = {"class_images_url": str(of_class)} if prior else {}

    config = configuration(base, subject, **(COMMON | leaves | own))
    training, _ = compose(config, tmp_path / "run")
    got = losses(list(training.steps(RunFolder(tmp_path / "run"), never)))

    # Losses of nearly clean pictures are small by min-SNR's weight, not by their arithmetic.
    assert got == pytest.approx(expected, rel=tolerance, abs=1e-8)
    # The last of the steps has moved: equal losses say something of the steps before.
    assert len({round(loss, 4) for loss in got}) > len(got) / 2
    ours = training.trainables.weights()[training.family.denoiser_name]
    theirs = {n: learnt[_in_the_reference(n, learnt)] for n in ours}
    for place, new in enumerate(training.trainables.new_tokens.values()):
        ours[f"rows {place}"], theirs[f"rows {place}"] = new.rows.detach(), learnt[f"rows {place}"]
    # Adam turns rounding of the smallest gradients into whole steps of single numbers.
    assert distance(ours, theirs) < 1e-3 * distance(theirs, {n: 0 * t for n, t in theirs.items()})


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance over all tensors together."""
    return math.sqrt(sum(float((ours[n] - theirs[n]).double().square().sum()) for n in theirs))


def _in_the_reference(name: str, learnt: dict[str, torch.Tensor]) -> str:
    """PEFT puts the adapter's name before the last word of a parameter's name."""
    if name in learnt:
        return name
    path, _, word = name.rpartition(".")
    return f"{path}.default.{word}"
