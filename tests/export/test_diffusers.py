"""The diffusers file and the PEFT folder: keys, shapes and configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from trained_adapters import TrainedAdapter

from trainer.export.diffusers import (
    FILE_NAME,
    METADATA_KEY,
    kronecker_split,
    write_diffusers,
    write_peft_folders,
)
from trainer.export.readers import metadata_of
from trainer.export.state import Strength


def test_keys_are_pefts_with_text_model_and_magnitudes_with_weight(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained("sdxl", use_dora=True, alpha=2)

    write_diffusers(tmp_path / FILE_NAME, adapter.state, torch.float32)

    keys = load_file(tmp_path / FILE_NAME).keys()
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder", "text_encoder_2"}
    endings = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
    assert all(key.endswith(endings) for key in keys)
    assert all(".text_model." in key for key in keys if key.startswith("text_encoder"))
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "unet.mid_block.resnets.0.conv1.lora_magnitude_vector.weight" in keys


def test_the_header_is_minimal_and_says_alpha_equals_rank(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    write_diffusers(tmp_path / FILE_NAME, trained("sd15", alpha=2).state, torch.float32)

    metadata = metadata_of(tmp_path / FILE_NAME)
    config = json.loads(metadata[METADATA_KEY])

    assert metadata["format"] == "pt"
    assert {key.partition(".")[2] for key in config} == {
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "bias",
    }
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.rank_pattern"]) == (4, 4, {})
    assert config["unet.target_modules"] == sorted(config["unet.target_modules"])


def test_layers_of_another_rank_stand_in_the_patterns(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    state = trained("sd15", rank=8, alpha=8, second_rank=2).state

    write_diffusers(tmp_path / FILE_NAME, state, torch.float32)

    config = json.loads(metadata_of(tmp_path / FILE_NAME)[METADATA_KEY])
    pattern = config["unet.rank_pattern"]
    assert config["unet.r"] == 8
    assert set(pattern.values()) == {2}
    assert pattern == config["unet.alpha_pattern"]
    assert "mid_block.resnets.0.conv1" in pattern


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_each_component_has_its_own_rank_in_the_header_and_no_pattern(
    algorithm: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    state = trained("sdxl", algorithm, alpha=2, text=Strength(2, 6.0), targets=("to_q",)).state

    write_diffusers(tmp_path / FILE_NAME, state, torch.float32)

    config = json.loads(metadata_of(tmp_path / FILE_NAME)[METADATA_KEY])
    alpha = "lora_alpha" if algorithm == "lora" else "alpha"
    for component, rank in (("unet", 4), ("text_encoder", 2), ("text_encoder_2", 2)):
        assert config[f"{component}.r"] == config[f"{component}.{alpha}"] == rank
        assert config[f"{component}.rank_pattern"] == config[f"{component}.alpha_pattern"]
        # Full Kronecker factors stand in the pattern with a rank of their own.
        if algorithm != "lokr":
            assert config[f"{component}.rank_pattern"] == {}


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_the_same_adapter_gives_the_same_bytes(
    algorithm: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    state = trained("sd15", algorithm, alpha=2).state

    for name in ("first", "second"):
        write_diffusers(tmp_path / name / FILE_NAME, state, torch.float16)
        write_peft_folders(tmp_path / name, state, torch.float16)

    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_file_modes_follow_the_umask(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    previous = os.umask(0o027)
    try:
        write_diffusers(tmp_path / FILE_NAME, trained("sd15").state, torch.float32)
    finally:
        os.umask(previous)

    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("factor", [-1, 2, 4, 8, 16])
def test_dimensions_split_as_in_peft(factor: int) -> None:
    for dimension in (1, 2, 7, 16, 32, 36, 48, 320, 640, 768, 1280, 2048, 3072):
        assert kronecker_split(dimension, factor) == factorization(dimension, factor)


def test_the_peft_folder_says_how_it_is_split(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    state = trained("sd15", "lokr", alpha=2, decompose_factor=4, decompose_both=True).state

    written = write_peft_folders(tmp_path, state, torch.float32)

    config = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "text_encoder/adapter_config.json",
        "text_encoder/adapter_model.safetensors",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    assert (config["peft_type"], config["alpha"], config["r"]) == ("LOKR", 4, 4)
    assert config["decompose_both"] is False
    assert all(
        key.startswith("base_model.model.")
        for key in load_file(tmp_path / "unet" / "adapter_model.safetensors")
    )
