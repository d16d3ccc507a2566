"""What adapted layers compute with in a step: made once, of what the weights are now."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from layer_pairs import FORMS, adapted, distance, learn_something, learning, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import adapters
from trainer.adapted.layers import AdaptedLayer, Copies

FORMATS = [torch.float32, torch.bfloat16]


class Operations(TorchDispatchMode):
    """Counts operations; views of tensors, which compute nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def linear(form: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return adapted(torch.nn.Linear(24, 40, dtype=dtype), form, "ours")


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_in_a_step_the_copies_count_and_they_are_those_of_its_start(
    form: str, dtype: torch.dtype
) -> None:
    layer = linear(form, dtype)
    copies = Copies([layer], dtype)
    before = layer(inputs(dtype))
    learn_something(layer)
    after = layer(inputs(dtype))
    assert distance(after, before) > 1e-2
    with copies.of_this_step():
        assert torch.equal(layer(inputs(dtype)), after)
        for made in layer[0].copied:
            made.zero_()
        without = layer(inputs(dtype))
        assert distance(without, after) > 1e-2
    if dtype != torch.float32:
        # The masters count again, and the next step makes copies anew.
        assert torch.equal(layer(inputs(dtype)), after)
        with copies.of_this_step():
            assert torch.equal(layer(inputs(dtype)), after)


@pytest.mark.parametrize("form", FORMS)
def test_in_32_bits_factors_are_copied_only_to_lie_together(form: str) -> None:
    layer = linear(form)
    Copies([layer], torch.float32)
    own = {p.untyped_storage().data_ptr() for p in learning(layer).values()}
    copied = [made.untyped_storage().data_ptr() for made in layer[0].copied]
    # DoRA's factors also lie beside those of other layers, and there are gains and norms; LoHa's
    # lie two by two.
    assert len(set(copied) - own) == {"dora": 4, "loha": 2, "thin loha": 2}.get(form, 0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_put_back_from_a_checkpoint_are_what_the_next_step_computes_with(form: str) -> None:
    ours, other = linear(form, torch.bfloat16), linear(form, torch.bfloat16)
    learn_something(other, seed=7)
    copies = Copies([ours], torch.bfloat16)
    with copies.of_this_step():
        before = ours(inputs(torch.bfloat16))
    adapters.load_adapter_tensors(ours, adapters.adapter_tensors(other))
    with copies.of_this_step():
        after = ours(inputs(torch.bfloat16))
    assert torch.equal(after, other(inputs(torch.bfloat16)))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("dtype", "under_autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("kind", ["rows", "3 x 3"])
def test_doras_norms_are_those_of_the_whole_weight(
    kind: str, dtype: torch.dtype, under_autocast: bool
) -> None:
    make = {"rows": torch.nn.Linear(24, 40), "3 x 3": torch.nn.Conv2d(8, 12, 3)}[kind]
    module = adapted(make.to(dtype), "dora", "ours")
    (layer,) = module
    copies = Copies([module], dtype)
    learn_something(module, seed=8)
    down, up, magnitude = (factor.detach().double() for factor in layer.factors())
    # Liu et al. 2024, equation 5, in 64 bits; alpha is 6, the rank 4.
    change = up.flatten(1) @ down.flatten(1) * 6 / 4
    norms = torch.linalg.vector_norm(layer.base_layer.weight.double().flatten(1) + change, dim=1)

    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast), copies.of_this_step():
        in_step = layer.copied[2:]
        by_itself = layer.copied_anew(dtype)[2:]
    for excess, norm in (in_step, by_itself):
        assert (excess.dtype, norm.dtype) == (dtype, torch.float32)
        # In bf16 half of what a number itself may be off by.
        bound = 1e-6 if dtype == torch.float32 else 2**-10
        assert distance(norm, norms) < bound
        assert distance(excess.float() + 1, magnitude.flatten() / norms) < bound


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_a_row_that_the_adapter_cancels_stays_finite(form: str) -> None:
    layer = linear(form)
    learns = learning(layer)
    with torch.no_grad():
        layer[0].base_layer.weight.zero_()
        for name, parameter in learns.items():
            if "lora_B" in name:
                parameter.zero_()
    with Copies([layer], torch.float32).of_this_step():
        layer(inputs()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for n, p in learns.items() if "lora_A" in n)


def test_layers_of_one_shape_may_have_adapters_of_several_ranks() -> None:
    models = [adapted(torch.nn.Linear(24, 40), "dora", "ours", rank=rank) for rank in (2, 4)]
    rows = inputs()
    expected = [model(rows) for model in models]
    with Copies(models, torch.float32).of_this_step():
        for model, wanted in zip(models, expected, strict=True):
            torch.testing.assert_close(model(rows), wanted)


@pytest.mark.parametrize("dtype", FORMATS)
def test_weights_of_one_shape_are_moved_side_by_side_and_stay_the_same(dtype: torch.dtype) -> None:
    model = several("dora", 3, dtype)
    weights = [layer.base_layer.weight for layer in model]
    before = [weight.clone() for weight in weights]
    rows = torch.randn(2, 16, dtype=dtype)
    expected = model(rows)
    copies = Copies([model], dtype)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    with copies.of_this_step():
        torch.testing.assert_close(model(rows), expected)


def test_weights_that_are_widened_or_lie_otherwise_stay_where_they_are() -> None:
    lies_otherwise = torch.nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    module = torch.nn.Sequential(lies_otherwise, torch.nn.Conv2d(8, 8, 3, padding=1))
    module.requires_grad_(False)
    module = with_adapter(module, "dora", "ours", ["0", "1"])
    inputs_ = torch.randn(2, 8, 6, 6)
    expected, weight = module(inputs_), module[0].base_layer.weight
    place = weight.data_ptr()
    with Copies([module], torch.float32).of_this_step():
        torch.testing.assert_close(module(inputs_), expected)
    assert weight.data_ptr() == place
    assert weight.is_contiguous(memory_format=torch.channels_last)


def several(form: str, count: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    layers = [torch.nn.Linear(16, 16, dtype=dtype) for _ in range(count)]
    module = torch.nn.Sequential(*layers).requires_grad_(False)
    return with_adapter(module, form, "ours", [str(n) for n in range(count)])


def refreshing(form: str, count: int) -> Counter[str]:
    copies = Copies([several(form, count)], torch.bfloat16)
    with Operations() as operations, copies.of_this_step():
        pass
    return operations.seen


def test_copies_of_any_number_of_layers_are_one_operation() -> None:
    for form in FORMS.keys() - {"dora", "thin loha"}:
        assert refreshing(form, 4) == refreshing(form, 16) == Counter({"_foreach_copy_": 1})
    # Two products of factors each; its own are not copied.
    assert refreshing("thin loha", 4) == Counter({"mul": 8})


def test_doras_norms_are_made_at_once_for_layers_of_one_shape() -> None:
    few, many = refreshing("dora", 4), refreshing("dora", 16)
    assert few == many
    assert few.total() <= 16


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_several_forward_passes_makes_copies_once(form: str) -> None:
    module = several(form, 2)
    copies = Copies([module], torch.bfloat16)
    values = torch.randn(3, 16, dtype=torch.bfloat16)

    def passes(count: int) -> Counter[str]:
        with Operations() as operations, copies.of_this_step():
            for _ in range(count):
                module(values)
        return operations.seen

    none, one, three = passes(0), passes(1), passes(3)
    assert none.total() > 0
    one.subtract(none)
    three.subtract(none)
    assert three == Counter({name: 3 * count for name, count in one.items()})
    # In 16 bits already: nothing is cast on the way.
    assert one["_to_copy"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_for_an_adapter_that_rests_no_gradient_is_computed(form: str) -> None:
    layer, values = linear(form), inputs().requires_grad_()

    def backward() -> int:
        outputs = layer(values).sum()
        with Operations() as operations:
            outputs.backward()
        return operations.seen["mm"]

    learns = backward()
    layer.requires_grad_(False)
    assert backward() < learns


def test_copies_are_over_when_a_step_fails() -> None:
    copies = Copies([linear("lora")], torch.float32)
    with pytest.raises(ValueError, match="in a step"), copies.of_this_step():
        assert copies.are_current
        raise ValueError("in a step")
    assert not copies.are_current


def test_a_layer_outside_of_all_copies_computes_too() -> None:
    layer = linear("dora")
    assert isinstance(layer[0], AdaptedLayer)
    assert layer[0].copies is None
    assert layer(inputs()).shape == (6, 40)
