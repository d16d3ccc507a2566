"""Ranks and alphas, convolutions' own among them, and what an alpha of 0 is.

Numbers by hand: an adapter's strength is alpha over rank, and an alpha of 0 stands for the rank in
sd-scripts' `LoRAModule`, LyCORIS' `LoConModule` and ai-toolkit's `LoRAModule`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import import_file, lost, unneeded

from trainer.errors import InputError
from trainer.importers import Imported
from trainer.importers.adapted import BESIDE_CONVOLUTIONS, CONVOLUTIONS, WHOLE_BLOCKS

RANK, ALPHA = "network_args: conv_dim", "network_args: conv_alpha"
KOHYA, LYCORIS, FLUX = "networks.lora", "lycoris.kohya", "networks.lora_flux"


def kohya(folder: Path, module: str, *arguments: str, dim: int = 16, alpha: float = 4) -> Imported:
    text = f'network_module = "{module}"\nnetwork_dim = {dim}\nnetwork_alpha = {alpha}\n'
    return import_file(folder, "a.toml", f"{text}network_args = {list(arguments)}\n")


def adapts(found: Imported, layers: tuple[str, ...]) -> bool:
    return set(found.values["target_unet_modules"]) == {*WHOLE_BLOCKS["table"], *layers}


@pytest.mark.parametrize("module", [KOHYA, LYCORIS, FLUX])
def test_an_alpha_of_0_is_the_rank(module: str, tmp_path: Path) -> None:
    found = kohya(tmp_path, module, alpha=0)

    assert found.values["alpha"] == 16
    assert any("network_alpha 0 stands for the rank" in remark for remark in found.remarks)
    assert not {RANK, ALPHA} & lost(found).keys()
    assert not any("stands for the rank" in r for r in kohya(tmp_path, module).remarks)


def test_an_alpha_for_convolutions_without_a_rank_does_nothing_in_sd_scripts(
    tmp_path: Path,
) -> None:
    found = kohya(tmp_path, KOHYA, "conv_alpha=1")

    assert "does nothing without conv_dim" in unneeded(found)[ALPHA]
    assert adapts(found, ())


def test_an_alpha_for_convolutions_without_a_rank_counts_in_lycoris(tmp_path: Path) -> None:
    found = kohya(tmp_path, LYCORIS, "conv_alpha=1")
    alike = kohya(tmp_path, LYCORIS, "conv_alpha=4")
    none = kohya(tmp_path, LYCORIS)

    assert "alpha 4 over rank 16; there 1 over 16" in lost(found)[ALPHA]
    assert "as strong" in unneeded(alike)[ALPHA]
    assert ALPHA not in {entry.name for entry in none.left}
    assert all(adapts(each, CONVOLUTIONS) for each in (found, alike, none))


@pytest.mark.parametrize(
    ("module", "arguments", "dim", "alpha", "there"),
    [
        # sd-scripts gives convolutions an alpha of 1 where nothing is said.
        (KOHYA, ["conv_dim=16"], 16, 4, "there 1 over 16"),
        (KOHYA, ["conv_dim=16"], 16, 1, ""),
        (KOHYA, ["conv_dim=16", "conv_alpha=0"], 16, 16, ""),
        (KOHYA, ["conv_dim=16", "conv_alpha=0"], 16, 0, ""),
        (KOHYA, ["conv_dim=16", "conv_alpha=4"], 16, 0, "alpha 16 over rank 16; there 4 over 16"),
        # Another rank as strongly: 2 over 8 is 4 over 16.
        (KOHYA, ["conv_dim=8", "conv_alpha=2"], 16, 4, ""),
        (KOHYA, ["conv_dim=8", "conv_alpha=0"], 16, 4, "there 8 over 8"),
        # LyCORIS gives them the alpha of all other layers.
        (LYCORIS, ["conv_dim=16"], 16, 4, ""),
        (LYCORIS, ["conv_dim=8"], 16, 4, "there 4 over 8"),
    ],
)
def test_convolutions_are_told_where_they_are_stronger_or_weaker(
    module: str, arguments: list[str], dim: int, alpha: float, there: str, tmp_path: Path
) -> None:
    found = kohya(tmp_path, module, *arguments, dim=dim, alpha=alpha)

    assert there in lost(found).get(ALPHA, "")
    assert (ALPHA in lost(found)) is bool(there)
    assert (RANK in lost(found)) is ("conv_dim=8" in arguments)
    assert adapts(found, CONVOLUTIONS)


@pytest.mark.parametrize("module", [KOHYA, LYCORIS])
def test_a_rank_of_0_leaves_what_has_the_rank_of_linear_layers(module: str, tmp_path: Path) -> None:
    found = kohya(tmp_path, module, "conv_dim=0", "conv_alpha=1")

    assert adapts(found, BESIDE_CONVOLUTIONS)
    assert {RANK, ALPHA} <= unneeded(found).keys()


def test_presets_without_convolutions_adapt_none_at_any_rank(tmp_path: Path) -> None:
    found = kohya(tmp_path, LYCORIS, "preset=attn-mlp", "conv_dim=8", "conv_alpha=2")

    assert adapts(found, ())
    assert "preset attn-mlp" in unneeded(found)[RANK]
    assert lost(found) == {}


def test_a_transformer_has_no_convolutions(tmp_path: Path) -> None:
    found = kohya(tmp_path, FLUX, "conv_dim=8", "conv_alpha=1")

    assert {RANK, ALPHA} <= unneeded(found).keys()
    assert found.values["target_unet_modules"] == list(WHOLE_BLOCKS["flow"])


def test_a_rank_that_is_no_number_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="conv_dim") as caught:
        kohya(tmp_path, KOHYA, "conv_dim=many")

    assert len(caught.value.problems) == 1


def test_a_strength_that_falls_with_the_root_of_the_rank_counts_from_what_0_is(
    tmp_path: Path,
) -> None:
    found = kohya(tmp_path, LYCORIS, "rs_lora=True", alpha=0)

    # 16 over the root of 16 is 64 over 16.
    assert "alpha 64 is as strong" in lost(found)["network_args: rs_lora"]


# ai-toolkit.


def job(folder: Path, **network: Any) -> Imported:
    process = {
        **{"type": "sd_trainer", "model": {"name_or_path": "xl", "is_xl": True}},
        "network": {"type": "lora", **network},
        "datasets": [{"folder_path": "p"}],
    }
    text = yaml.safe_dump({"config": {"name": "me", "process": [process]}})
    return import_file(folder, "job.yaml", text)


def test_a_job_gives_convolutions_a_strength_of_one_by_itself(tmp_path: Path) -> None:
    weak = job(tmp_path, linear=16, linear_alpha=8, conv=16)
    whole = job(tmp_path, linear=16, linear_alpha=16, conv=16)

    assert "alpha 8 over rank 16; there 16 over 16" in lost(weak)["network.conv_alpha"]
    assert "network.conv_alpha" not in {entry.name for entry in whole.left}


def test_a_jobs_rank_goes_before_its_linear(tmp_path: Path) -> None:
    found = job(tmp_path, rank=32, linear=16, linear_alpha=32, conv=32, conv_alpha=0)

    assert found.values["rank"] == 32
    assert lost(found) == {}
    assert {"network.conv", "network.conv_alpha"} <= unneeded(found).keys()


@pytest.mark.parametrize("option", ["alpha", "linear_alpha"])
def test_a_jobs_alpha_of_0_is_its_rank(option: str, tmp_path: Path) -> None:
    assert job(tmp_path, linear=16, **{option: 0}).values["alpha"] == 16


def test_a_job_may_leave_convolutions_out(tmp_path: Path) -> None:
    found = job(tmp_path, linear=16, conv=0, conv_alpha=4)

    assert {"network.conv", "network.conv_alpha"} <= unneeded(found).keys()
    assert adapts(found, ())


@pytest.mark.parametrize("rank", ["-4", "nan", "inf"])
def test_a_rank_that_no_convolutions_can_have_is_refused(rank: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="conv_dim.*at least 0"):
        kohya(tmp_path, KOHYA, f"conv_dim={rank}")
