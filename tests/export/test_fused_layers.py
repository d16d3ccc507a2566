"""Files of transformers whose layers are one in kohya files: FLUX.1 and FLUX.2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import Change, rewrite, run_checks, run_verification
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import TABLES, TrainedAdapter

from trainer.errors import InputError
from trainer.export.diffusers import FILE_NAME, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.fusing import split
from trainer.export.kohya import kohya_tensors, write_kohya
from trainer.export.read import convert, read_adapter
from trainer.export.state import with_text_model
from trainer.export.verify import Check, WrittenFile

FAMILIES = ("flux", "flux2")
KINDS = {
    "lora": ("lora", {"alpha": 2}),
    "dora": ("lora", {"alpha": 2, "use_dora": True}),
    "loha": ("loha", {"alpha": 2}),
    "lokr": ("lokr", {"alpha": 2}),
}
# Some parts of layers that are one in the file, and the layer whose halves change places.
PARTIAL = ("attn.to_q", "attn.to_v", "add_k_proj", "norm_out.linear")


def write_both(
    root: Path, adapter: TrainedAdapter, facts: TrainingFacts, dtype: torch.dtype = torch.float32
) -> list[tuple[str, Path]]:
    write_diffusers(root / FILE_NAME, adapter.state, dtype)
    files = [("diffusers_lora", root / FILE_NAME)]
    conventions = ("paper", "comfyui") if adapter.state.use_dora else ("paper",)
    for convention in conventions:
        role = "kohya_lora" if convention == "paper" else "kohya_lora_comfyui"
        path = root / f"{role}.safetensors"
        write_kohya(
            path,
            adapter.state,
            adapter.names,
            facts,
            dtype,
            convention=convention,
            base_weight=adapter.base_weight,
        )
        files.append((role, path))
    return files


def by_reader(checks: list[Check]) -> dict[tuple[str, str], str]:
    return {(check.role, check.reader): check.status for check in checks}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, PARTIAL], ids=["many", "partial"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_gets_the_trained_weights(
    kind: str,
    targets: tuple[str, ...] | None,
    family: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    algorithm, options = KINDS[kind]
    adapter = trained(family, algorithm, targets=targets, **options)
    files = write_both(tmp_path, adapter, facts)

    checks, _ = run_verification(tmp_path, files, adapter)

    assert not [check for check in checks if check.status == "failed"]
    passed = [check for check in checks if check.status == "passed"]
    assert {check.role for check in passed} == {role for role, _ in files}
    for check in passed:
        assert check.keys_matched == check.keys_total > 0
        assert check.largest_change_difference < 1e-5
    # Two independent readers of the file for other programs.
    readers = {check.reader for check in passed if check.role == "kohya_lora"}
    assert readers >= {"lycoris", "formula"}


def test_stock_diffusers_reads_the_file_where_its_reader_knows_no_width(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    for family, status in (("flux2", "passed"), ("flux", "not checked")):
        adapter = trained(family, "lora", alpha=2)
        files = write_both(tmp_path, adapter, facts)
        checks, _ = run_verification(tmp_path, files, adapter)
        assert by_reader(checks)["kohya_lora", "diffusers"] == status
    [check] = [c for c in checks if c.status == "not checked"]
    assert check.reason.endswith("at width 3072 only")


def test_stock_diffusers_reads_lokr_of_blocks_where_the_family_has_it(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    cases = {
        ("flux2", None): ("passed", ""),
        ("flux2", ("x_embedder", "to_q")): ("not checked", "`lycoris_x_embedder` is in none"),
        ("flux", ("attn.to_q",)): ("not checked", "no LoKr in kohya files of this family"),
    }
    for (family, targets), (status, reason) in cases.items():
        adapter = trained(family, "lokr", alpha=2, targets=targets)
        [_, kohya] = write_both(tmp_path, adapter, facts)
        checks, _ = run_verification(tmp_path, [kohya], adapter)
        [check] = [check for check in checks if check.reader == "diffusers"]
        assert check.status == status
        assert check.reason.endswith(reason)


@pytest.mark.parametrize(
    ("family", "layer", "name"),
    [
        ("flux", "x_embedder", "lora_unet_img_in"),
        ("flux2", "single_stream_modulation.linear", "lora_unet_single_stream_modulation_lin"),
    ],
)
def test_layers_that_diffusers_drops_are_not_called_checked_by_it(
    family: str,
    layer: str,
    name: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family, "lora", alpha=2, targets=("to_out.0", layer))
    files = write_both(tmp_path, adapter, facts)

    checks, _ = run_verification(tmp_path, files, adapter)

    status = by_reader(checks)
    assert status["kohya_lora", "diffusers"] == "not checked"
    assert status["kohya_lora", "lycoris"] == status["kohya_lora", "formula"] == "passed"
    assert name in next(check.reason for check in checks if check.status == "not checked")


def rows_of(start: int, end: int, factor: float) -> Change:
    """Scales a range of the rows of every fused first factor, in twelfths."""

    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        for key in [key for key in tensors if "qkv.lora_up" in key]:
            unit = tensors[key].shape[0] // 12
            tensors[key][start * unit : end * unit] *= factor

    return change


def with_another_order(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """The rows of k before those of q."""
    for key in [key for key in tensors if "qkv.lora_up" in key]:
        q, k, v = tensors[key].chunk(3)
        tensors[key] = torch.cat([k, q, v])


def with_columns_in_another_order(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    for key in [key for key in tensors if "qkv.lora_down" in key]:
        tensors[key] = tensors[key].flip(0)


def without_rows_of_the_mlp(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    for key in [key for key in tensors if "linear1.lora_up" in key]:
        tensors[key] = tensors[key][: tensors[key].shape[0] * 3 // 7].contiguous()


def with_halves_as_in_diffusers(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    key = "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"
    tensors[key] = torch.cat(tensors[key].chunk(2)[::-1])


def with_alpha_of_the_parts(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """The factors as they were trained: their readers divide by the sum of the ranks."""
    for key in [key for key in tensors if "qkv.lora_up" in key]:
        tensors[key] = tensors[key] / 3


def under_an_unfused_name(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    for key in [key for key in tensors if "img_attn_proj" in key]:
        number, _, part = key.removeprefix("lora_unet_double_blocks_").partition(".")
        block = number.split("_")[0]
        tensors[f"lycoris_transformer_blocks_{block}_attn_to_out_0.{part}"] = tensors.pop(key)


BROKEN = {
    "another order of q, k and v": with_another_order,
    "another order of the factors": with_columns_in_another_order,
    "no rows of the mlp": without_rows_of_the_mlp,
    "halves not swapped": with_halves_as_in_diffusers,
    "alpha of the parts": with_alpha_of_the_parts,
    "diffusers' names": under_an_unfused_name,
    "v missing": rows_of(8, 12, 0.0),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_fused_file_fails(
    fault: str, trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "norm_out.linear")
    adapter = trained("flux", "lora", alpha=2, targets=targets)
    [_, kohya] = write_both(tmp_path, adapter, facts)
    assert "failed" not in by_reader(run_verification(tmp_path, [kohya], adapter)[0]).values()
    rewrite(kohya[1], BROKEN[fault])

    checks, _ = run_verification(tmp_path, [kohya], adapter)

    assert by_reader(checks)["kohya_lora", "formula"] == "failed"


def test_rows_of_a_layer_that_was_not_trained_must_be_zero(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("flux", "lora", alpha=2, targets=("to_q", "to_k"))
    [_, kohya] = write_both(tmp_path, adapter, facts)

    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        tensors["lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"][-1] = 0.01

    rewrite(kohya[1], change)
    checks, _ = run_verification(tmp_path, [kohya], adapter)

    assert {status for status in by_reader(checks).values()} == {"failed", "not checked"}
    assert "to_v` is changed, but was not trained" in checks[-1].reason


def test_a_file_is_what_hand_arithmetic_says(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained(
        "flux", "lora", alpha=2, targets=("attn.to_q", "attn.to_v", "norm_out.linear")
    )
    layers, tensors = (
        adapter.state.layers(),
        kohya_tensors(adapter.state, adapter.names, torch.float32),
    )

    block = "single_transformer_blocks.1.attn"
    up = tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    down = tensors["lora_unet_single_blocks_1_linear1.lora_down.weight"]
    # 32 inputs; q, k, v of 32 rows each, 128 of the MLP; two parts of rank 4 under alpha 4, so
    # that readers halve, as the training did.
    assert (up.shape, down.shape) == ((7 * 32, 8), (8, 32))
    assert torch.equal(up[:32, :4], layers["transformer", f"{block}.to_q"]["lora_B"] * (2 / 4) * 2)
    assert torch.equal(
        up[64:96, 4:], layers["transformer", f"{block}.to_v"]["lora_B"] * (2 / 4) * 2
    )
    assert int((up != 0).sum()) == 2 * 32 * 4
    assert float(tensors["lora_unet_single_blocks_1_linear1.alpha"]) == 4
    last = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    scale, shift = (layers["transformer", "norm_out.linear"]["lora_B"] * (2 / 4)).chunk(2)
    assert torch.equal(last, torch.cat([shift, scale]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, PARTIAL], ids=["many", "partial"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_files_are_converted_into_one_another(
    kind: str,
    targets: tuple[str, ...] | None,
    family: str,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    algorithm, options = KINDS[kind]
    adapter = trained(family, algorithm, targets=targets, **options)
    first, kohya, last = (tmp_path / name for name in ("a.safetensors", "b.sft", "c.sft"))
    write_diffusers(first, adapter.state, torch.float32)

    convert(first, kohya, "kohya", TABLES, family=family)
    convert(kohya, last, "diffusers", TABLES)

    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    for key in before:
        # Divided by a rank of three parts and multiplied again.
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


def test_dora_on_all_parts_comes_back_and_on_some_needs_the_base_model(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    whole = trained(
        "flux", "lora", use_dora=True, targets=("add_q_proj", "add_k_proj", "add_v_proj")
    )
    write_both(tmp_path, whole, facts)

    found = read_adapter(tmp_path / "kohya_lora.safetensors", TABLES).layers()

    for layer, tensors in whole.state.fold().layers().items():
        for part, tensor in tensors.items():
            path = (layer[0], with_text_model(layer[1]))
            torch.testing.assert_close(found[path][part], tensor, rtol=1e-6, atol=0)

    some = trained("flux", "lora", use_dora=True, targets=("add_q_proj",))
    write_diffusers(tmp_path / "some.safetensors", some.state, torch.float32)
    with pytest.raises(InputError, match="not at hand"):
        convert(tmp_path / "some.safetensors", tmp_path / "b", "kohya", TABLES, family="flux")


def test_a_dense_fused_layer_of_another_program_shares_its_second_factor() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(7 * 8, 3), torch.randn(3, 8)

    parts = split({"lora_B": up, "lora_A": down}, [1, 1, 1, 4])

    assert all(torch.equal(part["lora_A"], down) for part in parts)
    assert torch.equal(torch.cat([part["lora_B"] for part in parts]), up)


def test_a_part_that_learnt_magnitudes_alone_keeps_them_when_taken_apart() -> None:
    torch.manual_seed(0)
    up = torch.cat([torch.randn(8, 3), torch.zeros(8, 3)])
    tensors = {"lora_B": up, "lora_A": torch.randn(3, 8), "lora_magnitude_vector": torch.rand(16)}

    parts = split(tensors, [1, 1])

    found = torch.cat([part["lora_magnitude_vector"] for part in parts])
    assert torch.equal(found, tensors["lora_magnitude_vector"])


def test_the_base_model_may_be_in_half_precision(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    for family in FAMILIES:
        adapter = trained(family, "lora", use_dora=True, alpha=2)
        fresh = adapter.fresh()
        denoiser = fresh.transformer.to(torch.bfloat16)
        weights = {
            path: _trained(adapter, path, denoiser.get_submodule(path).weight.detach().float())
            for path in adapter.weights["transformer"]
        }
        holds = {**adapter.weights, "transformer": weights}
        half = TrainedAdapter(adapter.state, holds, fresh, adapter.names)
        files = write_both(tmp_path, half, facts)

        checks, _ = run_checks(tmp_path, [WrittenFile(*file, holds) for file in files], half)

        assert {check.status for check in checks} <= {"passed", "not checked"}
        assert {"passed"} == {c.status for c in checks if c.reader in ("formula", "lycoris")} - {
            "not checked"
        }
        assert denoiser.dtype == torch.bfloat16


def _trained(adapter: TrainedAdapter, path: str, weight: Tensor) -> Tensor:
    """m (W + sBA) / ||W + sBA||, row by row: equation 5 of Liu et al. 2024 (DoRA)."""
    parts = adapter.state.layers()["transformer", path]
    changed = (
        weight + adapter.state.strengths["transformer"].scale * parts["lora_B"] @ parts["lora_A"]
    )
    return parts["lora_magnitude_vector"][:, None] * changed / changed.norm(dim=1, keepdim=True)
