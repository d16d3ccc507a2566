"""Three derivations of kohya names agree: the families' tables, the module walk, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from trained_adapters import TABLES, TrainedAdapter

from trainer.export.layer_names import UnknownStructureError, expected_names, live_layers
from trainer.export.state import with_text_model
from trainer.families import family_names, load_family

FAMILIES = {name: load_family(name) for name in family_names()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_table_agrees_with_a_walk_over_the_modules(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    names = FAMILIES[family].kohya
    expected = expected_names(trained(family).fresh(), names)
    of_file = {name: home.layers for name, home in expected.items() if not home.is_plain}

    written = {
        name: tuple((component, with_text_model(path)) for component, path in layers)
        for name, layers in of_file.items()
    }

    assert len(written) > 20
    assert {name: tuple(names.layers_of(name)) for name in written} == written
    for name, layers in written.items():
        assert {names.of_layer(*layer) for layer in layers} == {name}
        swapped = {names.swaps_halves(*layer) for layer in layers}
        assert swapped == {expected[name].halves_swapped}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_shares_that_the_table_says(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    names, pipeline = FAMILIES[family].kohya, trained(family).fresh()
    live = live_layers(pipeline)

    for name, home in expected_names(pipeline, names).items():
        shares = names.layers_of(name)
        if home.is_plain or set(shares.values()) == {1} == {len(shares)}:
            continue
        for layer, share in shares.items():
            rows, inputs = live[layer].weight.shape
            assert rows == share * inputs, layer


@pytest.mark.parametrize(
    "place", ["", "time_text_embed", "transformer_blocks.0", "single_transformer_blocks.1.attn"]
)
def test_a_layer_that_the_original_does_not_have_is_told(
    place: str, trained: Callable[..., TrainedAdapter]
) -> None:
    pipeline = trained("flux").fresh()
    pipeline.transformer.get_submodule(place).add_module("extra", torch.nn.Linear(2, 2))

    with pytest.raises(UnknownStructureError, match=f"{place}.extra` is not known".lstrip(".")):
        expected_names(pipeline, FAMILIES["flux"].kohya)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_table_by_hand_agrees_with_the_familys(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    adapter = trained(family)
    ours, theirs = FAMILIES[family].kohya, TABLES[family]

    for component, path in adapter.state.layers():
        full = with_text_model(path)
        assert ours.of_layer(component, full) == theirs.of_layer(component, full)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_model_comes_back_from_its_name(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    names = FAMILIES[family].kohya
    known = {names.denoiser, *names.text_encoder_prefixes}
    layers = [layer for layer in live_layers(trained(family).fresh()) if layer[0] in known]

    for component, path in layers:
        full = with_text_model(path)
        assert (component, full) in names.layers_of(names.of_layer(component, full))
        unfused = names.of_layer(component, full, fused=False)
        assert list(names.layers_of(unfused)) == [(component, full)]
