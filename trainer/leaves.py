"""What each hyperparameter may hold: as JSON Schema, in words, and from a command line.

Everything here is read off the declarations in `trainer.sections`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel

from trainer.config import LEAVES, SECTIONS, TrainingConfig

# Keys of a configuration file beside the sections and leaves: what a preset says of itself,
# and what a written configuration says of how it came about.
FILE_KEYS = ("description", "resolved", "ignored_options")

# Leaves whose value may be the content itself.
CONTENTS = frozenset({"images_data_url", "captions_file_url", "class_images_url"})
# Leaves whose value may be a place on this machine or an address, those above among them: what is
# there decides what is computed, not where it lies.
PLACES = CONTENTS | {
    *("model_url", "vae_url", "single_file_config", "clipseg_url", "captioner"),
    *("face_detector_path", "face_restorer_path"),
}

# Options of other trainers that are none here on purpose, and what to do instead.
SAID_ELSEWHERE: Mapping[str, str] = {
    "hub_token": "a token stands in no configuration: run `hf auth login`, or set HF_TOKEN",
}

_LONGEST_SHOWN = 80
_TYPE_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
_BOUND_WORDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minLength": "not empty",
    "maxLength": "at most {} letters",
    "pattern": "matching {}",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NOTHING = ("none", "null")


@cache
def leaf_schema(name: str) -> Mapping[str, Any]:
    """The JSON Schema of one leaf.

    Raises:
        KeyError: there is no such leaf.
    """
    declared = _section_schema(LEAVES[name].section)["properties"][name]
    return {key: value for key, value in declared.items() if key != "title"}


def allowed(name: str) -> str:
    """What a leaf may hold, in words: `a number, above 0, or null`."""
    return in_words(leaf_schema(name))


def parts(schema: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The named parts of a value, such as those of a concept, with their schemas."""
    return next((c["properties"] for c in _choices(schema) if "properties" in c), {})


def items(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the items of a list whose items have parts; empty for anything else."""
    found = (choice["items"] for choice in _choices(schema) if "items" in choice)
    return next((item for item in found if parts(item)), {})


def shown(value: object) -> str:
    """A given value as a message quotes it: JSON, cut when long."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def nearest(name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """A hint at the known name most like this one; empty when none is near."""
    plain = name.replace("-", "_")
    if plain in SAID_ELSEWHERE:
        return SAID_ELSEWHERE[plain]
    matches = get_close_matches(plain, list(known), n=1)
    return f"did you mean `{matches[0]}`?" if matches else ""


def flag_value(name: str, text: str) -> Any:
    """The raw value of a leaf as typed on a command line.

    A text that the leaf's type cannot read stays text, so that `resolve` names it together
    with everything else that is wrong.

    Raises:
        KeyError: there is no such leaf.
    """
    types = _types(leaf_schema(name))
    if "null" in types and text.lower() in _NOTHING:
        return None
    for kind, read in _READERS.items():
        if kind in types:
            try:
                return read(text)
            except (KeyError, ValueError):
                continue
    return text


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file: leaves in their sections or flat."""
    sections = {
        name: {
            "type": "object",
            "description": _section_schema(name)["description"],
            "additionalProperties": False,
            "properties": {
                leaf: dict(leaf_schema(leaf)) for leaf in LEAVES if LEAVES[leaf].section == name
            },
        }
        for name in SECTIONS
    }
    flat = {
        name: {"$ref": f"#/properties/{leaf.section}/properties/{name}"}
        for name, leaf in LEAVES.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Training configuration",
        "description": "Options in their sections or flat at the top; each name exists once.",
        "type": "object",
        "additionalProperties": False,
        "properties": {**sections, **flat, **{key: {} for key in FILE_KEYS}},
    }


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True, exclude_none=True)
    return str(value)


def _read_boolean(text: str) -> bool:
    return _BOOLEANS[text.lower()]


def _read_list(text: str) -> list[Any]:
    """A list in JSON, in which no name stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=once)
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


_READERS: Mapping[str, Callable[[str], Any]] = {
    "boolean": _read_boolean,
    "integer": int,
    "number": float,
    "array": _read_list,
}


@cache
def _section_schema(section: str) -> dict[str, Any]:
    annotation = TrainingConfig.model_fields[section].annotation
    assert annotation is not None
    schema: dict[str, Any] = annotation.model_json_schema()
    return schema


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(schema.get("anyOf", [schema]))


def _types(schema: Mapping[str, Any]) -> set[str]:
    return {str(choice["type"]) for choice in _choices(schema)}


def in_words(schema: Mapping[str, Any]) -> str:
    """What a schema allows, in words."""
    if "anyOf" in schema:
        return ", or ".join(in_words(choice) for choice in _choices(schema))
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if "items" in schema:
        return _list_in_words(schema)
    if parts(schema):
        return f"names with values: {_in_parts(schema)}"
    bounds = [words.format(schema[key]) for key, words in _BOUND_WORDS.items() if key in schema]
    return ", ".join([_TYPE_WORDS[schema["type"]], *bounds])


def _list_in_words(schema: Mapping[str, Any]) -> str:
    item, choices = items(schema), schema["items"].get("enum", ())
    if choices:
        return f"{', '.join(choices)}, as a list or separated by commas"
    if not item and schema["type"] == "array":
        return "a list of texts, or one a line"
    if not item:
        return "names, as a list or separated by commas, none empty"
    return f"a list of {item['title'].lower()}s, each with {_in_parts(item)}"


def _in_parts(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    others = [name for name in parts(schema) if name not in required]
    return f"{', '.join(required)}; also: {', '.join(others)}"
