"""Three derivations of kohya names agree: the families' tables, the module walk, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from trained_adapters import TABLES, TrainedAdapter

from trainer.export.layer_names import expected_names, live_layers
from trainer.export.state import with_text_model
from trainer.families.sd15 import FAMILY as SD15
from trainer.families.sdxl import FAMILY as SDXL

FAMILIES = {"sd15": SD15, "sdxl": SDXL}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_familys_table_agrees_with_a_walk_over_the_modules(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    names = FAMILIES[family].kohya
    expected = {
        layer: name for name, layer in expected_names(trained(family).fresh(), names).items()
    }

    written = {layer: names.of_layer(layer[0], with_text_model(layer[1])) for layer in expected}

    assert len(expected) > 100
    assert written == expected


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_table_by_hand_agrees_with_the_familys(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    adapter = trained(family)
    ours, theirs = FAMILIES[family].kohya, TABLES[family]

    for component, path in adapter.state.layers():
        full = with_text_model(path)
        assert ours.of_layer(component, full) == theirs.of_layer(component, full)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_layer_of_the_model_comes_back_from_its_name(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    names = FAMILIES[family].kohya
    known = {"unet", *names.text_encoder_prefixes}
    layers = [layer for layer in live_layers(trained(family).fresh()) if layer[0] in known]

    for component, path in layers:
        full = with_text_model(path)
        assert names.layer_of(names.of_layer(component, full), "unet") == (component, full)
