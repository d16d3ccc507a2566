"""What requests carry, judged by the model of what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from trainer.contracts import faults_in, without_nulls
from trainer.errors import InputError
from trainer.server.refusals import Refusal

Asked = TypeVar("Asked", bound=BaseModel)


def checked(payload: Mapping[str, Any], model: type[Asked], service: str) -> Asked:
    """What a request asks for; a field that is null is not given.

    Args:
        model: without validators of the whole.
        service: its name, for messages.

    Raises:
        Refusal: with every field that the service would not take.
    """
    given = without_nulls(payload)
    problems = [fault.problem(service) for fault in faults_in(given, model, {})]
    if problems:
        raise refused_input(InputError(problems))
    return model.model_validate(given)


def refused_input(error: InputError) -> Refusal:
    """A refusal for what is wrong with an input."""
    return Refusal("invalid", error.message, problems=error.problems)
