"""Folding: the scale goes into the weights, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.export.state import (
    AdapterState,
    Strength,
    join_name,
    largest_ranks,
    split_name,
    stored,
    with_text_model,
)


def adapter(algorithm: str, tensors: dict[str, Tensor], rank: int, alpha: float) -> AdapterState:
    return AdapterState(algorithm, False, {"unet": tensors}, {"unet": Strength(rank, alpha)})


@pytest.mark.parametrize(
    ("name", "path", "part"),
    [
        ("mid.to_out.0.lora_A.weight", "mid.to_out.0", "lora_A"),
        ("a.conv1.lora_magnitude_vector.weight", "a.conv1", "lora_magnitude_vector"),
        ("a.conv1.lora_magnitude_vector", "a.conv1", "lora_magnitude_vector"),
        ("a.to_k.lokr_w1_a", "a.to_k", "lokr_w1_a"),
        ("a.to_k.hada_t1", "a.to_k", "hada_t1"),
    ],
)
def test_a_tensor_name_is_a_layer_path_and_a_part(name: str, path: str, part: str) -> None:
    assert split_name(name) == (path, part)


def test_magnitudes_are_written_with_weight() -> None:
    assert join_name("a", "lora_magnitude_vector") == "a.lora_magnitude_vector.weight"
    assert join_name("a", "lokr_w1") == "a.lokr_w1"


def test_text_model_is_put_back_once_and_only_for_clip_layers() -> None:
    flat = "encoder.layers.0.self_attn.q_proj"
    assert with_text_model(flat) == f"text_model.{flat}"
    assert with_text_model(f"text_model.{flat}") == f"text_model.{flat}"
    assert with_text_model("encoder.block.0.layer.0") == "encoder.block.0.layer.0"


def test_a_power_of_two_folds_without_rounding() -> None:
    up = torch.randn(6, 4)
    state = adapter("lora", {"a.lora_A.weight": torch.randn(4, 5), "a.lora_B.weight": up}, 4, 2)

    folded = state.fold()

    assert folded.strengths == {"unet": Strength(4, 4)}
    assert folded.strengths["unet"].scale == 1
    assert torch.equal(folded.components["unet"]["a.lora_B.weight"] * 2, up)


def test_another_factor_folds_within_the_rounding_of_factor_and_product() -> None:
    up = torch.randn(6, 3)
    state = adapter("lora", {"a.lora_A.weight": torch.randn(3, 5), "a.lora_B.weight": up}, 3, 7)

    folded = state.fold().components["unet"]["a.lora_B.weight"]

    # Hand arithmetic in 64 bits.
    exact = up.double() * (7 / 3)
    last_place = torch.nextafter(folded.abs(), torch.tensor(torch.inf)) - folded.abs()
    assert ((folded.double() - exact).abs() <= 1.5 * last_place.abs().double()).all()


def test_each_component_folds_with_its_own_strength() -> None:
    factors = {"a.lora_A.weight": torch.randn(4, 5), "a.lora_B.weight": torch.ones(6, 4)}
    components = {"unet": factors, "text_encoder": factors}
    strengths = {"unet": Strength(4, 8), "text_encoder": Strength(4, 1)}

    folded = AdapterState("lora", False, components, strengths).fold()

    ups = {name: float(t["a.lora_B.weight"][0, 0]) for name, t in folded.components.items()}
    assert ups == {"unet": 2.0, "text_encoder": 0.25}
    assert set(folded.strengths.values()) == {Strength(4, 4)}


def test_the_rank_of_a_component_is_its_largest() -> None:
    layers = {
        ("unet", "a"): {"lora_A": torch.ones(2, 5), "lora_B": torch.ones(6, 2)},
        ("unet", "b"): {"lora_A": torch.ones(4, 5), "lora_B": torch.ones(6, 4)},
        ("text_encoder", "a"): {"lora_A": torch.ones(8, 5), "lora_B": torch.ones(6, 8)},
    }

    assert largest_ranks(layers) == {"unet": 4, "text_encoder": 8}
    assert AdapterState.of_layers("lora", largest_ranks(layers), layers).rank == 8


def test_folding_twice_is_folding_once() -> None:
    tensors = {"a.lora_A.weight": torch.randn(3, 5), "a.lora_B.weight": torch.randn(6, 3)}
    once = adapter("lora", tensors, 3, 7).fold()

    twice = once.fold()

    assert torch.equal(
        once.components["unet"]["a.lora_B.weight"], twice.components["unet"]["a.lora_B.weight"]
    )


def test_lokr_has_one_small_factor_and_no_core_and_the_same_product() -> None:
    rank, alpha = 2, 6.0
    w1_a, w1_b = torch.randn(2, rank), torch.randn(rank, 3)
    core, w2_a, w2_b = torch.randn(rank, rank, 3, 3), torch.randn(rank, 4), torch.randn(rank, 5)
    names = ("lokr_w1_a", "lokr_w1_b", "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    tensors = {f"a.{n}": t for n, t in zip(names, (w1_a, w1_b, core, w2_a, w2_b), strict=True)}

    folded = adapter("lokr", tensors, rank, alpha).fold().layers()["unet", "a"]

    assert set(folded) == {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    # Tucker's definition: every kernel place has its own r x r core between the factors.
    large = torch.einsum("io,ijkl,jc->ockl", w2_a, core, w2_b)
    torch.testing.assert_close(folded["lokr_w1"], (w1_a @ w1_b) * 3)
    flat = folded["lokr_w2_a"] @ folded["lokr_w2_b"]
    torch.testing.assert_close(flat.reshape(4, 5, 3, 3), large)


def test_loha_folds_into_its_first_factor() -> None:
    tensors = {f"a.hada_{n}": torch.randn(3, 3) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}

    folded = adapter("loha", tensors, 3, 6).fold().layers()["unet", "a"]

    assert torch.equal(folded["hada_w1_a"], tensors["a.hada_w1_a"] * 2)
    assert torch.equal(folded["hada_w2_a"], tensors["a.hada_w2_a"])


def test_magnitudes_stay_in_32_bits() -> None:
    assert stored("lora_magnitude_vector", torch.ones(2), torch.bfloat16).dtype == torch.float32
    assert stored("lora_A", torch.ones(2), torch.bfloat16).dtype == torch.bfloat16
