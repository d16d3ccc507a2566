"""Likeness by CLIP: transformers' own arithmetic, and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from tiny_vision import tiny_clip, tiny_clipseg
from transformers import CLIPModel, CLIPVisionModelWithProjection

from trainer.errors import InputError
from trainer.images.likeness import Looker, likeness

# What CLIP's published preprocessor_config.json says.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(photographs.astronaut())


def test_an_embedding_is_that_of_the_whole_model_at_length_one(
    clip: Path, astronaut: Image.Image
) -> None:
    model = CLIPModel.from_pretrained(clip)
    side = model.config.vision_config.image_size
    pixels = torch.from_numpy(
        np.asarray(astronaut.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    )
    pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=pixels[None])
    expected = seen if isinstance(seen, torch.Tensor) else seen.pooler_output

    embedding = Looker(str(clip)).embedding(astronaut)

    assert embedding.shape == (16,)
    torch.testing.assert_close(embedding, expected[0] / expected[0].norm(), atol=1e-4, rtol=1e-4)


def test_a_model_of_the_image_half_alone_sees_the_same(
    clip: Path, astronaut: Image.Image, tmp_path: Path
) -> None:
    whole = CLIPModel.from_pretrained(clip)
    whole.config.vision_config.projection_dim = 16
    half = CLIPVisionModelWithProjection(whole.config.vision_config)
    half.vision_model.load_state_dict(whole.vision_model.state_dict())
    half.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    half.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (clip / "preprocessor_config.json").read_bytes()
    )

    torch.testing.assert_close(
        Looker(str(tmp_path)).embedding(astronaut), Looker(str(clip)).embedding(astronaut)
    )


def test_a_picture_is_like_itself_whatever_its_mode(clip: Path, astronaut: Image.Image) -> None:
    looker = Looker(str(clip))

    embedding = looker.embedding(astronaut.convert("RGBA"))

    assert likeness(embedding, [looker.embedding(astronaut)]) == pytest.approx(1, abs=1e-6)


def test_likeness_is_the_mean_cosine() -> None:
    one, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    between = torch.tensor([0.6, 0.8])

    assert likeness(one, [one, across]) == pytest.approx(0.5)
    assert likeness(one, [between, -one]) == pytest.approx((0.6 - 1) / 2)


def test_another_model_is_refused_by_the_name_of_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`--likeness`.*`clipseg` model; allowed: `clip`"):
        Looker(str(tiny_clipseg(tmp_path)))


def test_a_model_that_is_nowhere_is_refused_by_the_name_of_the_option() -> None:
    with pytest.raises(InputError, match="`--likeness`") as caught:
        Looker("nobody/no-such-clip")
    assert "nobody/no-such-clip" in str(caught.value)
