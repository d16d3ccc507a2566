"""`inspect` says what a file holds and what will trouble its readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import rewrite
from trained_adapters import TABLES, TrainedAdapter

from trainer.export.describe import describe
from trainer.export.diffusers import METADATA_KEY, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya
from trainer.export.state import Strength

FEW = ("attn2.to_k", "conv1")


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_text_encoders_of_their_own_rank_are_no_problem(
    format: str,
    algorithm: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    options = {"rank": 2, "alpha": 2, "text": Strength(1, 6.0), "targets": FEW}
    adapter = trained("sd15", algorithm, **options)
    path = tmp_path / "a.safetensors"
    if format == "kohya":
        write_kohya(path, adapter.state, adapter.names, facts, torch.float32)
    else:
        write_diffusers(path, adapter.state, torch.float32)

    found = describe(path, TABLES)

    assert {1, 2} <= found.ranks.keys()
    assert found.problems == []


def test_a_scale_that_lycoris_applies_twice_is_a_problem(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        for key in [key for key in tensors if key.endswith(".alpha")]:
            tensors[key] = tensors[key] * 2

    adapter = trained("sd15", "loha", targets=FEW)
    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)
    rewrite(tmp_path / "a", spoil)

    assert any("twice" in problem for problem in describe(tmp_path / "a", TABLES).problems)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_file_of_ours_is_described_without_problems(
    format: str,
    family: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family, alpha=2)
    path = tmp_path / "a.safetensors"
    if format == "kohya":
        write_kohya(path, adapter.state, adapter.names, facts, torch.float16)
    else:
        write_diffusers(path, adapter.state, torch.float16)

    found = describe(path, TABLES)

    assert (found.format, found.family, found.algorithm) == (format, family, "lora")
    assert found.ranks == {4: found.num_layers}
    assert found.alphas == {4.0: found.num_layers}
    assert found.components.keys() == adapter.state.components.keys()
    assert found.num_layers == len(adapter.state.layers())
    assert found.dtypes[0] == "float16"
    assert found.problems == []
    json.dumps(found.as_dict())


def test_the_meaning_of_dora_is_told(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)
    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    found = describe(tmp_path / "a", TABLES)

    assert found.dora_convention == "paper"
    assert any("diffusers ignores DoRA" in problem for problem in found.problems)
    assert any("ComfyUI and Forge read DoRA" in problem for problem in found.problems)


def test_nan_is_a_problem(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        key = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
        tensors[key] = tensors[key] * float("nan")

    found = _described_kohya(trained, facts, tmp_path, spoil)

    assert found == ["`unet.mid_block.resnets.0.conv1` holds NaN or infinite numbers"]


def test_mixed_and_missing_alphas_are_problems(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        keys = sorted(key for key in tensors if key.endswith(".alpha"))
        del tensors[keys[0]]
        tensors[keys[1]] = tensors[keys[1]] * 2

    found = _described_kohya(trained, facts, tmp_path, spoil)

    assert any("1 layers have no alpha" in problem for problem in found)
    assert any("alphas differ" in problem for problem in found)


def test_a_missing_header_and_a_missing_text_model_are_problems(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        header.clear()
        for key in [key for key in tensors if "_text_model" in key]:
            tensors[key.replace("_text_model", "")] = tensors.pop(key)

    found = _described_kohya(trained, facts, tmp_path, spoil)

    assert any("ss_base_model_version" in problem for problem in found)
    assert any("lack `text_model`" in problem for problem in found)


@pytest.mark.parametrize("has_header", [True, False])
def test_an_alpha_in_the_header_alone_or_nowhere_is_a_problem(
    has_header: bool, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        config = json.loads(header.pop(METADATA_KEY))
        if has_header:
            header[METADATA_KEY] = json.dumps(config | {"unet.lora_alpha": 2})

    write_diffusers(tmp_path / "a", trained("sd15", targets=FEW).state, torch.float32)
    rewrite(tmp_path / "a", spoil)

    problems = describe(tmp_path / "a", TABLES).problems

    assert len(problems) == 1
    assert ("header alone" if has_header else "no adapter configuration") in problems[0]


def test_magnitudes_without_weight_are_a_problem(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        for key in [key for key in tensors if "magnitude" in key]:
            tensors[key.removesuffix(".weight")] = tensors.pop(key)

    state = trained("sd15", targets=FEW, use_dora=True).state
    write_diffusers(tmp_path / "a", state, torch.float32)
    rewrite(tmp_path / "a", spoil)

    assert any("lack `.weight`" in text for text in describe(tmp_path / "a", TABLES).problems)


def _described_kohya(
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    folder: Path,
    spoil: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
) -> list[str]:
    adapter = trained("sd15", targets=FEW)
    write_kohya(folder / "a", adapter.state, adapter.names, facts, torch.float32)
    rewrite(folder / "a", spoil)
    return describe(folder / "a", TABLES).problems
