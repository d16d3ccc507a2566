"""Whose file it is, and files whose layers have the original implementation's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import rewrite, run_verification
from click.testing import CliRunner
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_flux2_lora_to_diffusers
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import TABLES, TrainedAdapter, train

from trainer import tensorfile
from trainer.cli import cli
from trainer.errors import InputError
from trainer.export.describe import describe
from trainer.export.diffusers import FILE_NAME, METADATA_KEY, write_diffusers, write_peft_folders
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya
from trainer.export.read import convert, open_adapter, read_adapter
from trainer.export.readers import metadata_of

# Layers of FLUX.2 as ai-toolkit names them, with rows and inputs at a width of 8.
ORIGINAL = {
    "double_blocks.0.img_attn.qkv": (24, 8),
    "double_blocks.0.txt_attn.proj": (8, 8),
    "double_blocks.1.img_mlp.0": (48, 8),
    "double_blocks.1.txt_mlp.2": (8, 24),
    "single_blocks.1.linear1": (72, 8),
    "single_blocks.1.linear2": (8, 32),
}
# Attention of the double blocks, which two families have alike.
SHARED = ("add_q_proj", "add_k_proj", "add_v_proj")


def original_file(path: Path, layers: dict[str, tuple[int, int]]) -> Path:
    """A random LoRA of rank 2 under the keys of ai-toolkit."""
    torch.manual_seed(11)
    tensors: dict[str, Tensor] = {}
    for layer, (rows, inputs) in layers.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(2, inputs)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 2)
    tensorfile.write(path, tensors, {})
    return path


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change B A of each layer of a diffusers file."""
    mark = ".lora_A.weight"
    layers = [key.removesuffix(mark) for key in tensors if key.endswith(mark)]
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}{mark}"] for n in layers}


def test_names_of_the_original_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    source = original_file(tmp_path / "a", ORIGINAL)

    convert(source, tmp_path / "b", "diffusers", TABLES)

    found = products(load_file(tmp_path / "b"))
    expected = products(_convert_non_diffusers_flux2_lora_to_diffusers(load_file(source)))
    assert found.keys() == expected.keys()
    assert len(found) == len(ORIGINAL) + 2
    for layer, product in found.items():
        torch.testing.assert_close(product, expected[layer])


def test_names_of_the_original_become_those_of_a_kohya_file(tmp_path: Path) -> None:
    source = original_file(tmp_path / "a", ORIGINAL)

    convert(source, tmp_path / "b", "kohya", TABLES)

    kohya = load_file(tmp_path / "b")
    names = {key.split(".")[0] for key in kohya}
    assert names == {f"lora_unet_{layer.replace('.', '_')}" for layer in ORIGINAL}
    before, layer = load_file(source), "single_blocks.1.linear1"
    up, down = (kohya[f"lora_unet_single_blocks_1_linear1.lora_{p}.weight"] for p in ("up", "down"))
    scale = kohya["lora_unet_single_blocks_1_linear1.alpha"] / down.shape[0]
    expected = (
        before[f"diffusion_model.{layer}.lora_B.weight"]
        @ before[f"diffusion_model.{layer}.lora_A.weight"]
    )
    torch.testing.assert_close(up @ down * scale, expected)


def test_alphas_beside_names_of_the_original_count(tmp_path: Path) -> None:
    layer = "double_blocks.0.img_attn.proj"
    source = original_file(tmp_path / "a", {layer: (8, 8)})
    before = load_file(source)[f"diffusion_model.{layer}.lora_B.weight"]
    rewrite_plain(source, {f"diffusion_model.{layer}.alpha": torch.tensor(1.0)})

    [parts] = read_adapter(source, TABLES).layers().values()

    # Alpha 1 of rank 2.
    assert torch.equal(parts["lora_B"], before * 0.5)


def rewrite_plain(path: Path, more: dict[str, Tensor]) -> None:
    """The file with further tensors."""
    tensorfile.write(path, {**load_file(path), **more}, {})


def test_a_description_tells_of_names_of_the_original(tmp_path: Path) -> None:
    found = describe(original_file(tmp_path / "a", ORIGINAL), TABLES)

    assert (found.format, found.family, found.num_layers) == ("original", "flux2", 8)
    assert any("original implementation's names" in problem for problem in found.problems)


def test_names_of_an_original_that_is_not_known_are_refused(tmp_path: Path) -> None:
    unknown = original_file(tmp_path / "a", {"layers.0.attention.to_q": (8, 8)})
    with pytest.raises(InputError, match="of a family other than"):
        read_adapter(unknown, TABLES)

    with pytest.raises(InputError, match="names are not known of `sd15`, only of: flux"):
        read_adapter(unknown, TABLES, "sd15")

    rewrite_plain(unknown, {"diffusion_model.x.diff": torch.ones(1)})
    with pytest.raises(InputError, match=r"unknown key `diffusion_model.x.diff`"):
        read_adapter(unknown, TABLES)


@pytest.mark.parametrize("family", ["flux", "flux2"])
@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_a_diffusers_file_tells_its_family_on_the_way_to_kohya_and_back(
    algorithm: str, family: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained(family, algorithm, alpha=2)
    write_diffusers(tmp_path / "a", adapter.state, torch.float32)
    assert describe(tmp_path / "a", TABLES).family == family

    convert(tmp_path / "a", tmp_path / "b", "kohya", TABLES)

    version = metadata_of(tmp_path / "b")["ss_base_model_version"]
    assert version == TABLES[family].base_model_version
    # Without a header, rows for each input tell the layers of one name apart.
    tensorfile.write(tmp_path / "b", load_file(tmp_path / "b"), {})
    assert open_adapter(tmp_path / "b", TABLES).family == family
    layers = read_adapter(tmp_path / "b", TABLES).layers()
    assert layers.keys() == read_adapter(tmp_path / "a", TABLES).layers().keys()


def test_layers_that_two_families_have_alike_need_the_family_named(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained("flux2", targets=SHARED)
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_diffusers(source, adapter.state, torch.float32)

    with pytest.raises(InputError, match="--family"):
        convert(source, target, "kohya", TABLES)

    convert(source, target, "kohya", TABLES, family="flux2")
    version = metadata_of(target)["ss_base_model_version"]
    assert version == TABLES["flux2"].base_model_version
    assert describe(source, TABLES).family is None
    assert describe(source, TABLES, "flux").family == "flux"


def test_the_command_that_inspects_takes_a_family(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    source = tmp_path / "a.safetensors"
    write_diffusers(source, trained("flux2", targets=SHARED).state, torch.float32)

    right = CliRunner().invoke(cli, ["inspect", str(source), "--family", "flux2", "--json"])
    wrong = CliRunner().invoke(cli, ["inspect", str(source), "--family", "flux3"])

    assert json.loads(right.stdout)["family"] == "flux2"
    assert isinstance(wrong.exception, InputError)
    assert "there is no family `flux3`" in str(wrong.exception)


@pytest.mark.parametrize("version", ["flux1", ""])
def test_layers_of_t5_are_refused_by_name(version: str, tmp_path: Path) -> None:
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {
        f"{name}.{part}.weight": torch.ones(2, 2)
        for name in (layer, "lora_unet_single_blocks_0_linear2")
        for part in ("lora_up", "lora_down")
    }
    tensorfile.write(tmp_path / "a", tensors, {"ss_base_model_version": version})

    for family in (None, "flux"):
        with pytest.raises(InputError, match=f"`{layer}`; T5 layers are not read"):
            read_adapter(tmp_path / "a", TABLES, family)


@pytest.fixture(scope="module")
def of_unequal_ranks(flux_folder: Path) -> TrainedAdapter:
    """An adapter on two kinds of layers of which one's path is the ending of the other's."""
    ranks = {"^proj_out": 2, r"single_transformer_blocks\.\d+\.proj_out": 3}
    targets = ("attn.to_q", "proj_out")
    # PEFT remarks on patterns of which a text encoder has no layer.
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match"):
        return train(flux_folder, "flux", targets=targets, rank_pattern=ranks, alpha_pattern=ranks)


def test_layers_whose_paths_end_alike_keep_their_ranks(
    of_unequal_ranks: TrainedAdapter, facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter, first = of_unequal_ranks, tmp_path / FILE_NAME
    write_diffusers(first, adapter.state, torch.float32)
    write_kohya(tmp_path / "k", adapter.state, adapter.names, facts, torch.float32)
    folders = write_peft_folders(tmp_path / "peft", adapter.state, torch.float32)

    kohya = (tmp_path / "k").rename(tmp_path / "k.safetensors")
    files = [("diffusers_lora", first), ("kohya_lora", kohya)]
    files += [("peft_folder", path) for path in folders]
    checks, _ = run_verification(tmp_path, files, adapter)

    header = json.loads(metadata_of(first)[METADATA_KEY])
    assert header["transformer.r"] == 4
    assert header["transformer.rank_pattern"] == {
        "^proj_out": 2,
        "single_transformer_blocks.0.proj_out": 3,
        "single_transformer_blocks.1.proj_out": 3,
    }
    assert not [check for check in checks if check.status == "failed"]
    passed = {(check.role, check.reader) for check in checks if check.status == "passed"}
    assert passed >= {("diffusers_lora", "diffusers"), ("diffusers_lora", "formula")}

    convert(first, tmp_path / "b", "kohya", TABLES)
    convert(tmp_path / "b", tmp_path / "c", "diffusers", TABLES)
    before, after = load_file(first), load_file(tmp_path / "c")
    assert before.keys() == after.keys()
    for key in before:
        # Times 3 / 4 and back.
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


def test_a_pattern_that_stands_for_other_layers_too_is_found(
    of_unequal_ranks: TrainedAdapter, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    write_diffusers(path, of_unequal_ranks.state, torch.float32)

    def without_anchor(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        header[METADATA_KEY] = header[METADATA_KEY].replace("^", "")

    rewrite(path, without_anchor)
    checks, _ = run_verification(tmp_path, [("diffusers_lora", path)], of_unequal_ranks)

    assert {check.reader: check.status for check in checks} == {
        "diffusers": "failed",
        "formula": "failed",
    }
    with pytest.raises(InputError, match="is of rank 3, where the header says 2"):
        convert(path, tmp_path / "b", "kohya", TABLES)
    # The family is told by names, whatever the ranks.
    found = describe(path, TABLES)
    assert any("another rank than the header says" in problem for problem in found.problems)
