"""Files read before they are asked for: the system keeps what was read of them in memory.

Loaders map weights into memory, whose bytes come from the disk when they are first touched. Read
ahead, they come while something else is done. Nothing is kept here, and no result depends on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_CHUNK = 16 * 2**20


@contextmanager
def read_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Reads files, one after the other, while this lasts; one that cannot be read is left out."""
    enough = threading.Event()
    thread = threading.Thread(target=_read, args=(files, enough), name="read ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def _read(files: Sequence[Path], enough: threading.Event) -> None:
    room = bytearray(_CHUNK)
    for path in files:
        # Whoever needs the file will say what is wrong with it.
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while not enough.is_set() and file.readinto(room):
                pass
