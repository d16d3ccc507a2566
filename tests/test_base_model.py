"""Finding and loading base models: folder, one file, hub; family, variant and VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import make_tiny_models
import pytest
import single_file
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import InputError

FULL = Precision(torch.float32, torch.float32, torch.float32)


def settings(model: Path, **leaves: object) -> ModelConfig:
    return ModelConfig.model_validate({"model_url": str(model), **leaves})


@pytest.fixture
def copied(sd15_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD1.5 that a test may change."""
    return Path(shutil.copytree(sd15_folder, tmp_path / "model"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_file_holds_the_same_model_as_the_folder(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    write = {"sd15": single_file.write_sd15, "sdxl": single_file.write_sdxl}[family]
    path = write(DiffusionPipeline.from_pretrained(folder), tmp_path / "model.safetensors")
    located = base_model.locate(settings(path, single_file_config=str(folder)))
    one = base_model.load(located, FULL)
    other = base_model.load(base_model.locate(settings(folder)), FULL)
    assert located.family_name == family
    text, expected = one.encode_text(["a TOK"]), other.encode_text(["a TOK"])
    for name in expected:
        torch.testing.assert_close(text[name], expected[name])
    for name, tensor in other.denoiser.state_dict().items():
        assert torch.equal(one.denoiser.state_dict()[name], tensor), name
    for name, tensor in other.pipeline.vae.state_dict().items():
        assert torch.equal(one.pipeline.vae.state_dict()[name], tensor), name


def test_a_contradicting_family_is_refused(sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="is a `sd15` checkpoint"):
        base_model.locate(settings(sd15_folder, model_family="sdxl"))


def test_a_pipeline_of_no_known_family_is_refused_by_name(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["_class_name"] = "KandinskyPipeline"
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="KandinskyPipeline"):
        base_model.locate(settings(copied))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("missing/folder/of/mine", "no `missing/folder/of/mine`"),
        ("owner/not-in-the-cache", "out of reach"),
        ("gone.safetensors", "no file `gone.safetensors`"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_with_what_to_do(model: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        base_model.locate(ModelConfig(model_url=model))
    assert caught.value.problems[0].field == "model_url"
    assert caught.value.problems[0].hint


def test_a_lora_is_no_base_model(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.alpha": torch.ones(())}, path)
    with pytest.raises(InputError, match="no complete checkpoint"):
        base_model.locate(settings(path))


def test_the_variant_decides_which_weights_are_loaded(copied: Path) -> None:
    plain = copied / "unet" / "diffusion_pytorch_model.safetensors"
    halved = {name: tensor / 2 for name, tensor in load_file(plain).items()}
    save_file(halved, copied / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = copied / part / f"{name}.safetensors"
        shutil.copy(weights, weights.with_name(f"{name}.fp16.safetensors"))
    loaded = base_model.load(base_model.locate(settings(copied, variant="fp16")), FULL)
    name = "conv_in.weight"
    assert torch.equal(loaded.denoiser.state_dict()[name], halved[name])


def test_a_missing_variant_is_refused_with_the_files_there_are(sd15_folder: Path) -> None:
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors"):
        base_model.locate(settings(sd15_folder, variant="fp16"))


def test_an_explicit_vae_of_the_same_latent_space_is_used(
    sd15_folder: Path, tmp_path: Path
) -> None:
    other = make_tiny_models.make_sd15(tmp_path / "other", seed=1) / "vae"
    located = base_model.locate(settings(sd15_folder, vae_url=str(other)))
    loaded = base_model.load(located, FULL)
    expected = load_file(other / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        loaded.pipeline.vae.state_dict()["encoder.conv_in.weight"],
        expected["encoder.conv_in.weight"],
    )


def test_an_explicit_vae_of_another_latent_space_is_refused(
    sd15_folder: Path, sdxl_folder: Path
) -> None:
    with pytest.raises(InputError, match="scaling_factor"):
        base_model.locate(settings(sd15_folder, vae_url=str(sdxl_folder / "vae")))


def test_a_default_vae_of_another_latent_space_yields_and_says_so(
    sd15_folder: Path, sdxl_folder: Path
) -> None:
    wanted = settings(sd15_folder, vae_url=str(sdxl_folder / "vae"))
    located = base_model.locate(wanted, vae_is_explicit=False)
    assert located.settings.vae_url is None
    assert [note.field for note in located.notes] == ["vae_url"]


def test_the_vae_stays_in_32_bits_while_the_rest_is_halved(sdxl_folder: Path) -> None:
    precision = Precision(frozen=torch.bfloat16, denoiser=torch.bfloat16, vae=torch.float32)
    family = base_model.load(base_model.locate(settings(sdxl_folder)), precision)
    assert family.pipeline.vae.dtype == torch.float32
    assert family.denoiser.dtype == torch.bfloat16
    assert family.pipeline.text_encoder_2.dtype == torch.bfloat16


@pytest.fixture
def hub(sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id in an offline cache, with a second revision whose conv_in is halved."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    for revision, commit in (("main", "a" * 40), ("halved", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(sd15_folder, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    path = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_in.weight": weights["conv_in.weight"] / 2}, path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "owner/tiny"


def test_a_revision_of_the_hub_is_the_one_that_is_loaded(hub: str) -> None:
    loaded = [
        base_model.load(base_model.locate(ModelConfig(model_url=hub, revision=revision)), FULL)
        for revision in (None, "halved")
    ]
    main, halved = (family.denoiser.state_dict()["conv_in.weight"] for family in loaded)
    assert torch.equal(main / 2, halved)
