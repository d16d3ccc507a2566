"""Every preset that ships loads, acts, and says what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from trainer.config import LEAVES, TrainingConfig
from trainer.config_files import parse_yaml
from trainer.dialects import layers_of
from trainer.errors import InputError
from trainer.presets import list_presets, load_preset, preset_text
from trainer.resolve import Layer, resolve

NAMES = [preset.name for preset in list_presets()]
PICTURES = Layer("command line", {"images_data_url": "photos"}, explicit=True)

# The names of services' presets: the dialect, a request with nothing but what the service demands,
# and the same demands as options here.
_NOVITA = {"name": "lora", "base_model": "v1-5-pruned-emaonly", "width": 512, "height": 512}
_NOVITA_FLAGS = {
    "model_url": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "resolution_width": 512,
    "resolution_height": 512,
}
_GUIDE = {"training_images": ["one.jpg"], "trigger_word": "TOK"}
_GUIDE_FLAGS = {"instance_prompt": "TOK", "token_abstraction": "TOK"}
HOSTED: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "fal-personalization": (
        "fal",
        {"images_data_url": "photos", "photo_class": "Person"},
        {"photo_class": "Person"},
    ),
    "fal-flux-lora": ("fal_lora", {"images_data_url": "photos"}, {}),
    "fal-guide-flux": ("flux-lora", _GUIDE, _GUIDE_FLAGS),
    "fal-guide-sdxl": ("sdxl-lora", _GUIDE, _GUIDE_FLAGS),
    "fal-guide-sd15": ("sd15-lora", _GUIDE, _GUIDE_FLAGS),
    "novita-subject": (
        "novita-subject",
        {**_NOVITA, "image_dataset_items": [{"assets_id": "one.jpg"}]},
        _NOVITA_FLAGS,
    ),
    "novita-style": (
        "novita-style",
        {**_NOVITA, "image_dataset_items": [{"assets_id": "one.jpg", "caption": "a tree"}]},
        _NOVITA_FLAGS,
    ),
    **{
        f"bfl-{mode}": ("bfl", {"file_data": "a.zip", "finetune_comment": "lora", "mode": mode}, {})
        for mode in ("character", "product", "style", "general")
    },
}
# What a preset leaves out or settles by itself, as its comment or description says.
DIFFERS = {"images_data_url"}
# A value of the service's own that deserves a warning here, too.
WARNED = {"fal-personalization": ["snr_gamma"]}


def settings(name: str) -> Layer:
    """What a user must say beside a preset."""
    demanded = HOSTED[name][2] if name in HOSTED else {}
    return Layer("command line", {**PICTURES.values, **demanded}, explicit=True)


def test_presets_ship() -> None:
    assert {"person", "product", "style"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_without_a_conflict_or_a_warning(name: str) -> None:
    config = resolve([load_preset(name), settings(name)])

    odd = [note.field for note in config.resolved.notes if note.kind != "ignored"]
    assert odd == WARNED.get(name, [])
    assert set(config.resolved.explicit) == set(settings(name).values)


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_preset_acts(name: str) -> None:
    layer = load_preset(name)
    config = resolve([layer, settings(name)])

    assert layer.values
    assert not set(layer.values) & set(config.resolved.ignored_options)
    for leaf in layer.values:
        assert config.leaf(leaf) != TrainingConfig().leaf(leaf)


def test_every_service_has_its_presets() -> None:
    named = {name for name in NAMES if name.startswith(("fal-", "novita-", "bfl-"))}

    assert named == set(HOSTED)


@pytest.mark.parametrize("name", HOSTED)
def test_a_services_preset_means_what_a_bare_request_to_it_means(name: str) -> None:
    dialect, request, _ = HOSTED[name]
    asked = resolve(layers_of(dialect, request))
    config = resolve([load_preset(name), settings(name)])

    acting = [leaf for leaf in LEAVES if leaf not in asked.resolved.ignored_options]
    others = {
        leaf: (config.leaf(leaf), asked.leaf(leaf))
        for leaf in acting
        if leaf not in DIFFERS and config.leaf(leaf) != asked.leaf(leaf)
    }
    assert others == {}
    assert set(config.resolved.ignored_options) == set(asked.resolved.ignored_options)


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
