"""Pictures made with the base model: what decides them, and what making them leaves alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import base_model, randomness
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import NonFiniteError
from trainer.families.base import Family
from trainer.sampling import Sampler, sample

FULL = Precision(*[torch.float32] * 4)
HALF = Precision(torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)
# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLER = Sampler(width=64, height=64, steps=2, guidance_scale=3.0)


def load(folder: Path, precision: Precision = FULL) -> Family:
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), precision)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_folder")
    return path


@pytest.fixture(scope="module")
def family(folder: Path) -> Family:
    return load(folder)


def picture(
    family: Family,
    sampler: Sampler = SAMPLER,
    *,
    prompt: str = "a man",
    negative_prompt: str | None = None,
    seed: int = 0,
    purpose: str = "test",
    number: int = 0,
) -> Image.Image:
    return sample(
        family,
        prompt,
        sampler,
        seed=seed,
        purpose=purpose,
        number=number,
        negative_prompt=negative_prompt,
    )


def test_a_picture_is_the_one_that_the_pipeline_itself_makes(family: Family) -> None:
    ours = picture(family, seed=7, number=3)
    generator = torch.Generator().manual_seed(randomness.key(7, "test", 3))
    theirs = family.pipeline(
        "a man", width=64, height=64, num_inference_steps=2, guidance_scale=3.0, generator=generator
    ).images[0]
    difference = np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)
    # Rounding on either side of a half.
    assert np.abs(difference).max() <= 1


def test_the_same_key_makes_the_same_picture(family: Family) -> None:
    assert picture(family).tobytes() == picture(family).tobytes()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"number": 1}, {"purpose": "other"}, {"prompt": "a boat"}],
)
def test_another_key_or_prompt_makes_another_picture(
    family: Family, change: dict[str, object]
) -> None:
    assert picture(family).tobytes() != picture(family, **change).tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"steps": 3}, {"guidance_scale": 5.0}])
def test_steps_and_guidance_act(family: Family, change: dict[str, float]) -> None:
    other = replace(SAMPLER, **change)  # type: ignore[arg-type]
    assert picture(family, SAMPLER).tobytes() != picture(family, other).tobytes()


def test_a_negative_prompt_acts_only_with_guidance(family: Family) -> None:
    without = replace(SAMPLER, guidance_scale=1.0)
    plain, led_away = (picture(family, negative_prompt=p) for p in (None, "a boat"))
    assert plain.tobytes() != led_away.tobytes()
    plain, led_away = (picture(family, without, negative_prompt=p) for p in (None, "a boat"))
    assert plain.tobytes() == led_away.tobytes()


def test_no_guidance_is_the_same_at_one_and_below(family: Family) -> None:
    at_one, at_zero = (picture(family, replace(SAMPLER, guidance_scale=g)) for g in (1.0, 0.0))
    assert at_one.tobytes() == at_zero.tobytes()


def test_a_picture_has_the_size_asked_for(family: Family) -> None:
    made = picture(family, replace(SAMPLER, width=96, height=64))
    assert (made.size, made.mode) == ((96, 64), "RGB")


def test_a_single_step_is_enough_for_a_picture(family: Family) -> None:
    assert picture(family, replace(SAMPLER, steps=1)).size == (64, 64)


def test_no_global_random_state_moves(family: Family) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    picture(family)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_global_random_state_makes_no_difference(family: Family) -> None:
    pictures = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pictures.append(picture(family).tobytes())
    assert pictures[0] == pictures[1]


def test_scheduler_and_weights_are_left_as_they_were(family: Family) -> None:
    pipeline = family.pipeline
    scheduler, state = pipeline.scheduler, repr(vars(pipeline.scheduler))
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = [{n: t.clone() for n, t in part.state_dict().items()} for part in modules]
    picture(family)
    assert pipeline.scheduler is scheduler
    assert repr(vars(scheduler)) == state
    for part, before in zip(modules, weights, strict=True):
        assert all(torch.equal(tensor, before[n]) for n, tensor in part.state_dict().items())


def test_the_scheduler_comes_back_after_a_failure(family: Family) -> None:
    scheduler = family.pipeline.scheduler
    with pytest.raises(ValueError, match="divisible by 8"):
        picture(family, replace(SAMPLER, width=65))
    assert family.pipeline.scheduler is scheduler


@pytest.mark.parametrize(
    "precision",
    [
        HALF,
        Precision(*[torch.bfloat16] * 4),
        # All weights of the denoiser learn: they are in 32 bits, the text encoders are not.
        replace(HALF, denoiser=torch.float32),
        replace(HALF, denoiser=torch.float32, text_encoders=torch.float32),
    ],
)
def test_number_formats_of_the_parts_may_differ(folder: Path, precision: Precision) -> None:
    exact, rounded = (np.asarray(picture(load(folder, p))).astype(int) for p in (FULL, precision))
    assert np.abs(exact - rounded).mean() < 8
    assert exact.std() > 1


def test_a_vae_that_overflows_is_named(folder: Path) -> None:
    family = load(folder)
    family.pipeline.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError) as caught:
        picture(family)
    assert "upscale_vae_32bit" in caught.value.hint


def test_a_denoiser_that_overflows_is_named(folder: Path) -> None:
    family = load(folder)
    family.denoiser.conv_out.bias.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError) as caught:
        picture(family)
    assert "mixed_precision" in caught.value.hint
