"""Reading adapter files back, and turning one format into the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import TABLES, TrainedAdapter

from trainer import tensorfile
from trainer.errors import InputError
from trainer.export.diffusers import FILE_NAME, METADATA_KEY, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya
from trainer.export.read import convert, read_adapter
from trainer.export.state import AdapterState, Strength, with_text_model

KINDS = [("lora", {}), ("lora", {"use_dora": True}), ("lokr", {}), ("loha", {})]


def assert_same(found: AdapterState, expected: AdapterState) -> None:
    wanted = {
        (component, with_text_model(path)): tensors
        for (component, path), tensors in expected.fold().layers().items()
    }
    layers = found.layers()
    assert layers.keys() == wanted.keys()
    for layer, tensors in layers.items():
        assert tensors.keys() == wanted[layer].keys()
        for part, tensor in tensors.items():
            assert torch.equal(tensor.flatten(), wanted[layer][part].flatten()), (layer, part)


@pytest.mark.parametrize(("family", "alpha"), [("sd15", 4), ("sd15", 2), ("sdxl", 3)])
@pytest.mark.parametrize(("algorithm", "options"), KINDS)
def test_round_trips_return_the_same_bits(
    algorithm: str,
    options: dict[str, bool],
    family: str,
    alpha: int,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    adapter = trained(family, algorithm, alpha=alpha, **options)
    first, kohya, last = (tmp_path / name for name in ("a.safetensors", "b.sft", "c.sft"))
    write_diffusers(first, adapter.state, torch.float32)

    convert(first, kohya, "kohya", TABLES)
    convert(kohya, last, "diffusers", TABLES)

    assert_same(read_adapter(kohya, TABLES), adapter.state)
    assert_same(read_adapter(last, TABLES), adapter.state)
    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if algorithm == "lora":
        assert first.read_bytes() == last.read_bytes()


@pytest.mark.parametrize(("algorithm", "options"), KINDS)
def test_text_encoders_of_their_own_strength_come_back(
    algorithm: str,
    options: dict[str, bool],
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    adapter = trained("sdxl", algorithm, alpha=2, text=Strength(2, 8.0), **options)
    first, kohya, last = (tmp_path / name for name in ("a.safetensors", "b.sft", "c.sft"))
    write_diffusers(first, adapter.state, torch.float32)

    convert(first, kohya, "kohya", TABLES)
    convert(kohya, last, "diffusers", TABLES)

    assert_same(read_adapter(kohya, TABLES), adapter.state)
    assert_same(read_adapter(last, TABLES), adapter.state)
    strengths = read_adapter(kohya, TABLES).strengths
    if algorithm != "lokr":
        assert (strengths["unet"], strengths["text_encoder"]) == (Strength(4, 4), Strength(2, 2))


@pytest.mark.parametrize(("alpha", "exact"), [(2.0, True), (16.0, True), (3.0, False)])
def test_a_kohya_file_with_another_alpha_becomes_a_file_without(
    alpha: float, exact: bool, tmp_path: Path
) -> None:
    up, down = torch.randn(8, 4), torch.randn(4, 6)
    source = tmp_path / "foreign.safetensors"
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    _write(source, {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, alpha)

    convert(source, tmp_path / "out", "diffusers", TABLES)

    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    written = load_file(tmp_path / "out")
    folded = written[f"{name}.lora_B.weight"]
    assert torch.equal(written[f"{name}.lora_A.weight"], down)
    # Hand arithmetic in 64 bits; a power of two changes no digit.
    wanted = up.double() * (alpha / 4)
    last_place = torch.nextafter(folded.abs(), torch.tensor(torch.inf)) - folded.abs()
    assert ((folded - wanted).abs() <= (0 if exact else 1) * last_place).all()


def test_mixed_alphas_of_another_program_are_folded_layer_by_layer(tmp_path: Path) -> None:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    tensors = {}
    for name, alpha in (("to_q", 8.0), ("to_k", 1.0)):
        tensors[f"{block}_{name}.lora_up.weight"] = torch.ones(6, 4)
        tensors[f"{block}_{name}.lora_down.weight"] = torch.ones(4, 6)
        tensors[f"{block}_{name}.alpha"] = torch.tensor(alpha)
    tensorfile.write(tmp_path / "a", tensors, {})

    layers = read_adapter(tmp_path / "a", TABLES).layers()

    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert float(layers["unet", f"{path}.to_q"]["lora_B"][0, 0]) == 2.0
    assert float(layers["unet", f"{path}.to_k"]["lora_B"][0, 0]) == 0.25


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 16}}, 4.0),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn[12].to_q": 16}}, 4.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"q": 16}}, 0.5),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"^to_q": 16}}, 0.5),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"^down_blocks.0.+to_q": 16}}, 4.0),
        (None, 1.0),
    ],
    ids=[
        *("alpha", "pattern", "rank-stabilised", "expression", "part of a step"),
        *("whole path of another", "whole path", "no header"),
    ],
)
def test_a_diffusers_files_scale_stands_in_its_header(
    header: dict[str, object] | None, scale: float, tmp_path: Path
) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(4, 6),
        f"{layer}.lora_B.weight": torch.ones(6, 4),
    }
    flat = {f"unet.{key}": value for key, value in (header or {}).items()}
    metadata = {METADATA_KEY: json.dumps(flat)} if header else {}
    tensorfile.write(tmp_path / "a", tensors, metadata)

    state = read_adapter(tmp_path / "a", TABLES)

    up = state.components["unet"][f"{layer.removeprefix('unet.')}.lora_B.weight"]
    assert float(up[0, 0]) == scale


@pytest.mark.parametrize("key", ["^encoder.q_proj", "^text_model.encoder.q_proj"])
def test_a_whole_path_of_a_text_encoder_may_have_either_spelling(key: str, tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(4, 6),
        f"{layer}.lora_B.weight": torch.ones(6, 4),
    }
    header = {"text_encoder.r": 4, "text_encoder.alpha_pattern": {key: 16}}
    tensorfile.write(tmp_path / "a", tensors, {METADATA_KEY: json.dumps(header)})

    [parts] = read_adapter(tmp_path / "a", TABLES).layers().values()

    assert float(parts["lora_B"][0, 0]) == 4.0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}}, "the header says 2"),
        ({"r": 8, "lora_alpha": 8}, "the header says 8"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 2}}, "no expression for layer names"),
    ],
    ids=["pattern", "usual rank", "no expression"],
)
def test_a_header_that_does_not_fit_the_tensors_is_refused(
    header: dict[str, object], message: str, tmp_path: Path
) -> None:
    tensors = {
        "unet.to_q.lora_A.weight": torch.ones(4, 6),
        "unet.to_q.lora_B.weight": torch.ones(6, 4),
    }
    flat = {f"unet.{key}": value for key, value in header.items()}
    tensorfile.write(tmp_path / "a", tensors, {METADATA_KEY: json.dumps(flat)})

    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path / "a", TABLES)


def test_full_kronecker_factors_ignore_a_kohya_files_alpha(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lokr_w1": torch.ones(2, 2), f"{layer}.lokr_w2": torch.ones(3, 3)}
    _write(tmp_path / "a", tensors, alpha=1e9)

    state = read_adapter(tmp_path / "a", TABLES)

    # LyCORIS and ComfyUI apply alpha only where a factor is low-rank (formats, section 4).
    layers = state.layers()["unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert float(layers["lokr_w1"][0, 0]) == 1.0


def test_the_first_diffusers_keys_are_understood(tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"{layer}.processor.to_q_lora.down.weight": torch.ones(4, 6),
        f"{layer}.processor.to_q_lora.up.weight": torch.ones(6, 4),
        f"{layer}.to_k.lora.down.weight": torch.ones(4, 6),
        f"{layer}.to_k.lora.up.weight": torch.ones(6, 4),
    }
    tensorfile.write(tmp_path / "a", tensors, {})

    paths = {path.rsplit(".", 1)[1] for _, path in read_adapter(tmp_path / "a", TABLES).layers()}

    assert paths == {"to_q", "to_k"}


def test_magnitudes_for_comfyui_are_not_taken_for_the_papers(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)
    write_kohya(
        tmp_path / "a",
        adapter.state,
        adapter.names,
        facts,
        torch.float32,
        convention="comfyui",
        base_weight=adapter.base_weight,
    )

    with pytest.raises(InputError, match="without the base model"):
        convert(tmp_path / "a", tmp_path / "b", "diffusers", TABLES)

    assert not (tmp_path / "b").exists()


def test_dora_on_the_input_axis_is_refused(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{layer}.lora_up.weight": torch.ones(6, 4),
        f"{layer}.lora_down.weight": torch.ones(4, 6),
        f"{layer}.dora_scale": torch.ones(1, 6),
    }
    _write(tmp_path / "a", tensors, alpha=4)

    with pytest.raises(InputError, match="input axis"):
        read_adapter(tmp_path / "a", TABLES)


def test_an_adapter_of_one_block_needs_its_family_named(tmp_path: Path) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(4, 6),
        f"{layer}.lora_B.weight": torch.ones(6, 4),
    }
    tensorfile.write(tmp_path / "a", tensors, {})
    one = {"sdxl-like": TABLES["sdxl"], "other": TABLES["sdxl"]}

    with pytest.raises(InputError, match="--family"):
        convert(tmp_path / "a", tmp_path / "b", "kohya", one)

    convert(tmp_path / "a", tmp_path / "b", "kohya", one, family="other")
    assert any("middle_block_1" in key for key in load_file(tmp_path / "b"))


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\x00" * 64])
def test_a_file_of_another_kind_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)

    with pytest.raises(InputError, match="not a safetensors file"):
        read_adapter(tmp_path / "a", TABLES)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_adapter(tmp_path / FILE_NAME, TABLES)


def test_a_whole_model_is_refused_with_its_first_key(tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "a", {"conv_in.weight": torch.ones(2)}, {})

    with pytest.raises(InputError, match="conv_in.weight"):
        read_adapter(tmp_path / "a", TABLES)


def test_a_header_that_is_not_json_is_refused(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(1, 1), "unet.a.lora_B.weight": torch.ones(1, 1)}
    tensorfile.write(tmp_path / "a", tensors, {METADATA_KEY: "{"})

    with pytest.raises(InputError, match=METADATA_KEY):
        read_adapter(tmp_path / "a", TABLES)


@pytest.mark.parametrize("component", ["base_model", "down_blocks", "vae"])
def test_a_component_that_no_family_adapts_is_refused(component: str, tmp_path: Path) -> None:
    tensors = {
        f"{component}.a.lora_A.weight": torch.ones(1, 1),
        f"{component}.a.lora_B.weight": torch.ones(1, 1),
    }
    tensorfile.write(tmp_path / "a", tensors, {})

    with pytest.raises(InputError, match=f"`{component}` is no component") as refusal:
        convert(tmp_path / "a", tmp_path / "b", "kohya", TABLES)

    assert "text_encoder, text_encoder_2, transformer, unet" in str(refusal.value)
    assert not (tmp_path / "b").exists()


def test_a_lora_without_one_of_its_factors_is_refused(tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "a", {"unet.a.lora_A.weight": torch.ones(1, 1)}, {})

    with pytest.raises(InputError, match="lora_B"):
        read_adapter(tmp_path / "a", TABLES)


def _write(path: Path, tensors: dict[str, Tensor], alpha: float) -> None:
    layers = {key.split(".")[0] for key in tensors}
    alphas = {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}
    tensorfile.write(path, {**tensors, **alphas}, {})
