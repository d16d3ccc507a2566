"""CLIPSeg: the real classes on tiny weights, its arithmetic, and what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from tiny_vision import tiny_clipseg, tiny_llava
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from trainer.errors import InputError
from trainer.images.clipseg import clipseg, identity_of
from trainer.images.masks import mask_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clipseg(tmp_path_factory.mktemp("clipseg"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(photographs.astronaut()).crop((0, 0, 300, 200))


def both_logits(folder: Path, image: Image.Image, prompt: str) -> torch.Tensor:
    """The logits of prompt and nothing, with the preparation of pictures written out by hand."""
    squeezed = image.resize((352, 352), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(squeezed, np.float32) / 255)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((pixels - mean) / deviation).permute(2, 0, 1).expand(2, -1, -1, -1)
    words = CLIPTokenizer.from_pretrained(folder)([prompt, ""], padding=True, return_tensors="pt")
    model = CLIPSegForImageSegmentation.from_pretrained(folder)
    with torch.no_grad():
        return model(**words, pixel_values=pixels).logits


def test_the_map_is_the_models_own_size_in_single_precision(
    folder: Path, astronaut: Image.Image
) -> None:
    logits = clipseg(str(folder))(astronaut, "head")

    assert logits.shape == (352, 352)
    assert logits.dtype == np.float32
    assert np.ptp(logits) > 0.1


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.001), (0.5, 0.01), (4.0, 0.3)])
def test_the_mask_is_cog_sdxls_softmax_over_the_prompt_and_nothing(
    folder: Path, astronaut: Image.Image, temperature: float, bias: float
) -> None:
    mask = mask_of(clipseg(str(folder))(astronaut, "head"), temperature=temperature, bias=bias)

    # preprocess.py: softmax(logits / temp)[0] + bias, clamped, divided by its maximum.
    logits = both_logits(folder, astronaut, "head").double()
    expected = ((logits / temperature).softmax(0)[0] + bias).clamp(0, 1)
    np.testing.assert_allclose(mask, (expected / expected.max()).numpy(), atol=1e-6)


def test_another_prompt_and_another_picture_give_another_map(
    folder: Path, astronaut: Image.Image
) -> None:
    segmenter = clipseg(str(folder))

    head = segmenter(astronaut, "head")

    assert not np.allclose(head, segmenter(astronaut, "rocket"))
    assert not np.allclose(head, segmenter(astronaut.rotate(180), "head"))


def test_nothing_against_nothing_is_zero_everywhere(folder: Path, astronaut: Image.Image) -> None:
    assert not clipseg(str(folder))(astronaut, "").any()


def test_a_grey_picture_is_one_of_equal_colours(folder: Path, astronaut: Image.Image) -> None:
    segmenter, grey = clipseg(str(folder)), astronaut.convert("L")

    np.testing.assert_array_equal(segmenter(grey, "head"), segmenter(grey.convert("RGB"), "head"))


def test_the_published_models_older_description_is_read(
    copy: Path, folder: Path, astronaut: Image.Image
) -> None:
    (copy / "processor_config.json").unlink()
    older = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": 352,
    }
    (copy / "preprocessor_config.json").write_text(json.dumps(older))

    logits = clipseg(str(copy))(astronaut, "head")

    np.testing.assert_array_equal(logits, clipseg(str(folder))(astronaut, "head"))


def test_a_prompt_longer_than_the_model_reads_is_refused(
    folder: Path, astronaut: Image.Image
) -> None:
    with pytest.raises(InputError) as caught:
        clipseg(str(folder))(astronaut, "the head of a person " * 5)

    assert caught.value.problems[0].field == "clip_seg_mask_prompt"
    assert "reads 77" in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nobody/clipseg", "hub is out of reach"),
        ("/no/such/folder", "there is no folder"),
    ],
)
def test_a_model_that_cannot_be_had_names_the_ways_out(url: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        clipseg(url)

    (problem,) = caught.value.problems
    assert problem.field == "clipseg_url"
    assert reason in problem.message
    assert "local folder" in problem.hint
    assert 'clip_seg_mask_prompt: ""' in problem.hint
    assert "masks of your own" in problem.hint


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no `config\.json`"):
        clipseg(str(tmp_path))


def test_another_model_is_refused_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a `llava` model; allowed: `clipseg`"):
        clipseg(str(tiny_llava(tmp_path)))


def test_weights_with_a_tensor_missing_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("decoder.reduces.1.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match=r"1 tensors are missing, such as `decoder\.reduces"):
        clipseg(str(copy))


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["decoder.reduces.1.weight"] = torch.zeros(3, 5)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match="clipseg_url"):
        clipseg(str(copy))


def test_weights_cut_off_in_the_download_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

    with pytest.raises(InputError, match="could not be loaded"):
        clipseg(str(copy))


def test_weights_in_pickle_are_not_opened(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()

    with pytest.raises(InputError, match="could not be loaded"):
        clipseg(str(copy))


def test_a_folder_is_known_by_what_it_holds(folder: Path, copy: Path, tmp_path: Path) -> None:
    other = tiny_clipseg(tmp_path / "other", seed=1)

    assert identity_of(str(copy)) == identity_of(str(folder))
    assert identity_of(str(other)) != identity_of(str(folder))
