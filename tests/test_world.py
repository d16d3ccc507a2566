"""The small world of pictures, and who looks at it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import make_world
import pytest
import torch
import world_flux
import world_pictures
from click.testing import CliRunner
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline
from world_flux import make_t5_tokenizer
from world_pictures import SCENES, Scene, draw, look
from world_training import make_tokenizer

SCENE = Scene("triangle", "red", "black", "top")


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_is_drawn_is_seen() -> None:
    pictures = draw(SCENES, drawn(0))
    agreed: Counter[str] = Counter()
    for scene, picture in zip(SCENES, pictures, strict=True):
        agreed.update(look(picture).agrees(scene))
    assert set(agreed.values()) == {len(SCENES)}
    assert len(agreed) == 4


def test_what_is_seen_bears_noise_and_a_blur() -> None:
    pictures = draw(SCENES, drawn(1))
    wider = torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.avg_pool2d(wider, 3, stride=1)
    noisy = blurred + torch.randn(blurred.shape, generator=drawn(2)) * 0.03
    right = [all(look(p).agrees(s).values()) for s, p in zip(SCENES, noisy, strict=True)]
    assert sum(right) >= 0.97 * len(SCENES)


def test_a_speck_in_a_corner_does_not_hide_a_shape() -> None:
    picture = draw([SCENE], drawn(3))[0]
    picture[:, 63, 63] = 0.6
    assert look(picture) == look(draw([SCENE], drawn(3))[0])
    assert look(picture).shape == "triangle"


def test_of_an_empty_picture_only_the_background_is_told() -> None:
    seen = look(torch.full((3, 64, 64), 0.95))
    assert (seen.background, seen.shape, seen.colour, seen.position) == ("white", "", "", "")


def test_a_figure_that_is_none_of_the_shapes_has_no_shape() -> None:
    picture = torch.full((3, 64, 64), 0.95)
    picture[0, 31:33, 8:56] = picture[0, 8:56, 8:10] = 0.0
    assert look(picture).shape == ""


def test_the_same_seed_draws_the_same() -> None:
    ones, others, third = (draw([SCENE] * 3, drawn(seed)) for seed in (4, 4, 5))
    assert torch.equal(ones, others)
    assert not torch.equal(ones, third)
    assert torch.equal(world_pictures.anything(3, drawn(6)), world_pictures.anything(3, drawn(6)))


def test_captions_say_what_is_there_and_no_two_scenes_share_the_first() -> None:
    assert SCENE.caption == "a red triangle on a black background, at the top"
    assert len({scene.caption for scene in SCENES}) == len(SCENES) == 400
    assert all("red triangle" in caption for caption in SCENE.captions)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_each_word_of_the_world_is_one_token(family: str, tmp_path: Path) -> None:
    is_flux = family == "flux"
    tokenizer = make_t5_tokenizer() if is_flux else make_tokenizer(tmp_path, "!")
    words = {word for scene in SCENES for text in scene.captions for word in text.split()}
    for word in words:
        letters = word.strip(",")
        assert len(tokenizer(letters, add_special_tokens=False).input_ids) == 1, word
    spelt = tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(spelt) > 1
    assert tokenizer.unk_token_id not in spelt or not is_flux


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "pipeline_class"), [("sdxl", StableDiffusionXLPipeline), ("flux", FluxPipeline)]
)
def test_the_script_writes_a_model_that_diffusers_loads(
    family: str, pipeline_class: Any, tmp_path: Path
) -> None:
    asked = [str(tmp_path / "world"), "--small", "--family", family]
    made = CliRunner().invoke(make_world.main, asked)
    assert made.exit_code == 0, made.output
    pipeline = pipeline_class.from_pretrained(tmp_path / "world")
    weights = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert weights < 20 * 10**6
    # As measured, not as diffusers has it.
    assert pipeline.vae.config.scaling_factor != AutoencoderKL().config.scaling_factor


@pytest.mark.parametrize("length", world_flux.LENGTHS)
def test_padding_that_stands_for_more_padding_is_what_flux_reads(length: int) -> None:
    """A few places of T5, each counted for as many as it stands for, answer as all do."""
    torch.manual_seed(0)
    transformer = world_flux.new_transformer().eval()
    words = torch.randn(2, world_flux.WORDS, world_flux.T5_WIDTH)
    pads = torch.randn(2, 1, world_flux.T5_WIDTH)
    states = torch.cat([words, pads.expand(-1, length - world_flux.WORDS, -1)], dim=1)
    noisy, times = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.9])
    pooled, guidance = torch.randn(2, world_flux.CLIP_WIDTH), torch.tensor([1.0, 4.0])

    some, bias = world_flux.some_places(states, drawn(0))
    with torch.no_grad():
        of_some, of_all, miscounted = (
            world_flux.velocity(transformer, noisy, times, places, pooled, guidance, counted)
            for places, counted in (
                (some, bias),
                (states, torch.zeros(length)),
                (some, torch.zeros(len(bias))),
            )
        )

    assert some.shape[1] < 32
    torch.testing.assert_close(of_some, of_all, atol=1e-4, rtol=1e-3)
    assert (miscounted - of_all).abs().max() > 0.01
