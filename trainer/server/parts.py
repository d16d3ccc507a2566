"""Files that come in parts: kept apart until the client says which they are.

What is known of parts is in memory: a server that starts has none, as it removes their files.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.server.files import UPLOAD_SECONDS, FileStore, TooLarge
from trainer.server.refusals import Refusal


@dataclass
class _Part:
    number: int
    path: Path
    size: int = 0
    etag: str = ""


@dataclass
class _Upload:
    there: dict[int, _Part] = field(default_factory=dict)
    coming: list[_Part] = field(default_factory=list)
    touched: float = field(default_factory=time.monotonic)

    def size_beside(self, part: _Part) -> int:
        """Bytes of all parts that this one does not replace."""
        known = [*self.there.values(), *self.coming]
        return sum(other.size for other in known if other.number != part.number)


class Parts:
    """The parts of all uploads that are under way, by the ids of their files."""

    def __init__(self) -> None:
        self._uploads: dict[str, _Upload] = {}

    async def put(
        self, id: str, number: int, chunks: AsyncIterator[bytes], files: FileStore, limit: int
    ) -> str:
        """Takes a part; one that comes again replaces its first try.

        Args:
            limit: bytes of all parts together, those that come at the same time among them.

        Returns:
            Its ETag.

        Raises:
            TooLarge: there are more.
            Refusal: the data folder may not have them.
            DiskError: no room.
        """
        upload = self._uploads.setdefault(id, _Upload())
        part, digest = _Part(number, files.temporary()), hashlib.sha256()

        async def counted() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                part.size += len(chunk)
                if part.size + upload.size_beside(part) > limit:
                    raise TooLarge
                digest.update(chunk)
                yield chunk

        upload.coming.append(part)
        try:
            await files.write(part.path, counted(), limit)
        finally:
            upload.coming.remove(part)
            upload.touched = time.monotonic()
        part.etag = digest.hexdigest()
        if self._uploads.get(id) is not upload:
            # It ended or was given up meanwhile.
            files.remove(part.path, part.size)
            return part.etag
        replaced = upload.there.pop(number, None)
        if replaced is not None:
            files.remove(replaced.path, replaced.size)
        upload.there[number] = part
        return part.etag

    def whole(self, id: str, named: Mapping[int, str]) -> list[Path]:
        """The files of all parts, in their order.

        Args:
            named: number to ETag, as the client has them.

        Raises:
            Refusal: one is not there, or another one than the client means.
        """
        there = self._uploads.get(id, _Upload()).there
        for number in sorted(named):
            if number not in there:
                raise Refusal("malformed", f"part {number} is missing")
            if there[number].etag != named[number]:
                raise Refusal("malformed", f"part {number} has another etag")
        return [there[number].path for number in sorted(named)]

    def remove(self, id: str, files: FileStore) -> None:
        """Removes the parts of a file."""
        upload = self._uploads.pop(id, None)
        for part in upload.there.values() if upload else ():
            files.remove(part.path, part.size)

    def sweep(self, files: FileStore) -> None:
        """Removes parts of uploads that were given up: their tokens are not good any more."""
        oldest = time.monotonic() - UPLOAD_SECONDS
        for id, upload in list(self._uploads.items()):
            if upload.touched < oldest and not upload.coming:
                self.remove(id, files)
