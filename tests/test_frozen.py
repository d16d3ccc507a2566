"""Frozen layers: what is kept of a weight, what it amounts to, and that nothing else is kept."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from trainer import adapters, base_model, frozen
from trainer.config import AdapterConfig, ModelConfig
from trainer.errors import InputError
from trainer.frozen import FrozenLinear
from trainer.live_bytes import LiveBytes

CPU = torch.device("cpu")
QUANTISED = ("int8", "fp8", "nf4")
ADAPTERS = [{}, {"use_dora": True}, {"lora_type": "lokr"}, {"lora_type": "loha"}]


def layer(
    width: int = 128, height: int = 256, dtype: torch.dtype = torch.float32
) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(width, height, dtype=dtype).requires_grad_(False)


def kept(
    quantization: str, *, offloaded: bool = False, dtype: torch.dtype = torch.float32
) -> FrozenLinear:
    return FrozenLinear(layer(dtype=dtype), quantization, offloaded=offloaded, device=CPU)


def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).requires_grad_(False)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        # A row of 128 numbers shares a scale of 32 bits.
        ("int8", 8 + 32 / 128),
        ("fp8", 8 + 32 / 128),
        # 64 numbers share a scale of 8 bits, 256 of those one of 32 bits; 512 blocks fill two.
        ("nf4", 4 + 8 / 64 + 32 / (64 * 256) + 32 / (128 * 256)),
        ("none", 32),
    ],
)
def test_a_weight_takes_as_many_bits_as_its_format_says(quantization: str, bits: float) -> None:
    stored = sum(part.nbytes for part in kept(quantization).parts)
    assert stored * 8 / (128 * 256) == pytest.approx(bits)


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    weight = layer().weight
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.all((kept("int8").weight - weight).abs() <= step / 2 * 1.001)


def test_fp8_is_off_by_at_most_a_sixteenth_of_the_number() -> None:
    # Three bits of mantissa: half of 2^-3. Below 2^-6 of the scale the steps are equal: 2^-9.
    weight = layer().weight
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    bound = torch.maximum(weight.abs() / 16, scale * 2**-10)
    assert torch.all((kept("fp8").weight - weight).abs() <= bound * 1.001)


def test_nf4_takes_the_nearest_of_sixteen_levels_of_its_block() -> None:
    # The widest gap between levels is from -1 to -0.6962 (Dettmers et al. 2023, appendix E); the
    # scale of a block is off by at most half of 1/127 of the spread of scales.
    weight = layer().weight.flatten().view(-1, 64)
    scale = weight.abs().amax(dim=1, keepdim=True)
    spread = (scale - scale.mean()).abs().max()
    bound = scale * (1 - 0.6962) / 2 + spread / 127
    assert torch.all((kept("nf4").weight.flatten().view(-1, 64) - weight).abs() <= bound * 1.001)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_the_same_weight_gives_the_same_bytes(quantization: str) -> None:
    for one, other in zip(kept(quantization).parts, kept(quantization).parts, strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("quantization", QUANTISED)
def test_rows_of_zeros_stay_zeros(quantization: str) -> None:
    plain = layer()
    plain.weight[:64] = 0
    frozen_layer = FrozenLinear(plain, quantization, offloaded=False, device=CPU)
    assert torch.all(frozen_layer.weight[:64] == 0)
    assert torch.isfinite(frozen_layer.weight).all()


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("quantization", ["none", *QUANTISED])
def test_a_product_and_its_gradient_are_those_of_the_widened_weight(
    quantization: str, offloaded: bool
) -> None:
    ours = kept(quantization, offloaded=offloaded)
    x, y = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 256)
    product = ours(x)
    product.backward(y)
    torch.testing.assert_close(product, x @ ours.weight.T + ours.bias)
    torch.testing.assert_close(x.grad, y @ ours.weight)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_autocast_decides_the_format_of_the_product(quantization: str) -> None:
    ours = kept(quantization)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = ours(x)
    product.sum().backward()
    assert product.dtype == torch.bfloat16
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(3, -1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quantization", ["none", *QUANTISED])
def test_nothing_of_a_weights_size_outlives_a_product(quantization: str) -> None:
    offloaded = quantization == "none"
    ours = kept(quantization, offloaded=offloaded)
    x = torch.ones(1, 128, requires_grad=True)
    with LiveBytes() as counter:
        product = ours(x)
        assert counter.now < 4096
        product.sum().backward()
        assert counter.now < 4096
    # The widened weight is there for a moment.
    assert counter.peak >= 4 * 128 * 256


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("quantization", QUANTISED)
def test_another_number_format_widens_otherwise_and_keeps_the_same_bytes(
    quantization: str, offloaded: bool
) -> None:
    ours = kept(quantization, offloaded=offloaded)
    before = [part.clone() for part in ours.parts]
    ours.to(torch.bfloat16)
    assert (
        ours.weight.dtype == ours(torch.ones(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )
    for one, other in zip(before, ours.parts, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.float(), other.float())


def test_what_is_offloaded_stays_while_the_rest_moves() -> None:
    here, there = kept("int8", offloaded=True), kept("int8")
    for each in (here, there):
        each.to("meta")
    assert {part.device.type for part in here.parts} == {"cpu"}
    assert {part.device.type for part in there.parts} == {"meta"}
    assert here.weight.device.type == there.weight.device.type == "meta"
    assert here.parts_on_device == ()
    assert there.parts_on_device == there.parts


def test_what_is_kept_is_in_no_state_dict_and_among_no_buffers() -> None:
    ours = kept("int8")
    assert set(ours.state_dict()) == {"bias"}
    assert not list(ours.buffers())


@pytest.mark.parametrize("quantization", QUANTISED)
def test_linear_layers_inside_the_blocks_are_quantised_and_no_others(quantization: str) -> None:
    model = transformer()
    frozen.freeze(model, quantization=quantization, offload_blocks=0, device=CPU)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_inside = "transformer_blocks" in name
            assert isinstance(module, FrozenLinear) == is_inside, name


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_first_blocks_are_offloaded(quantization: str) -> None:
    model = transformer()
    frozen.freeze(model, quantization=quantization, offload_blocks=2, device=CPU)
    offloaded = [
        any(each.offloaded for each in frozen.frozen_layers(block))
        for block in frozen.repeated_blocks(model)
    ]
    assert offloaded == [True, True, False]


def test_more_blocks_than_there_are_is_an_error_with_their_number() -> None:
    with pytest.raises(InputError, match="is 4, but FluxTransformer2DModel has 3 blocks"):
        frozen.freeze(transformer(), quantization="none", offload_blocks=4, device=CPU)


def test_offloading_changes_no_prediction() -> None:
    model = transformer()
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    (expected,) = model(**inputs)
    frozen.freeze(model, quantization="none", offload_blocks=3, device=CPU)
    (prediction,) = model(**inputs)
    assert torch.equal(prediction, expected)


@pytest.mark.parametrize("form", ADAPTERS)
def test_adapters_learn_on_quantised_layers_as_on_what_they_widen_to(
    form: dict[str, object],
) -> None:
    adapter = AdapterConfig.model_validate({"rank": 2, **form})
    packed = torch.nn.Sequential(kept("int8"))
    plain = torch.nn.Sequential(layer())
    plain[0].weight.data = packed[0].weight
    x = torch.randn(3, 128)
    for model in (packed, plain):
        adapters.add_adapter(model, adapter, ["0"], component="x", seed=0)
        model(x).square().sum().backward()
    ours = {n: p.grad for n, p in packed.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    torch.testing.assert_close(ours, theirs)


def test_nf4_without_bitsandbytes_is_refused_by_name() -> None:
    frozen._bitsandbytes.cache_clear()
    with (
        patch.dict(sys.modules, {"bitsandbytes": None}),
        pytest.raises(InputError, match="`nf4` needs bitsandbytes") as caught,
    ):
        frozen.refuse_unavailable("nf4")
    assert caught.value.problems[0].field == "quantization"
    for each in ("none", "int8", "fp8"):
        frozen.refuse_unavailable(each)


@pytest.mark.parametrize("folder", ["sd15_folder", "sdxl_folder", "flux_folder", "flux2_folder"])
def test_every_family_has_blocks_that_hold_most_of_its_linear_layers(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    base = base_model.locate(ModelConfig(model_url=str(path)))
    model = base_model.skeleton(base, base.family.denoiser_name)
    inside = sum(
        each.weight.numel()
        for block in frozen.repeated_blocks(model)
        for each in block.modules()
        if isinstance(each, torch.nn.Linear)
    )
    everywhere = sum(
        each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear)
    )
    assert inside > 0.5 * everywhere


def test_a_unets_blocks_are_those_of_its_attention() -> None:
    assert UNet2DConditionModel._repeated_blocks == ["BasicTransformerBlock"]
