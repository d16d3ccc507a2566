"""The languages of hosted training services, one module each, found by name.

A dialect is the whole of one remote contract: the fields of its requests with their machine
defaults, their places in the configuration, and the shape of its results.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from pydantic import BaseModel

from trainer.config import Note, TrainingConfig
from trainer.errors import InputError
from trainer.job import Result, ResultFile
from trainer.leaves import nearest
from trainer.resolve import Layer


class Dialect(Protocol):
    """What a dialect's module offers."""

    NAMES: tuple[str, ...]
    Input: type[BaseModel]
    Output: type[BaseModel]

    def to_layers(self, payload: Mapping[str, Any]) -> list[Layer]:
        """The service's defaults and the request's own fields, as layers for `resolve`."""

    def to_output(self, result: Result, url_for: Callable[[ResultFile], str]) -> BaseModel:
        """The service's answer for a finished run."""

    def to_request(self, config: TrainingConfig) -> dict[str, Any]:
        """The request that asks the service for this configuration."""


def dialect_names() -> dict[str, str]:
    """Every name a dialect answers to, with its module's name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: module for module in modules for name in _import(module).NAMES}


def load_dialect(name: str) -> Dialect:
    """The dialect with this name.

    Raises:
        InputError: there is none.
    """
    known = dialect_names()
    if name not in known:
        message = f"got `{name}`; allowed: one of {', '.join(known)}"
        raise InputError.of("dialect", message, nearest(name, known))
    return _import(known[name])


def left_aside(
    payload: Mapping[str, Any], model: type[BaseModel], not_used: Mapping[str, str], service: str
) -> list[Note]:
    """Notes on the fields of a request that are not taken, as services leave aside what they lack.

    With a warning where one is nearly a field that the service knows.

    Args:
        model: the service's request.
        not_used: field to the reason why it is not taken.
        service: its name.
    """
    fields = model.model_fields
    reasons = {name: f"{service} has no such field" for name in payload if name not in fields}
    reasons |= {name: why for name, why in not_used.items() if name in payload}
    notes = [
        Note(kind="ignored", field=f"request.{name}", message=reason)
        for name, reason in reasons.items()
    ]
    return notes + [
        Note(kind="warning", field=f"request.{name}", message=f"was left aside; {hint}")
        for name in payload
        if name not in fields and (hint := nearest(name, fields))
    ]


def _import(module: str) -> Dialect:
    return cast(Dialect, import_module(f"{__name__}.{module}"))
