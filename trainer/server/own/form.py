"""What can be chosen on the page: options as they are declared, presets, names of base models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from trainer.config import LEAVES, SECTIONS
from trainer.known_models import known_models
from trainer.leaves import allowed, json_schema, leaf_schema, parts
from trainer.presets import list_presets, load_preset
from trainer.server.inputs import CONCEPTS, DATA
from trainer.server.own.messages import Form, Model, Option, Preset, Section

# Presets that say what the pictures show.
SUBJECTS = ("person", "product", "style")
# Options that the server refuses, with the reason.
REFUSED: Mapping[str, str] = {
    "wandb": "a training here sends its curves to nobody else",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_private"),
        "a training here sends its files to nobody else",
    ),
}
# What the page asks for in its own way, or not at all.
_ELSEWHERE = {*DATA, CONCEPTS, *REFUSED}


def form() -> Form:
    """All that can be chosen now: the owner's list of base models may change.

    Raises:
        InputError: that list cannot be used.
    """
    return Form(
        subjects=list(SUBJECTS),
        presets=list(_presets()),
        models=[
            Model(name=name, note=model.note)
            for name, model in known_models().items()
            if "model_url" in model.options
        ],
        sections=list(_sections()),
    )


@cache
def _presets() -> tuple[Preset, ...]:
    return tuple(
        Preset(
            name=preset.name,
            description=preset.description,
            values=dict(load_preset(preset.name).values),
        )
        for preset in list_presets()
    )


@cache
def _sections() -> tuple[Section, ...]:
    declared = json_schema()["properties"]
    return tuple(
        Section(
            name=name,
            description=declared[name]["description"].partition("\n")[0],
            options=list(_options(name)),
        )
        for name in SECTIONS
    )


def _options(section: str) -> Iterator[Option]:
    for name, leaf in LEAVES.items():
        if leaf.section != section or name in _ELSEWHERE:
            continue
        schema = leaf_schema(name)
        kinds = list(schema.get("anyOf", [schema]))
        if any(parts(kind) for kind in kinds):
            continue
        yield Option(
            name=name,
            allowed=allowed(name),
            description=str(schema.get("description", "")),
            default=_default(schema),
            choices=next((kind["enum"] for kind in kinds if "enum" in kind), None),
            types=[str(kind.get("type", "string")) for kind in kinds],
            minimum=_bound(kinds, "minimum"),
            maximum=_bound(kinds, "maximum"),
        )


def _default(schema: Mapping[str, Any]) -> Any:
    return schema.get("default")


def _bound(kinds: list[Mapping[str, Any]], name: str) -> float | None:
    """The one bound of all numbers that an option may be."""
    found = {kind[name] for kind in kinds if name in kind}
    return float(found.pop()) if len(found) == 1 else None
