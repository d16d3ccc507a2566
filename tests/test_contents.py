"""Models left in their files: what they hold is known, and they are read when they are needed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import single_file
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from trainer import base_model, class_images
from trainer.base_model import BaseModel, Precision
from trainer.class_images import ClassImages
from trainer.config import ModelConfig
from trainer.contents import contents_digest, opened, weights_of
from trainer.families.base import Family
from trainer.sampling import Sampler

FULL = Precision(*[torch.float32] * 4)
HALF = Precision(*[torch.bfloat16] * 4)
ENCODERS = ("text_encoder", "vae")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copied(sd15_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD1.5 that a test may change."""
    return Path(shutil.copytree(sd15_folder, tmp_path / "model"))


def located(folder: Path, **leaves: object) -> BaseModel:
    return base_model.locate(ModelConfig.model_validate({"model_url": str(folder), **leaves}))


def seen(folder: Path, precision: Precision = FULL, **leaves: object) -> Family:
    """A base model opened as by a training that may not need its encoders."""
    return opened(located(folder, **leaves), precision, ENCODERS)


def double_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "vae" / WEIGHTS)
    tensors["quant_conv.weight"] *= 2
    save_file(tensors, folder / "vae" / WEIGHTS, metadata={"format": "pt"})


def test_encoders_seen_before_stay_in_their_files_until_they_are_needed(sd15_folder: Path) -> None:
    whole = seen(sd15_folder)
    assert not whole.unread.models

    family = seen(sd15_folder)

    assert family.unread.models.keys() == set(ENCODERS)
    assert family.pipeline.text_encoder is None
    assert not any(p.device.type == "cpu" for p in family.pipeline.vae.parameters())
    family.unread.have(*ENCODERS)
    assert not family.unread.models
    for name in ENCODERS:
        read = family.pipeline.components[name]
        for key, tensor in whole.pipeline.components[name].state_dict().items():
            assert torch.equal(read.state_dict()[key], tensor)
        assert not read.training
        assert not any(p.requires_grad for p in read.parameters())


def test_only_the_models_that_are_asked_for_are_read(sd15_folder: Path) -> None:
    seen(sd15_folder)
    family = seen(sd15_folder)

    family.unread.have("vae")
    family.unread.have("vae", "unet")

    assert family.unread.models.keys() == {"text_encoder"}
    assert family.pipeline.text_encoder is None


def test_contents_and_number_formats_are_the_same_read_or_not(sd15_folder: Path) -> None:
    whole, family = seen(sd15_folder, HALF), seen(sd15_folder, HALF)

    assert family.unread.models
    assert contents_digest(family) == contents_digest(whole)
    assert contents_digest(family, {"vae"}) == contents_digest(whole, {"vae"})
    assert [family.unread.dtype_of(name) for name in ("unet", *ENCODERS)] == [torch.bfloat16] * 3


def test_a_pipeline_knows_how_wide_a_latent_pixel_is_before_its_vae_is_read(copied: Path) -> None:
    file = copied / "vae" / "config.json"
    blocks = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 8,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | blocks))

    family = base_model.load(located(copied), FULL, later=dict.fromkeys(ENCODERS, "some digest"))

    assert family.pipeline.vae_scale_factor == 2


def test_a_file_that_was_changed_is_read_and_its_contents_are_others(copied: Path) -> None:
    before = contents_digest(seen(copied))
    state = (copied / "vae" / WEIGHTS).stat()
    double_a_weight(copied)
    os.utime(copied / "vae" / WEIGHTS, ns=(state.st_atime_ns, state.st_mtime_ns))

    family = seen(copied)

    assert family.unread.models.keys() == {"text_encoder"}
    assert contents_digest(family) != before


def test_another_number_format_is_another_content(sd15_folder: Path) -> None:
    seen(sd15_folder, FULL)

    assert not seen(sd15_folder, HALF).unread.models


def test_files_that_change_while_they_are_read_are_read_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = base_model.load

    def slowly(*given: Any, **named: Any) -> Family:
        family = load(*given, **named)
        double_a_weight(copied)
        return family

    with monkeypatch.context() as patch:
        patch.setattr(base_model, "load", slowly)
        seen(copied)

    assert seen(copied).unread.models.keys() <= {"text_encoder"}


def test_a_vae_of_the_users_own_is_known_by_its_own_files(
    copied: Path, sd15_folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(sd15_folder / "vae", tmp_path / "vae"))
    before = contents_digest(seen(sd15_folder, vae_url=str(own)))
    assert seen(sd15_folder, vae_url=str(own)).unread.models.keys() == set(ENCODERS)
    double_a_weight(tmp_path)

    family = seen(sd15_folder, vae_url=str(own))

    assert family.unread.models.keys() == {"text_encoder"}
    assert contents_digest(family) != before


def test_encoders_of_a_single_file_stay_there_too(copied: Path) -> None:
    file = single_file.write_sd15(
        DiffusionPipeline.from_pretrained(copied), copied / "model.safetensors"
    )
    model = located(file, single_file_config=str(copied))
    whole, family = (opened(model, FULL, ENCODERS) for _ in range(2))

    assert family.unread.models.keys() == set(ENCODERS)
    family.unread.have("vae")
    weight = whole.pipeline.vae.quant_conv.weight
    assert torch.equal(family.pipeline.vae.quant_conv.weight, weight)
    assert weights_of(model, "unet") == [file]


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    sd15_folder: Path, home: Path
) -> None:
    home.write_text("no folder")

    seen(sd15_folder)

    assert not seen(sd15_folder).unread.models


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_class_pictures_are_made_by_encoders_read_for_them(
    sd15_folder: Path, tmp_path: Path
) -> None:
    wanted = ClassImages("a man", 1, Sampler(64, 64, 1, 1.0), seed=0, base_contents="some model")
    made = []
    for name in ("one", "two"):
        family = seen(sd15_folder)
        assert bool(family.unread.models) == (name == "two")
        making = class_images.class_images(
            family,
            wanted,
            tmp_path / name,
            tmp_path / f"run {name}",
            process_index=0,
            num_processes=1,
            device=torch.device("cpu"),
        )
        list(making)
        made.append((tmp_path / f"run {name}" / "000.png").read_bytes())

    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("variant", "chosen"),
    [
        (None, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("fp16", ["model-00001-of-00001.fp16.safetensors"]),
        ("bf16", ["model.bf16.safetensors"]),
    ],
)
def test_the_files_of_the_variant_that_is_read_are_the_weights(
    copied: Path, variant: str | None, chosen: list[str]
) -> None:
    folder = copied / "unet"
    (folder / WEIGHTS).unlink()
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model-00001-of-00001.fp16.safetensors",
        "model.other-00001-of-00001.safetensors",
        "model.bf16.safetensors",
    ):
        (folder / name).touch()

    found = weights_of(located(copied, variant=variant), "unet")

    assert found == [folder / name for name in chosen]
