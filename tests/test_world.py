"""The small world of pictures, and who looks at it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import make_world
import pytest
import torch
import world_pictures
from click.testing import CliRunner
from diffusers import StableDiffusionXLPipeline
from world_pictures import SCENES, Scene, draw, look

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


def test_each_word_of_the_world_is_one_token(tmp_path: Path) -> None:
    tokenizer = make_world.make_tokenizer(tmp_path, "!")
    words = {word for scene in SCENES for text in scene.captions for word in text.split()}
    for word in words:
        letters = word.strip(",")
        assert len(tokenizer(letters, add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) > 1


@pytest.mark.thorough
def test_the_script_writes_a_model_that_diffusers_loads(tmp_path: Path) -> None:
    made = CliRunner().invoke(make_world.main, [str(tmp_path / "world"), "--small"])
    assert made.exit_code == 0, made.output
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "world")
    weights = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert weights < 20 * 10**6
    assert pipeline.vae.config.scaling_factor != 0.13025
