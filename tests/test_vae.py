"""Another VAE than the base model's own: which fit, which give way, and what is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import make_tiny_models
import pytest
import single_file
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import InputError

FULL = Precision(*[torch.float32] * 4)


def settings(model: Path, vae: Path | str) -> ModelConfig:
    return ModelConfig(model_url=str(model), vae_url=str(vae))


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VAE of SDXL's latent space with weights of its own."""
    return make_tiny_models.make_sdxl(tmp_path_factory.mktemp("other"), seed=1) / "vae"


def weights(vae: Path) -> dict[str, torch.Tensor]:
    return load_file(vae / "diffusion_pytorch_model.safetensors")


def test_an_explicit_vae_of_the_same_latent_space_is_used(
    sd15_folder: Path, tmp_path: Path
) -> None:
    other = make_tiny_models.make_sd15(tmp_path / "other", seed=1) / "vae"
    located = base_model.locate(settings(sd15_folder, other))
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
        base_model.locate(settings(sd15_folder, sdxl_folder / "vae"))


def test_a_default_vae_of_another_latent_space_yields_and_says_so(
    sd15_folder: Path, sdxl_folder: Path
) -> None:
    wanted = settings(sd15_folder, sdxl_folder / "vae")
    located = base_model.locate(wanted, vae_is_explicit=False)
    assert located.settings.vae_url is None
    assert [note.field for note in located.notes] == ["vae_url"]


def in_the_original_layout(vae: Path, path: Path) -> None:
    state = single_file.original_vae(weights(vae), 4)
    save_file({n.removeprefix("first_stage_model."): t for n, t in state.items()}, path)


def inside_a_checkpoint(vae: Path, path: Path) -> None:
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_file(single_file.original_vae(weights(vae), 4) | others, path)


def in_diffusers_layout(vae: Path, path: Path) -> None:
    shutil.copy(vae / "diffusion_pytorch_model.safetensors", path)


@pytest.mark.parametrize(
    "write", [in_the_original_layout, inside_a_checkpoint, in_diffusers_layout]
)
def test_one_file_is_loaded_whole_and_scaled_as_the_base_models_own(
    write: object, other_vae: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    assert callable(write)
    write(other_vae, path)
    loaded = base_model.load(base_model.locate(settings(sdxl_folder, path)), FULL).pipeline.vae
    expected = weights(other_vae)
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Podell et al. 2023 give SDXL's scale; without a configuration diffusers takes SD1.5's.
    assert loaded.config.scaling_factor == 0.13025


def test_a_missing_file_is_refused_before_anything_is_loaded(sdxl_folder: Path) -> None:
    with pytest.raises(InputError, match="no file `gone.safetensors`") as caught:
        base_model.locate(settings(sdxl_folder, "gone.safetensors"))
    assert caught.value.problems[0].field == "vae_url"


def test_one_file_with_other_latent_channels_is_refused_from_its_header(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    sixteen = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=16)
    save_file(sixteen.state_dict(), path)
    with pytest.raises(InputError, match="16 latent channels.* has 4"):
        base_model.locate(settings(sdxl_folder, path))


def test_one_file_with_other_layers_is_refused(
    other_vae: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    in_the_original_layout(other_vae, path)
    lacking = load_file(path)
    del lacking["encoder.conv_in.bias"]
    save_file(lacking, path)
    with pytest.raises(InputError, match="layers.* are not those"):
        base_model.locate(settings(sdxl_folder, path))


def test_one_file_with_names_that_diffusers_cannot_read_is_refused(
    other_vae: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    # Attention layers as diffusers called them before its version 0.17.
    old = {name.replace(".to_q.", ".query."): t for name, t in weights(other_vae).items()}
    save_file(old, path)
    with pytest.raises(InputError, match="layers.* are not those"):
        base_model.locate(settings(sdxl_folder, path))


def test_one_file_without_a_vae_is_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.alpha": torch.ones(())}, path)
    with pytest.raises(InputError, match="holds no VAE"):
        base_model.locate(settings(sdxl_folder, path))


def test_entries_that_a_configuration_leaves_out_have_diffusers_defaults(
    sd15_folder: Path, tmp_path: Path
) -> None:
    # The configurations of Stable Diffusion 1.5 are older than `scaling_factor`.
    old = Path(shutil.copytree(sd15_folder / "vae", tmp_path / "vae"))
    config = (old / "config.json").read_text()
    shorter = "".join(line for line in config.splitlines(True) if "scaling_factor" not in line)
    assert shorter != config
    (old / "config.json").write_text(shorter)
    assert base_model.locate(settings(sd15_folder, old)).settings.vae_url == str(old)


def test_a_tiny_autoencoder_is_no_vae_to_train_with(
    sd15_folder: Path, other_vae: Path, tmp_path: Path
) -> None:
    tiny = Path(shutil.copytree(other_vae, tmp_path / "vae"))
    config = (tiny / "config.json").read_text().replace("AutoencoderKL", "AutoencoderTiny")
    (tiny / "config.json").write_text(config)
    with pytest.raises(InputError, match="_class_name AutoencoderTiny"):
        base_model.locate(settings(sd15_folder, tiny))


def test_a_default_vae_of_another_family_yields_without_the_hub(sd15_folder: Path) -> None:
    wanted = settings(sd15_folder, "madebyollin/sdxl-vae-fp16-fix")
    located = base_model.locate(wanted, vae_is_explicit=False)
    assert located.settings.vae_url is None
    (note,) = located.notes
    assert (note.kind, note.field) == ("yielded", "vae_url")
    assert "another family" in note.message


@pytest.mark.parametrize("url", ["madebyollin/sdxl-vae-fp16-fix", "owner/vae"])
def test_a_default_vae_out_of_reach_is_an_error_that_says_how_to_do_without(
    url: str, sdxl_folder: Path
) -> None:
    with pytest.raises(InputError, match=f"the default `{url}`.*out of reach") as caught:
        base_model.locate(settings(sdxl_folder, url), vae_is_explicit=False)
    (problem,) = caught.value.problems
    assert problem.field == "vae_url"
    assert "`vae_url: null`" in problem.hint


def test_one_file_with_statistics_beside_its_layers_is_the_models_own(flux2_folder: Path) -> None:
    own = flux2_folder / "vae" / "diffusion_pytorch_model.safetensors"
    located = base_model.locate(settings(flux2_folder, own))
    assert located.settings.vae_url == str(own)
