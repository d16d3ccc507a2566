"""Every preset that ships loads, acts, and says what it is for."""

from __future__ import annotations

import pytest

from trainer.config import TrainingConfig
from trainer.config_files import parse_yaml
from trainer.errors import InputError
from trainer.presets import list_presets, load_preset, preset_text
from trainer.resolve import Layer, resolve

NAMES = [preset.name for preset in list_presets()]
PICTURES = Layer("command line", {"images_data_url": "photos"}, explicit=True)


def test_presets_ship() -> None:
    assert {"person", "product", "style"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_without_a_conflict_or_a_warning(name: str) -> None:
    config = resolve([load_preset(name), PICTURES])

    assert not [note for note in config.resolved.notes if note.kind != "ignored"]
    assert config.resolved.explicit == ("images_data_url",)


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_preset_acts(name: str) -> None:
    layer = load_preset(name)
    config = resolve([layer, PICTURES])

    assert layer.values
    assert not set(layer.values) & set(config.resolved.ignored_options)
    for leaf in layer.values:
        assert config.leaf(leaf) != TrainingConfig().leaf(leaf)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_for(name: str) -> None:
    descriptions = {preset.name: preset.description for preset in list_presets()}

    assert len(descriptions[name]) > 20


def test_what_is_set_on_purpose_wins_over_a_preset() -> None:
    chosen = Layer("train.yaml", {"images_data_url": "photos", "rank": 3}, explicit=True)

    assert resolve([load_preset("person"), chosen]).adapter.rank == 3


def test_a_copied_preset_is_a_configuration_file() -> None:
    content = parse_yaml(preset_text("person"), "person.yaml")

    assert "description" in content


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean `person`"):
        load_preset("persn")


def test_a_preset_cannot_be_a_path() -> None:
    with pytest.raises(InputError, match="allowed: one of"):
        load_preset("../payloads/person")
