"""Our layers with an adapter beside PEFT's: outputs, gradients, names, weights."""

from __future__ import annotations

import copy
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from layer_pairs import (
    FORMS,
    LAYERS,
    adapted,
    computed,
    distance,
    learn_something,
    learning,
    same,
    under_autocast,
    with_adapter,
)

from trainer import adapters
from trainer.adapted.hadamard import is_thin
from trainer.adapted.layers import AdaptedLayer, Copies
from trainer.config import AdapterConfig
from trainer.frozen import FrozenLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize("alpha", [4.0, 6.0])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_pefts_layers(
    form: str, kind: str, alpha: float
) -> None:
    make, shape = LAYERS[kind]
    theirs, ours = (adapted(make(), form, whose, alpha=alpha) for whose in ("peft", "ours"))

    assert not isinstance(theirs[0], AdaptedLayer)
    assert isinstance(ours[0], AdaptedLayer)
    parts = {name.split(".")[1] for name in learning(ours)}
    assert ("lokr_w2" in parts) == (form == "lokr")
    same(computed(ours, learning(ours), shape), computed(theirs, learning(theirs), shape))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_need_no_gradient_get_none_and_weights_learn_the_same(form: str) -> None:
    make, shape = LAYERS["3 x 3"]
    layer, inputs = adapted(make(), form, "ours"), torch.randn(shape)
    gradients = []
    for values in (inputs, inputs.clone().requires_grad_()):
        layer(values).square().sum().backward()
        gradients.append({name: p.grad for name, p in learning(layer).items()})
        layer.zero_grad(set_to_none=True)
    assert inputs.grad is None
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("kind", ["rows of pictures", "3 x 3"])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_rests_gets_no_gradient_and_lets_that_of_its_inputs_through(
    form: str, kind: str
) -> None:
    make, shape = LAYERS[kind]
    layer = adapted(make(), form, "ours")
    learns = learning(layer)
    inputs_before = computed(layer, learns, shape)["inputs"]
    for parameter in learns.values():
        parameter.requires_grad_(False)

    # Nothing that learns is asked, since a gradient that is none would be refused.
    assert torch.equal(computed(layer, {}, shape)["inputs"], inputs_before)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_dora_can_learn_its_magnitudes_alone_and_its_direction_alone() -> None:
    make, shape = LAYERS["rows"]
    layer = adapted(make(), "dora", "ours")
    learns = learning(layer)
    all_learn = computed(layer, learns, shape)
    magnitudes = {name for name in learns if "magnitude" in name}
    assert len(magnitudes) == 1
    for part in (magnitudes, learns.keys() - magnitudes):
        for name, parameter in learns.items():
            parameter.requires_grad_(name in part)
        alone = computed(layer, learning(layer), shape)
        assert alone.keys() == part | {"outputs", "inputs"}
        assert all(torch.equal(alone[name], all_learn[name]) for name in alone)


@pytest.mark.parametrize("form", FORMS)
def test_the_layout_of_pictures_and_weights_does_not_matter(form: str) -> None:
    make, shape = LAYERS["3 x 3, every second"]
    layer = adapted(make(), form, "ours")
    plain = computed(layer, learning(layer), shape)
    layer.to(memory_format=torch.channels_last)

    def last(inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = layer(inputs.to(memory_format=torch.channels_last))
        return outputs.to(memory_format=torch.channels_last)

    same(computed(last, learning(layer), shape), plain)


@pytest.mark.parametrize("form", FORMS)
def test_neither_does_that_of_gradients(form: str) -> None:
    make, shape = LAYERS["3 x 3"]
    layer = adapted(make(), form, "ours")
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        outputs = layer(torch.ones(shape))
        draw = torch.Generator().manual_seed(0)
        outputs.backward(torch.randn(outputs.shape, generator=draw).to(memory_format=layout))
        found.append({name: p.grad for name, p in learning(layer).items()})
        layer.zero_grad(set_to_none=True)
    plain, last = found
    assert all(distance(last[name], plain[name]) < 1e-5 for name in plain)


@pytest.mark.parametrize("form", FORMS)
def test_neither_does_that_of_rows(form: str) -> None:
    make, shape = LAYERS["rows of pictures"]
    layer = adapted(make(), form, "ours")
    plain = computed(layer, learning(layer), shape)

    def turned(inputs: torch.Tensor) -> torch.Tensor:
        spread = inputs.transpose(0, 1).contiguous().transpose(0, 1)
        assert not spread.is_contiguous()
        return layer(spread).transpose(1, 2).contiguous().transpose(1, 2)

    same(computed(turned, learning(layer), shape), plain)
    # A sum hands one number to all rows, on no memory of their own.
    layer(torch.ones(shape)).sum().backward()
    found = {name: p.grad for name, p in learning(layer).items()}
    ones = torch.ones((*shape[:-1], 40))
    layer.zero_grad()
    layer(torch.ones(shape)).backward(ones)
    assert all(torch.equal(p.grad, found[name]) for name, p in learning(layer).items())


@pytest.mark.parametrize("kind", ["rows", "rows of pictures", "3 x 3"])
@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_no_rows_and_gradients_of_zero(form: str, kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = adapted(make(), form, "ours")
    outputs = layer(torch.empty(0, *shape[1:], requires_grad=True))
    assert outputs.shape[0] == 0
    outputs.sum().backward()
    assert all(not p.grad.any() for p in learning(layer).values())


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_used_twice_learns_from_both_uses(form: str) -> None:
    shape = (6, 24)
    theirs, ours = (adapted(torch.nn.Linear(24, 24), form, whose) for whose in ("peft", "ours"))
    found = [
        computed(lambda x, layer=layer: layer(layer(x)), learning(layer), shape)
        for layer in (ours, theirs)
    ]
    same(*found)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_recorded_is_computed_the_same(form: str) -> None:
    layer, inputs = adapted(torch.nn.Linear(24, 40), form, "ours"), torch.randn(6, 24)
    recorded = layer(inputs)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            outputs = layer(inputs)
        assert not outputs.requires_grad
        assert torch.equal(outputs, recorded)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_switched_off_and_merged_by_peft(form: str) -> None:
    module, inputs = adapted(torch.nn.Linear(24, 40), form, "ours"), torch.randn(6, 24)
    (layer,) = module
    learnt, bare = layer(inputs), layer.base_layer(inputs)
    layer.enable_adapters(False)
    off = layer(inputs)
    layer.enable_adapters(True)
    layer.merge()
    merged = layer(inputs)
    assert torch.equal(off, bare)
    assert distance(merged, learnt) < 1e-5 < distance(bare, learnt)
    layer.unmerge()
    assert distance(layer(inputs), learnt) < 1e-5


@pytest.mark.parametrize("kind", ["rows", "3 x 3"])
@pytest.mark.parametrize("form", FORMS)
def test_bf16_errs_no_more_than_pefts_layers_do_under_autocast(form: str, kind: str) -> None:
    make, shape = IN_BF16[kind]
    truth = exactly(form, kind)
    errors: list[dict[str, float]] = []
    for whose in ("ours", "peft"):
        layer = adapted(make().to(torch.bfloat16), form, whose)
        found = computed(under_autocast(layer), learning(layer), shape, torch.bfloat16)
        assert found["outputs"].dtype == torch.bfloat16
        assert {found[name].dtype for name in learning(layer)} == {torch.float32}
        errors.append({name: distance(found[name], truth[name]) for name in truth})
    ours, theirs = errors
    for name, error in ours.items():
        # The gradients of LoKr's and LoHa's factors are rounded once more here on their way: what
        # they come from is never put together, or multiplied in 16 bits where PEFT takes 32.
        is_rounded_more = "lokr" in name or "hada" in name
        assert error <= theirs[name] * (1.6 if is_rounded_more else 1.2), name


IN_BF16: Mapping[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: torch.nn.Linear(64, 96), (128, 64)),
    "3 x 3": (lambda: torch.nn.Conv2d(32, 48, 3), (4, 32, 10, 10)),
}


def exactly(form: str, kind: str) -> dict[str, torch.Tensor]:
    """What PEFT computes in 64 bits on weights that are exact in bf16."""
    make, shape = IN_BF16[kind]
    layer = adapted(make().to(torch.bfloat16), form, "peft").double()
    return computed(layer, learning(layer), shape, torch.float64)


@pytest.mark.parametrize("kind", IN_BF16)
@pytest.mark.parametrize("form", FORMS)
def test_without_autocast_a_base_in_bf16_is_computed_as_under_it(form: str, kind: str) -> None:
    make, shape = IN_BF16[kind]
    layer = adapted(make().to(torch.bfloat16), form, "ours")
    plain = computed(layer, learning(layer), shape, torch.bfloat16)
    cast = computed(under_autocast(layer), learning(layer), shape, torch.bfloat16)
    assert {name: t.dtype for name, t in plain.items()} == {n: t.dtype for n, t in cast.items()}
    assert all(torch.equal(plain[name], cast[name]) for name in cast)


def test_what_magnitudes_have_learnt_first_is_not_lost_in_bf16() -> None:
    # 1 + 2^-10 is 1 in bf16; of many products that are only rounded at their ends, some differ.
    layer = adapted(torch.nn.Linear(24, 40, bias=False).to(torch.bfloat16), "dora", "ours")
    inputs = torch.randn(400, 24, dtype=torch.bfloat16)
    before = layer(inputs).detach().double()
    for name, magnitude in learning(layer).items():
        if "magnitude" in name:
            magnitude.data.mul_(1 + 2**-10)
    grown = (layer(inputs).detach().double() / before).mean()
    assert float(grown) == pytest.approx(1 + 2**-10, abs=2**-12)


def test_what_loha_has_learnt_first_is_not_lost_in_bf16() -> None:
    # Beside 0.2, bf16 has steps of 2^-10: 0.0004 is less than half of one. Weights of both signs
    # leave nothing in a sum but what was learnt.
    base = torch.nn.Linear(512, 8, bias=False, dtype=torch.bfloat16)
    layer = adapted(base, "loha", "ours", alpha=4.0)
    base.weight.fill_(0.2)[:, ::2] *= -1
    for factor in learning(layer).values():
        factor.data.fill_((0.0004 / 16) ** 0.25)
    outputs = layer(torch.ones(1, 512, dtype=torch.bfloat16)).detach()
    assert float(outputs.mean()) == pytest.approx(512 * 0.0004, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("quantization", ["none", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_base_in_few_bits_or_elsewhere_all_is_as_in_pefts_layers(
    form: str, quantization: str, offloaded: bool, dtype: torch.dtype
) -> None:
    found = []
    for whose in ("ours", "peft"):
        base = torch.nn.Linear(64, 128, dtype=dtype)
        base.load_state_dict({"weight": torch.eye(128, 64) + 0.3, "bias": torch.ones(128)})
        kept = FrozenLinear(base, quantization, offloaded=offloaded, device=CPU)
        module = torch.nn.Sequential(kept).requires_grad_(False)
        layer = with_adapter(module, form, whose, ["0"])
        forward = layer if dtype == torch.float32 else under_autocast(layer)
        found.append(computed(forward, learning(layer), (2, 5, 64), dtype))
    same(*found, bound=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_that_we_do_not_know_are_left_to_peft(form: str) -> None:
    if "lokr" in form or form == "dora":
        return
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    layer = with_adapter(module.requires_grad_(False), form, "ours", ["0"])
    assert not isinstance(layer[0], AdaptedLayer)
    assert layer(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("form", FORMS)
def test_names_first_weights_and_what_they_amount_to_do_not_depend_on_whose_layers_they_are(
    form: str,
) -> None:
    asked = {"rank": 4, "alpha": 6.0, **FORMS[form]}
    ours, theirs = (network() for _ in range(2))
    for module, whose in ((ours, "ours"), (theirs, "peft")):
        adapter = AdapterConfig.model_validate({**asked, "adapter_layers": whose})
        adapters.add_adapter(module, adapter, ["0", "2"], component="it", seed=5)
    exactly_the_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    exactly_the_same(adapters.adapter_tensors(ours), adapters.adapter_tensors(theirs))

    learn_something(ours, seed=9)
    learn_something(theirs, seed=10)
    for giver, taker in ((ours, theirs), (theirs, ours)):
        learn_something(giver)
        adapters.load_adapter_tensors(taker, adapters.adapter_tensors(giver))
        exactly_the_same(adapters.adapter_tensors(ours), adapters.adapter_tensors(theirs))
        same_weights = (adapters.EffectiveWeights(ours), adapters.EffectiveWeights(theirs))
        exactly_the_same(*map(dict, same_weights))
        inputs = torch.randn(2, 8, 6, 6)
        assert distance(ours(inputs), theirs(inputs)) < 1e-5


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(2), torch.nn.Linear(16, 24))
    return torch.nn.Sequential(*layers).requires_grad_(False)


def exactly_the_same(ones: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert ones.keys() == others.keys()
    assert len(ones) > 1
    assert all(torch.equal(ones[name], others[name]) for name in ones)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_denoiser_is_computed_as_with_pefts_layers(form: str) -> None:
    found = []
    for whose in ("ours", "peft"):
        unet = tiny_unet()
        targets = AdapterConfig(rank=4).target_unet_modules
        layers, _ = adapters.target_layers(unet, targets, field="targets", must_match=True)
        with_adapter(unet, form, whose, layers)
        count = sum(isinstance(each, AdaptedLayer) for each in unet.modules())
        assert count == (len(layers) if whose == "ours" else 0)

        def predict(latents: torch.Tensor, unet: UNet2DConditionModel = unet) -> torch.Tensor:
            text = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(4))
            prediction: torch.Tensor = unet(latents, torch.tensor([3, 500]), text).sample
            return prediction

        found.append(computed(predict, learning(unet), (2, 4, 8, 8)))
    same(*found, bound=2e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_an_example_lent_to_a_whole_batch_is_computed_once(form: str, kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, batch = adapted(make(), form, "ours"), (3, *(-1 for _ in shape[1:]))
    weights = torch.randn(3, *layer(torch.randn(shape)).shape[1:])

    sizes: dict[bool, int] = defaultdict(int)

    def of(one: torch.Tensor, *, lent: bool) -> torch.Tensor:
        many = one[:1].expand(batch)

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            sizes[lent] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            outputs: torch.Tensor = layer(many if lent else many.contiguous())
        # Each example has another part in the loss.
        return outputs * weights

    lent, copied = (
        computed(partial(of, lent=lent), learning(layer), shape) for lent in (True, False)
    )
    same(lent, copied)
    # Of the inputs, two examples less.
    assert sizes[True] <= sizes[False] - 2 * math.prod(shape[1:])


@pytest.mark.parametrize("form", FORMS)
def test_a_caption_lent_to_a_whole_batch_is_a_caption_like_any_other(form: str) -> None:
    unet = tiny_unet()
    with_adapter(unet, form, "ours", ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"])
    text = torch.randn(1, 3, 16).expand(2, -1, -1)

    def predict(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = unet(latents, torch.tensor([3, 500]), text).sample
        return prediction

    lent, copied = (
        computed(partial(predict, text=given), learning(unet), (2, 4, 8, 8))
        for given in (text, text.contiguous())
    )
    same(lent, copied)


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).requires_grad_(False)


def test_a_copy_of_a_model_learns_by_itself() -> None:
    module = adapted(torch.nn.Linear(24, 40), "dora", "ours")
    copies = Copies([module], torch.float32)
    inputs = torch.randn(6, 24)
    other = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    learn_something(other)
    with copies.of_this_step():
        ours = module(inputs)
        assert distance(other(inputs), ours) > 1e-3
    assert torch.equal(ours, module(inputs))


def test_a_loha_is_thin_where_its_rank_squared_is_little() -> None:
    # Three products by (in + out) r² numbers against two by in x out.
    wide = [torch.zeros(1280, 1), torch.zeros(1, 1280)]
    for rank, expected in ((16, True), (20, True), (21, False), (32, False)):
        up, down = wide[0].expand(-1, rank), wide[1].expand(rank, -1)
        assert is_thin(up, down) is expected
