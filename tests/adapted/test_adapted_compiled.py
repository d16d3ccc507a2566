"""Adapted layers under torch.compile: captured whole, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from layer_pairs import FORMS, adapted, computed, learning, same, with_adapter
from torch.utils.checkpoint import checkpoint

from trainer.adapted.layers import AdaptedLayer, Copies

Layer = Callable[[torch.Tensor], torch.Tensor]

# torch does that itself while it captures one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def captured(layer: Layer) -> Layer:
    """Compiled without code being made; a break in the graph is an error."""
    compiled: Layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    return compiled


def is_computed_the_same(module: torch.nn.Module, layer: Layer, shape: tuple[int, ...]) -> None:
    """Asserts it for a captured layer, inside of a step and outside."""
    learns, compiled = learning(module), captured(layer)
    copies = Copies([module], torch.float32)
    eager = computed(layer, learns, shape)
    with copies.of_this_step():
        same(computed(compiled, learns, shape), eager)


@pytest.mark.parametrize("form", FORMS)
def test_a_linear_layer_is_captured_whole(form: str) -> None:
    module = adapted(torch.nn.Linear(24, 40), form, "ours")
    is_computed_the_same(module, module, (2, 5, 24))


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
def test_so_is_one_that_is_lent_an_example(form: str) -> None:
    module = adapted(torch.nn.Linear(24, 40), form, "ours")
    is_computed_the_same(module, lambda inputs: module(inputs[:1].expand(3, -1, -1)), (2, 5, 24))


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
def test_so_is_a_convolution(form: str) -> None:
    module = adapted(torch.nn.Conv2d(8, 12, 3), form, "ours")
    is_computed_the_same(module, module, (2, 8, 6, 5))


@pytest.mark.thorough
@pytest.mark.parametrize("form", FORMS)
def test_so_is_a_layer_that_is_computed_again_in_the_backward_pass(form: str) -> None:
    module = adapted(torch.nn.Linear(24, 40), form, "ours")
    again = partial(checkpoint, module, use_reentrant=False)
    is_computed_the_same(module, again, (2, 5, 24))


@pytest.mark.parametrize("form", FORMS)
def test_outside_of_a_step_and_under_autocast_too(form: str) -> None:
    module = adapted(torch.nn.Linear(24, 40, dtype=torch.bfloat16), form, "ours")
    learns, compiled = learning(module), captured(module)
    with torch.autocast("cpu", torch.bfloat16):
        same(computed(compiled, learns, (6, 24)), computed(module, learns, (6, 24)), bound=1e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_so_is_a_block_of_a_denoiser(form: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    layers = [f"attn{number}.{name}" for number in (1, 2) for name in names]
    with_adapter(block, form, "ours", layers)
    assert sum(isinstance(each, AdaptedLayer) for each in block.modules()) == 8

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        text = torch.linspace(-1, 1, 2 * 5 * 24).view(2, 5, 24).sin()
        if checkpointed:
            return checkpoint(block, hidden, None, text, use_reentrant=False)
        outputs: torch.Tensor = block(hidden, None, text)
        return outputs

    is_computed_the_same(block, forward, (2, 6, 32))
