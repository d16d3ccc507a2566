"""What a processor's steps give back stays with the process: the next step needs as much again.

The C library returns large pieces to the system, which hands them out page by page, each cleared
first: up to a tenth of a step. Of glibc alone; elsewhere, and on a GPU, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Pieces up to this come from the heap, the most that glibc's own adjustment comes to; and the free
# end of a heap that is given back beyond that adjustment, and with it.
_FROM_HEAP = 32 * 2**20
_NEVER, _ADJUSTED = 2**31 - 1, 2 * _FROM_HEAP

# A user's own settings; they stay.
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Inside, what is freed is kept; at the end it is given back to the system.

    Args:
        wanted: false changes nothing.
    """
    library = _library() if wanted else None
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
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
