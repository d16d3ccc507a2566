"""What a request has, lacks and has too much, judged by a model alone."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from trainer.contracts import faults_in, judged, left_aside
from trainer.errors import Missing


class Size(BaseModel):
    width: int = 1


class Lora(BaseModel):
    path: str
    strength: float = 1.0


class Asked(BaseModel):
    prompt: str
    size: Literal["square"] | Size | None = None
    loras: list[Lora] = []
    style: str | None = None


def aside(payload: dict[str, Any], not_used: dict[str, str] | None = None) -> dict[str, str]:
    notes = left_aside(payload, Asked, not_used or {}, "the service")
    return {note.field: note.message for note in notes if note.kind == "ignored"}


@pytest.mark.parametrize(
    ("payload", "places"),
    [
        ({"prompt": "a", "size": {"width": 2}, "loras": [{"path": "a"}]}, []),
        ({"foo": None}, ["request.foo"]),
        ({"size": {"depth": 1}}, ["request.size.depth"]),
        ({"loras": [{"path": "a"}, {"weight": 1}]}, ["request.loras[1].weight"]),
        ({"size": [{"depth": 1}], "loras": {"weight": 1}, "prompt": {"a": 1}}, []),
        ({"size": "square", "loras": None}, []),
    ],
)
def test_what_a_service_does_not_know_is_listed_wherever_it_lies(
    payload: dict[str, Any], places: list[str]
) -> None:
    assert list(aside(payload)) == places


def test_a_field_that_is_not_used_is_listed_with_the_reason_where_it_is_given() -> None:
    reasons = {"style": "there are no styles", "loras.strength": "all are whole"}
    payload = {"style": "pale", "loras": [{"path": "a"}, {"path": "b", "strength": 2}]}

    assert aside(payload, reasons) == {
        "request.style": "there are no styles",
        "request.loras[1].strength": "all are whole",
    }
    assert aside({"style": None}, reasons) == {}


def test_no_more_is_named_than_anybody_reads() -> None:
    assert len(aside({f"field_{number}": 1 for number in range(1000)})) <= 100


def test_what_is_not_there_is_told_apart_from_what_is_wrong() -> None:
    faults = faults_in({"loras": [{}, 7]}, Asked, {})

    assert [(fault.field, fault.is_missing) for fault in faults] == [
        ("prompt", True),
        ("loras[0].path", True),
        ("loras[1]", False),
    ]
    problems = [fault.problem("the service") for fault in faults]
    assert [isinstance(problem, Missing) for problem in problems] == [True, True, False]


def test_a_judgement_parts_what_is_taken_from_what_is_refused() -> None:
    found = judged({"prompt": "a", "loras": 7, "style": None, "foo": 1}, Asked, "the service")

    assert (found.given, found.refused) == ({"prompt": "a"}, {"loras"})
    assert found.defaults == {"size": None, "loras": [], "style": None}
    assert [note.field for note in found.notes] == ["request.foo"]
