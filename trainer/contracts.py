"""What a request to a service has, lacks and has too much, by the model of its contract.

Which services there are and what their fields mean is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config import Note
from trainer.errors import Missing, Problem
from trainer.leaves import in_words, nearest, shown

_NOTHING: Mapping[str, str] = MappingProxyType({})
_PLACE = re.compile(r"\[\d+\]")
# A request may have as many unknown fields as it likes; so many are named.
_MOST_NAMED = 100


@dataclass(frozen=True)
class Fault:
    """A value that a service does not take.

    Args:
        field: its name, and in a list or group its place: `items[0].caption`.
        allowed: in words.
        is_missing: whether the field is required and not there.
    """

    field: str
    value: Any
    allowed: str
    is_missing: bool

    @property
    def top(self) -> str:
        """The field of the request that it is in."""
        return re.split(r"[.\[]", self.field, maxsplit=1)[0]

    def problem(self, service: str) -> Problem:
        """What to say of it; `Missing` where the field is not there."""
        if self.is_missing:
            return missing(self.field, service, self.allowed)
        message = f"got {shown(self.value)} (in request); allowed: {self.allowed}"
        return Problem(self.field, message)


@dataclass(frozen=True)
class Judged:
    """A request as its service takes it.

    Args:
        given: the fields that the service takes; one that is null is not given.
        defaults: those of the fields that are not given.
        refused: the fields that something is wrong with, as `problems` tell.
        notes: on what is left aside.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    refused: frozenset[str]
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]


def judged(
    payload: Mapping[str, Any],
    model: type[BaseModel],
    service: str,
    *,
    words: Mapping[str, str] = _NOTHING,
    not_used: Mapping[str, str] = _NOTHING,
) -> Judged:
    """What a service takes of a request.

    Args:
        model: the service's request.
        service: its name.
        words: field to what it may hold, where the schema does not say it well.
        not_used: field to the reason why it is not taken.
    """
    fields = model.model_fields
    known = without_nulls({name: value for name, value in payload.items() if name in fields})
    faults = faults_in(known, model, words)
    refused = frozenset(fault.top for fault in faults)
    given = {name: value for name, value in known.items() if name not in refused}
    return Judged(
        given=given,
        defaults={
            name: info.default
            for name, info in fields.items()
            if name not in given and not info.is_required()
        },
        refused=refused,
        problems=tuple(fault.problem(service) for fault in faults),
        notes=tuple(left_aside(payload, model, not_used, service)),
    )


def missing(field: str, service: str, allowed: str) -> Missing:
    """What to say of a field that a service requires."""
    return Missing(field, f"is missing, and {service} requires it; allowed: {allowed}")


def faults_in(
    request: Mapping[str, Any], model: type[BaseModel], words: Mapping[str, str]
) -> list[Fault]:
    """What a service would not take of a request, each field once.

    Args:
        request: its fields.
        model: the service's request.
        words: field to what it may hold, where the schema does not say it well.
    """
    try:
        model.model_validate(request)
    except ValidationError as error:
        schema = _schema(model)
        found = [_fault(detail, request, schema, words) for detail in error.errors()]
        return list({fault.field: fault for fault in reversed(found)}.values())[::-1]
    return []


def left_aside(
    payload: Mapping[str, Any],
    model: type[BaseModel],
    not_used: Mapping[str, str],
    service: str,
    *,
    within: str = "request",
) -> list[Note]:
    """Notes on the fields of a request that are not taken, as services leave aside what they lack.

    Also on those in its groups and lists; with a warning where one is nearly a field that the
    service knows. So many are named as anybody reads.

    Args:
        model: the service's request.
        not_used: field to the reason why it is not taken; one in a group as `group.field`.
        service: its name.
        within: what the fields are of.
    """
    schema = _schema(model)
    aside = _Aside(schema, not_used, f"{service} has no such field", f"{within}.")
    return list(islice(aside.in_value(payload, schema, within), _MOST_NAMED))


def without_nulls(value: Any) -> Any:
    """The same nested value without the fields that are null: to services that means unset."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


@dataclass(frozen=True)
class _Aside:
    """Looks for what a service leaves aside, see `left_aside`.

    Args:
        root: the schema of the whole request.
        unknown: the reason for a field that the schema does not have.
        prefix: what the places of all fields begin with.
    """

    root: Mapping[str, Any]
    not_used: Mapping[str, str]
    unknown: str
    prefix: str

    def in_value(self, value: Any, schema: Mapping[str, Any], place: str) -> Iterator[Note]:
        """Notes on what lies in a value."""
        if isinstance(value, list) and "items" in (part := _part(schema, self.root, "items")):
            for number, item in enumerate(value):
                yield from self.in_value(item, part["items"], f"{place}[{number}]")
        elif isinstance(value, Mapping):
            fields = _part(schema, self.root, "properties").get("properties", {})
            for name, inner in value.items() if fields else ():
                yield from self._in_field(str(name), inner, fields, f"{place}.{name}")

    def _in_field(
        self, name: str, value: Any, fields: Mapping[str, Any], place: str
    ) -> Iterator[Note]:
        if name not in fields:
            yield Note(kind="ignored", field=place, message=self.unknown)
            if hint := nearest(name, fields):
                yield Note(kind="warning", field=place, message=f"was left aside; {hint}")
            return
        reason = self.not_used.get(_PLACE.sub("", place.removeprefix(self.prefix)))
        if reason is not None and value is not None:
            yield Note(kind="ignored", field=place, message=reason)
        yield from self.in_value(value, fields[name], place)


@cache
def _schema(model: type[BaseModel]) -> Mapping[str, Any]:
    return model.model_json_schema()


def _fault(
    detail: Mapping[str, Any] | Any,
    value: Any,
    schema: Mapping[str, Any],
    words: Mapping[str, str],
) -> Fault:
    """One of pydantic's errors, by the way through the schema to the wrong value."""
    field, here, is_missing = "", schema, False
    for step in detail["loc"]:
        items, fields = _part(here, schema, "items"), _part(here, schema, "properties")
        if isinstance(step, int) and "items" in items and isinstance(value, list):
            field, here, value = f"{field}[{step}]", items["items"], value[step]
        elif step in fields.get("properties", {}) and isinstance(value, Mapping):
            field = f"{field}.{step}" if field else str(step)
            here, is_missing = fields["properties"][step], step not in value
            value = value.get(step)
        else:
            # The name of one of several types.
            break
    return Fault(
        field, value, words.get(_PLACE.sub("[]", field)) or _in_words(here, schema), is_missing
    )


def _in_words(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    choices = [_found(choice, root) for choice in schema.get("anyOf", [schema])]
    return ", or ".join(_told(choice, root) for choice in choices).removesuffix(", or null")


def _told(choice: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """One type in words; a group is told by its fields where one of them is wrong."""
    if choice.get("type") == "object":
        return "a group of fields"
    if _found(choice.get("items", {}), root).get("type") == "object":
        return "a list of groups of fields"
    return in_words(choice)


def _part(schema: Mapping[str, Any], root: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The one of a schema's types that has `items` or `properties`; empty where none has."""
    choices = [_found(choice, root) for choice in [schema, *schema.get("anyOf", [])]]
    return next((choice for choice in choices if key in choice), {})


def _found(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema refers to, or itself."""
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = root["$defs"][name] if name else schema
    return found
