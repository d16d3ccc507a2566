"""Model families: one module each, found by its name; nothing else learns that name."""

from __future__ import annotations

import importlib
import pkgutil

from trainer.families.base import Family


def family_names() -> tuple[str, ...]:
    """The names of all families, which are the names of their modules."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load_family(name: str) -> type[Family]:
    """The family of this name: the `FAMILY` of its module."""
    family: type[Family] = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
