"""Finding and loading base models: folder, one file, hub; family, schedule and variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import single_file
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EDMEulerScheduler
from safetensors.torch import load_file, save_file

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import InputError

FULL = Precision(*[torch.float32] * 4)


HALF = Precision(torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16)


def settings(model: Path, **leaves: object) -> ModelConfig:
    return ModelConfig.model_validate({"model_url": str(model), **leaves})


def rewrite(path: Path, **entries: object) -> None:
    """Changes entries of a JSON file; None takes them out."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def copied(sd15_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD1.5 that a test may change."""
    return Path(shutil.copytree(sd15_folder, tmp_path / "model"))


@pytest.fixture
def one_file(copied: Path) -> Path:
    """The tiny SD1.5 as one file, in a folder with its configurations."""
    return single_file.write_sd15(
        DiffusionPipeline.from_pretrained(copied), copied / "model.safetensors"
    )


def with_tensors(path: Path, **tensors: torch.Tensor) -> ModelConfig:
    """The file with more tensors, or others."""
    save_file({**load_file(path), **tensors}, path)
    return settings(path, single_file_config=str(path.parent))


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


def test_the_vae_of_one_file_keeps_its_32_bits_while_the_rest_is_halved(one_file: Path) -> None:
    folder = one_file.parent
    located = base_model.locate(settings(one_file, single_file_config=str(folder)))
    loaded = base_model.load(located, HALF)
    other = base_model.load(base_model.locate(settings(folder)), HALF)
    assert loaded.denoiser.dtype == loaded.pipeline.text_encoder.dtype == torch.bfloat16
    for name, tensor in other.pipeline.vae.state_dict().items():
        assert torch.equal(loaded.pipeline.vae.state_dict()[name], tensor), name
    for name, tensor in other.denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], tensor), name


def test_a_contradicting_family_is_refused(sd15_folder: Path) -> None:
    with pytest.raises(InputError, match="is a `sd15` checkpoint"):
        base_model.locate(settings(sd15_folder, model_family="sdxl"))


def test_a_pipeline_of_no_known_family_is_refused_by_name(copied: Path) -> None:
    rewrite(copied / "model_index.json", _class_name="KandinskyPipeline")
    with pytest.raises(InputError, match="KandinskyPipeline"):
        base_model.locate(settings(copied))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        # Stable Diffusion 2.x, inpainting, and an SDXL denoiser under the plain pipeline's name.
        ({"use_linear_projection": True}, "has use_linear_projection `True`"),
        ({"in_channels": 9}, "has in_channels `9`"),
        ({"addition_embed_type": "text_time"}, "has addition_embed_type `text_time`"),
        ({"_class_name": "UNet3DConditionModel"}, "has _class_name `UNet3DConditionModel`"),
    ],
)
def test_another_denoiser_under_a_known_pipeline_is_refused(
    entries: dict[str, object], said: str, copied: Path
) -> None:
    rewrite(copied / "unet" / "config.json", **entries)
    with pytest.raises(InputError, match=said) as caught:
        base_model.locate(settings(copied))
    assert caught.value.problems[0].field == "model_url"


def test_a_refiner_lacks_a_text_encoder_and_is_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sdxl_folder, tmp_path / "refiner"))
    rewrite(copy / "model_index.json", text_encoder=[None, None])
    with pytest.raises(InputError, match="without text_encoder"):
        base_model.locate(settings(copy))


def test_entries_that_old_configurations_leave_out_are_no_difference(copied: Path) -> None:
    left_out = {"use_linear_projection": None, "addition_embed_type": None}
    rewrite(copied / "unet" / "config.json", **left_out)
    assert base_model.locate(settings(copied)).family_name == "sd15"


def test_one_file_for_inpainting_is_refused(one_file: Path) -> None:
    entrance = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    with pytest.raises(InputError, match="9 channels where a `sd15` has 4"):
        base_model.locate(with_tensors(one_file, **entrance))


def test_configurations_of_another_family_are_refused_beside_one_file(
    one_file: Path, sdxl_folder: Path
) -> None:
    with pytest.raises(InputError, match="does not describe a `sd15`") as caught:
        base_model.locate(settings(one_file, single_file_config=str(sdxl_folder)))
    assert caught.value.problems[0].field == "single_file_config"


def test_one_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="not a safetensors file"):
        base_model.locate(settings(path))


@pytest.mark.parametrize(
    ("markers", "prediction", "last_snr"),
    [
        # The share of signal left after 1000 steps of the scaled linear schedule is 0.00466.
        ([], "epsilon", 0.00466),
        (["v_pred"], "v_prediction", 0.00466),
        (["v_pred", "ztsnr"], "v_prediction", 0.0),
    ],
)
def test_markers_in_one_file_say_what_it_predicts(
    markers: list[str], prediction: str, last_snr: float, one_file: Path
) -> None:
    marked = with_tensors(one_file, **{name: torch.zeros(1) for name in markers})
    located = base_model.locate(marked)
    loaded = base_model.load(located, FULL)
    for objective in (
        base_model.objective_of(located),
        loaded.objective_class.from_scheduler(loaded.pipeline.scheduler),
    ):
        assert objective.prediction_type == prediction
        assert objective.snr(torch.tensor([999])).item() == pytest.approx(last_snr, rel=0.01)


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_one_file_of_the_edm_kind_is_refused(marker: str, one_file: Path) -> None:
    with pytest.raises(InputError, match=f"EDM kind.*{marker}"):
        base_model.locate(with_tensors(one_file, **{marker: torch.zeros(4)}))


def test_a_schedule_without_a_table_is_refused_by_name_before_anything_is_loaded(
    copied: Path,
) -> None:
    EDMEulerScheduler().save_pretrained(copied / "scheduler")
    with pytest.raises(InputError, match="EDMEulerScheduler"):
        base_model.locate(settings(copied))


def test_the_objective_is_known_without_the_weights(copied: Path) -> None:
    DDPMScheduler(num_train_timesteps=500).save_pretrained(copied / "scheduler")
    shutil.rmtree(copied / "text_encoder")
    objective = base_model.objective_of(base_model.locate(settings(copied)))
    objective.check_maximum(500)
    with pytest.raises(InputError, match="max_timestep_trained.*501.*500"):
        objective.check_maximum(501)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_skeleton_has_a_components_layers_and_no_data(
    family: str, request: pytest.FixtureRequest
) -> None:
    located = base_model.locate(settings(request.getfixturevalue(f"{family}_folder")))
    loaded = base_model.load(located, FULL)
    for component in ("unet", *loaded.text_encoder_names):
        skeleton = base_model.skeleton(located, component)
        whole = loaded.pipeline.components[component]
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        assert {name: p.shape for name, p in skeleton.named_parameters()} == {
            name: p.shape for name, p in whole.named_parameters()
        }
        assert [name for name, _ in skeleton.named_modules()] == [
            name for name, _ in whole.named_modules()
        ]


def test_a_skeleton_of_a_contradictory_configuration_is_refused(copied: Path) -> None:
    rewrite(copied / "unet" / "config.json", block_out_channels=[16])
    with pytest.raises(InputError, match="describes no model"):
        base_model.skeleton(base_model.locate(settings(copied)), "unet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model_index.json", "{", "`model_index.json`.*is not JSON"),
        ("unet/config.json", '"unet"', "`unet/config.json`.*no object"),
        ("vae/config.json", b"\xff\xfe", "`vae/config.json`.*is not JSON"),
    ],
)
def test_a_broken_description_is_refused(
    name: str, content: str | bytes, said: str, copied: Path
) -> None:
    (copied / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said):
        base_model.locate(settings(copied))


@pytest.mark.parametrize(
    ("part", "entry"), [("unet", "sample_size"), ("vae", "block_out_channels")]
)
def test_a_description_without_a_size_is_refused(part: str, entry: str, copied: Path) -> None:
    rewrite(copied / part / "config.json", **{entry: None})
    with pytest.raises(InputError, match=f"`{part}/config.json`.*no usable `{entry}`"):
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


def test_the_vae_stays_in_32_bits_while_the_rest_is_halved(sdxl_folder: Path) -> None:
    family = base_model.load(base_model.locate(settings(sdxl_folder)), HALF)
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


def test_a_variant_that_the_hub_lacks_is_put_down_to_the_variant(hub: str) -> None:
    located = base_model.locate(ModelConfig(model_url=hub, variant="fp16"))
    with pytest.raises(InputError, match="no weight files of `fp16`") as caught:
        base_model.load(located, FULL)
    (problem,) = caught.value.problems
    assert problem.field == "variant"
    assert "huggingface.co/owner/tiny/tree/main" in problem.hint


@pytest.mark.parametrize(
    ("part", "name"),
    [("text_encoder", "model"), ("unet", "diffusion_pytorch_model")],
)
def test_a_checkpoint_with_a_missing_weight_is_refused_and_not_completed_with_noise(
    part: str, name: str, copied: Path
) -> None:
    path = copied / part / f"{name}.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[3]
    save_file({key: tensor for key, tensor in weights.items() if key != gone}, path)
    with pytest.raises(InputError, match="lacks 1 weights"):
        base_model.load(base_model.locate(settings(copied)), FULL)


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model"])
def test_a_truncated_weight_file_is_refused(part: str, copied: Path) -> None:
    path = copied / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="could not be loaded"):
        base_model.load(base_model.locate(settings(copied)), FULL)
