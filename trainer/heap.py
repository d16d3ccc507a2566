"""What a processor's steps give back stays with the process: the next step needs as much again.

The C library returns large pieces to the system, which hands them out page by page, each cleared
first: 3 to 8 % of a step. Of glibc alone; elsewhere, and on a GPU, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Pieces of up to this size come from the heap, and larger ones from the system: where glibc's own
# adjustment ends, which any setting ends.
_FROM_HEAP = 32 * 2**20
# How much may be free at the end of the heap before it is given back: all; as that adjustment has.
_ALL, _ADJUSTED = -1, 2 * _FROM_HEAP

# A user's own settings; they stay.
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Inside, what is freed is kept; at the end it is given back to the system.

    Afterwards little of what is freed is kept, as glibc does it by itself once large pieces were
    asked for.

    Args:
        wanted: false changes nothing.
    """
    library = _library() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)
    library.mallopt(_M_TRIM_THRESHOLD, _ALL)
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, _ADJUSTED)
        library.malloc_trim(0)


def _library() -> Any:
    """The C library, where it is one that can be asked and that the user has not set."""
    if any(name in os.environ for name in _GIVEN):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
