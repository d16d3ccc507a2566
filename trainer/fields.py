"""What hyperparameters are declared with: the base of all sections, and types that they share.

Knows no hyperparameter; those stand in `trainer.sections`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError


def _split_commas(value: object) -> object:
    """A list of names, whether it comes as a sequence or as one comma-separated string."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return as_tuple(value)


def as_tuple(value: object) -> object:
    """A list as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def lowered(value: object) -> object:
    """A text in small letters; anything else as it is."""
    return value.lower() if isinstance(value, str) else value


def stripped(value: object) -> object:
    """A text without white space around it; anything else as it is."""
    return value.strip() if isinstance(value, str) else value


def capitalized(value: object) -> object:
    """A text with a capital first letter; anything else as it is."""
    return value.capitalize() if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
NAMES_SCHEMA = {"type": ["array", "string"], "items": {"type": "string", "minLength": 1}}
Names = Annotated[tuple[Text, ...], BeforeValidator(_split_commas), WithJsonSchema(NAMES_SCHEMA)]
PreparationStep = Literal["face_crop_region", "face_restore", "resize"]
# Their usual order.
PREPARATION_STEPS: tuple[PreparationStep, ...] = ("face_crop_region", "face_restore", "resize")
_STEPS_SCHEMA: JsonDict = {
    "type": ["array", "string"],
    "items": {"type": "string", "enum": list(PREPARATION_STEPS)},
}
PreparationSteps = Annotated[
    tuple[PreparationStep, ...], BeforeValidator(_split_commas), WithJsonSchema(_STEPS_SCHEMA)
]
PhotoClass = Literal["Man", "Woman", "Person", "Boy", "Girl", "Baby"]
Fraction = Annotated[float, Field(gt=0, le=1)]

# Marks leaves that change how a run is watched or stored, never what it computes.
WATCHING_ONLY: JsonDict = {"changes_result": False}


class Section(BaseModel):
    """A frozen group of leaves; unknown names, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def clash(field: str, got: object, allowed: str) -> PydanticCustomError:
    """The error of a section whose leaves contradict each other, put down to one of them."""
    message = f"got {got}; allowed: {allowed}"
    return PydanticCustomError("clash", "{message}", {"field": field, "message": message})
