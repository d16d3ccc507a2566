"""From several sources of options to one configuration: layers, checks, and all errors at once.

Later layers win; the order is default, dialect default, preset, file, flag. What options mean
together stands in `trainer.rules`; where layers come from is not known here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import ValidationError, create_model

from trainer.config import LEAVES, SECTIONS, Note, Resolution, Section, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.leaves import in_words, items, leaf_schema, nearest, parts, shown
from trainer.rules import Draft, settle


@dataclass(frozen=True)
class Layer:
    """Options from one source.

    Args:
        name: the source, as messages call it: a file's name, `command line`.
        values: leaf to raw value, flat.
        explicit: whether somebody set these on purpose; defaults of dialects and values of
            presets are not explicit.
        notes: what the source itself left aside or had settled before.
        problems: what is wrong with the source beside its values.
        is_written: whether it is of a written configuration, see `Draft`.
        wrong: leaves that the problems tell of under other names.
        fields: leaf to what the source calls it, where it has another name there.
    """

    name: str
    values: Mapping[str, Any]
    explicit: bool
    notes: Sequence[Note] = ()
    problems: Sequence[Problem] = ()
    is_written: bool = False
    wrong: Collection[str] = ()
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve(layers: Sequence[Layer]) -> TrainingConfig:
    """The configuration that these layers mean, later ones over earlier ones.

    Raises:
        InputError: with everything that is wrong: unknown options, wrong types and ranges,
            options that exclude each other.
    """
    problems = [problem for layer in layers for problem in layer.problems]
    problems += _unknown(layers)
    draft = _merge(layers)
    problems += _check_leaves(draft, layers)
    draft.wrong |= {problem.field for problem in problems}
    draft.wrong |= {leaf for layer in layers for leaf in layer.wrong}
    settle(draft)
    config, clashes = _build(draft, _earlier_notes(layers, draft))
    problems += [*draft.problems, *clashes]
    if problems:
        raise InputError([_as_source_says(problem, layers, draft) for problem in problems])
    return config


def _as_source_says(problem: Problem, layers: Sequence[Layer], draft: Draft) -> Problem:
    """A problem under its source's name of the option, unless a later source has set it."""
    leaf = re.split(r"[.\[]", problem.field, maxsplit=1)[0]
    naming = [number for number, layer in enumerate(layers, start=1) if leaf in layer.fields]
    if not naming or draft.origins.get(leaf, 0) > naming[-1]:
        return problem
    field = layers[naming[-1] - 1].fields[leaf]
    # What null means there is the source's own matter.
    return replace(problem, field=field, message=problem.message.removesuffix(", or null"))


def _unknown(layers: Sequence[Layer]) -> list[Problem]:
    """Problems of options that do not exist."""
    return [
        Problem(name, f"there is no such option (in {layer.name})", nearest(name, LEAVES))
        for layer in layers
        for name in layer.values
        if name not in LEAVES
    ]


def _merge(layers: Sequence[Layer]) -> Draft:
    """The strongest value of every leaf; 0 is the origin of the engine's own defaults."""
    values = {name: leaf.info.default for name, leaf in LEAVES.items()}
    origins = dict.fromkeys(LEAVES, 0)
    explicit: set[str] = set()
    for number, layer in enumerate(layers, start=1):
        for name in layer.values.keys() & LEAVES.keys():
            values[name] = layer.values[name]
            origins[name] = number
            explicit = explicit | {name} if layer.explicit else explicit - {name}
    written = frozenset(n for n, layer in enumerate(layers, start=1) if layer.is_written)
    return Draft(values, origins, frozenset(explicit), written=written)


@cache
def _checks() -> Mapping[str, type[Section]]:
    """Each section without the checks of several leaves together."""
    checks = {}
    for name in SECTIONS:
        leaves = {leaf.name: leaf.info for leaf in LEAVES.values() if leaf.section == name}
        fields: dict[str, Any] = {key: (info.annotation, info) for key, info in leaves.items()}
        checks[name] = create_model(name, __base__=Section, **fields)
    return checks


def _check_leaves(draft: Draft, layers: Sequence[Layer]) -> list[Problem]:
    """Problems of wrong types and ranges; such leaves fall back, so that checking can go on."""
    problems: list[Problem] = []
    for section, check in _checks().items():
        leaves = [leaf.name for leaf in LEAVES.values() if leaf.section == section]
        given = {name: draft.values[name] for name in leaves}
        try:
            check.model_validate(given)
        except ValidationError as error:
            places = [detail["loc"] for detail in error.errors()]
            wrong = list(dict.fromkeys(str(place[0]) for place in places))
            for name in wrong:
                source = layers[draft.origins[name] - 1].name
                inside = [place[1:] for place in places if place[0] == name]
                problems += _problems_of(name, inside, given[name], source)
                given[name] = LEAVES[name].info.default
            draft.explicit -= set(wrong)
            draft.wrong |= set(wrong)
        checked = check.model_validate(given)
        draft.values.update(dict(checked))
    return problems


def _problems_of(
    leaf: str, places: Sequence[tuple[int | str, ...]], value: Any, source: str
) -> list[Problem]:
    """The problems of one leaf: of its whole value, or of each wrong part inside.

    Args:
        places: the way to each wrong part, from the leaf on; empty for the leaf itself.
    """
    found = [_problem(leaf, place, value, source) for place in places]
    inside = [problem for problem in found if problem.field != leaf]
    return list({problem.field: problem for problem in inside or found}.values())


def _problem(leaf: str, place: Sequence[int | str], value: Any, source: str) -> Problem:
    field, schema = leaf, leaf_schema(leaf)
    for step in place:
        if isinstance(step, int) and items(schema):
            field, schema, value = f"{field}[{step}]", items(schema), value[step]
        elif step in parts(schema):
            field, schema = f"{field}.{step}", parts(schema)[str(step)]
            if step not in value:
                return Problem(field, f"is missing (in {source}); allowed: {in_words(schema)}")
            value = value[step]
        elif parts(schema):
            name = f"{field}.{step}"
            hint = nearest(str(step), parts(schema))
            return Problem(name, f"there is no such option (in {source})", hint)
        else:
            break
    return Problem(field, f"got {shown(value)} (in {source}); allowed: {in_words(schema)}")


def _earlier_notes(layers: Sequence[Layer], draft: Draft) -> list[Note]:
    """What sources had settled themselves, where nothing stronger has set the leaf since."""
    return [
        note
        for number, layer in enumerate(layers, start=1)
        for note in layer.notes
        if _leaf_of(note) not in LEAVES
        or (note.kind == "yielded" and draft.origins[_leaf_of(note)] == number)
    ]


def _leaf_of(note: Note) -> str:
    """The leaf that a note is about: `concepts` for one on `concepts[1].repeats`."""
    return note.field.partition("[")[0]


def _build(draft: Draft, earlier: Sequence[Note]) -> tuple[TrainingConfig, list[Problem]]:
    """The finished configuration, and the problems of leaves that meet in one section."""
    order = {name: place for place, name in enumerate(LEAVES)}
    settled = {note.field for note in draft.notes if note.kind == "yielded"}
    notes = [note for note in earlier if note.field not in settled] + draft.notes
    notes.sort(key=lambda note: (order.get(_leaf_of(note), len(order)), note.field, note.kind))
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, leaf in LEAVES.items():
        sections[leaf.section][name] = draft.values[name]
    explicit = tuple(name for name in LEAVES if name in draft.explicit)
    try:
        resolved = Resolution(explicit=explicit, notes=tuple(notes))
        return TrainingConfig.model_validate({**sections, "resolved": resolved}), []
    except ValidationError as error:
        clashes = [detail["ctx"] for detail in error.errors()]
        return TrainingConfig(), [Problem(clash["field"], clash["message"]) for clash in clashes]
