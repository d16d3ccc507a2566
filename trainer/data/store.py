"""What was found out about pictures, kept for the next training: a store by content.

An entry's key is a digest of all that it was made of, so an entry is never out of date. It lies
in the user's cache folder; whatever is missing or damaged is made again. What entries mean is not
known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Part of every key: raised when the same ingredients give something else.
VERSION = 1
# Prepared pictures take about 2 MB each.
MAX_BYTES = 8 * 2**30

_DIGEST_BYTES = 32
# An entry under this name is being written, or its writer was killed: none takes so long.
_UNFINISHED = "unfinished-"
_LONGEST_SECONDS = 3600
# The folder is looked through each time that so much of its limit was put.
_SHARE_BETWEEN_LOOKS = 1 / 16


def key_of(kind: str, ingredients: Mapping[str, Any]) -> str:
    """The key of what is made of these ingredients.

    Args:
        kind: what is made.
        ingredients: as JSON can hold them.
    """
    made_of = {"kind": kind, "version": VERSION, **ingredients}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


class Store:
    """Entries of bytes by key, in one folder that several trainings may use at once.

    Args:
        root: made when the first entry is put.
        limit: bytes that all entries take at most, or little more while they are put.
    """

    def __init__(self, root: Path, limit: int = MAX_BYTES) -> None:
        self._root = root
        self._limit = limit
        self._put_since_look = 0

    def get(self, key: str) -> bytes | None:
        """The entry, or nothing where there is none or it is damaged."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        # Entries of a folder that can only be read are as good.
        with suppress(OSError):
            os.utime(path)
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def put(self, key: str, content: bytes) -> None:
        """Keeps an entry; a folder that cannot be written keeps nothing, and work is done again."""
        path = self._path(key)
        unfinished = self._root / f"{_UNFINISHED}{secrets.token_hex(8)}"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # No sync: a torn entry is known by its digest.
                unfinished.write_bytes(hashlib.sha256(content).digest() + content)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        self._put_since_look += len(content)
        if self._put_since_look > _SHARE_BETWEEN_LOOKS * self._limit:
            self.prune()

    def prune(self) -> None:
        """Removes the entries longest unused until the rest is within the limit.

        Also what killed processes left half written.
        """
        self._put_since_look = 0
        self._remove_unfinished()
        entries = []
        # Whoever empties the folder at the same time does the same work.
        with suppress(OSError):
            for path in self._root.glob("*/*"):
                with suppress(OSError):
                    state = path.stat()
                    entries.append((state.st_mtime_ns, path, state.st_size))
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self._limit:
                return
            with suppress(OSError):
                path.unlink()
                total -= size

    def _remove_unfinished(self) -> None:
        begun_before = time.time() - _LONGEST_SECONDS
        with suppress(OSError):
            for path in self._root.glob(f"{_UNFINISHED}*"):
                with suppress(OSError):
                    if path.stat().st_mtime < begun_before:
                        path.unlink()

    def _path(self, key: str) -> Path:
        return self._root / key[:2] / key[2:]
