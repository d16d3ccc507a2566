"""Python's search for cyclic garbage, kept away from where there is none to be found."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search among millions of small objects of which none becomes garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """For the import of large libraries, a fifth of whose time the search takes.

    What they make lives to the end: no later search goes through it either.
    """
    with uncollected():
        yield
        gc.freeze()
