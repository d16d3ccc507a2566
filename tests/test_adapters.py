"""Adapters on layers kept in half precision, and the weights they amount to."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainer import adapters, frozen
from trainer.config import AdapterConfig

FORMS = [{}, {"use_dora": True}, {"lora_type": "lokr"}, {"lora_type": "loha"}]


def denoiser(dtype: torch.dtype) -> UNet2DConditionModel:
    """A small UNet with attention and convolutions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return unet.requires_grad_(False).to(dtype)


def test_an_adapter_can_be_put_on_linear_and_convolution_layers_alone() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        torch.nn.Conv2d(1, 1, 1),
        torch.nn.Embedding(2, 2),
        torch.nn.LayerNorm(2),
        torch.nn.GroupNorm(1, 1),
    )

    assert adapters.adaptable_layers(module) == ["0", "1"]


def train_denoiser(unet: UNet2DConditionModel, adapter: AdapterConfig, seed: int) -> None:
    adapters.make_trainable(
        unet,
        adapter,
        adapter.target_unet_modules,
        field="target_unet_modules",
        component="unet",
        seed=seed,
        must_match=True,
    )


def adapted(form: dict[str, object], dtype: torch.dtype, seed: int = 0) -> UNet2DConditionModel:
    unet = denoiser(dtype)
    adapter = AdapterConfig.model_validate({"rank": 4, **form})
    train_denoiser(unet, adapter, seed)
    return unet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_leaves_every_weight_as_it_was(
    form: dict[str, object], dtype: torch.dtype
) -> None:
    weights = adapters.EffectiveWeights(adapted(form, dtype))
    assert len(weights) > 10
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights.base(name), rtol=1e-5, atol=1e-7)


def test_the_weight_before_training_is_told_of_layers_without_an_adapter_too() -> None:
    unet = adapted({"target_unet_modules": ["conv_in"]}, torch.bfloat16)
    weights = adapters.EffectiveWeights(unet)
    original = {"conv_out.weight": torch.ones(4, 16, 3, 3, dtype=torch.float16)}

    assert list(weights) == ["conv_in"]
    bare = weights.base("conv_out")
    assert bare.dtype == torch.float32
    assert torch.equal(bare, unet.conv_out.weight.float())
    # Of a quantised model the given weights count, not those that it has.
    given = adapters.EffectiveWeights(unet, original).base("conv_out")
    assert torch.equal(given, torch.ones(4, 16, 3, 3))


@pytest.mark.parametrize("form", FORMS)
def test_what_learns_is_kept_in_32_bits_on_a_half_precision_base(form: dict[str, object]) -> None:
    unet = adapted(form, torch.bfloat16)
    learning = {p.dtype for p in unet.parameters() if p.requires_grad}
    frozen = {p.dtype for p in unet.parameters() if not p.requires_grad}
    assert (learning, frozen) == ({torch.float32}, {torch.bfloat16})


def test_the_seed_decides_the_first_weights_and_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    unet = denoiser(torch.float32)
    torch.manual_seed(7)
    train_denoiser(unet, AdapterConfig(rank=4), 1)
    drawn = torch.rand(3)
    first, same, other = (
        adapters.adapter_tensors(adapted({}, torch.float32, seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(drawn, expected)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_saved_tensors_put_an_adapter_back(form: dict[str, object]) -> None:
    one, two = adapted(form, torch.float32, seed=1), adapted(form, torch.float32, seed=2)
    saved = {name: tensor + 0.01 for name, tensor in adapters.adapter_tensors(one).items()}
    adapters.load_adapter_tensors(two, saved)
    restored = adapters.adapter_tensors(two)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)


def test_reading_effective_weights_changes_nothing() -> None:
    unet = adapted({"use_dora": True}, torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    dict(adapters.EffectiveWeights(unet))
    after = dict(unet.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for n, p in after.items() if "base_layer" in n} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_quantised_base_a_fresh_adapter_changes_nothing(
    form: dict[str, object], quantization: str
) -> None:
    unet = quantised(form, quantization)
    weights = adapters.EffectiveWeights(unet)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights.base(name), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weight, unet.get_submodule(name).base_layer.weight.float())


@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_on_a_quantised_base_is_merged_into_the_original(
    form: dict[str, object],
) -> None:
    original = denoiser(torch.bfloat16).state_dict()
    unet, plain = quantised(form, "nf4"), adapted(form, torch.bfloat16)
    trained = {name: tensor + 0.01 for name, tensor in adapters.adapter_tensors(unet).items()}
    for each in (unet, plain):
        adapters.load_adapter_tensors(each, trained)

    ours = adapters.EffectiveWeights(unet, original)
    theirs = adapters.EffectiveWeights(plain)
    assert len(ours) == len(theirs) > 10
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(ours.base(name), theirs.base(name))
    assert any(isinstance(each, frozen.FrozenLinear) for each in unet.modules())


def quantised(form: dict[str, object], quantization: str) -> UNet2DConditionModel:
    unet = denoiser(torch.bfloat16)
    cpu = torch.device("cpu")
    frozen.freeze(unet, quantization=quantization, offload_blocks=0, device=cpu)
    train_denoiser(unet, AdapterConfig.model_validate({"rank": 4, **form}), seed=0)
    return unet
