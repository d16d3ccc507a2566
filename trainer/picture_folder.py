"""A folder of pictures with an index of them, replaced whole: the earlier ones or the new.

New pictures are made in a hidden folder inside and take their places when all are there; what
the index does not name is somebody else's and stays. Knows nothing of what they show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.durable import (
    discard,
    disk_errors,
    fresh_folder,
    remove_folder,
    sync_folder,
    write_text,
)
from trainer.errors import InputError

GRID = "grid.png"
_EARLIER = "earlier.json"


@dataclass(frozen=True)
class PictureFolder:
    """Where pictures, their `grid.png` and their index lie.

    Args:
        root: the folder.
        index_name: of the index, a JSON object whose `pictures` have a `path` each.
    """

    root: Path
    index_name: str

    @property
    def index(self) -> Path:
        """What the pictures are; written last."""
        return self.root / self.index_name

    @property
    def _making(self) -> Path:
        return self.root / f".tmp-{self.index_name}"

    def refuse_strangers(self, names: Iterable[str]) -> None:
        """Refuses to write over files that the index does not name.

        Args:
            names: of the pictures to be written.

        Raises:
            InputError: there is such a file, or the folder is that of a training.
        """
        hint = "give another folder"
        if (self.root / "config.yaml").exists() or (self.root / "checkpoints").exists():
            raise InputError.of("--output", f"`{self.root}` is the folder of a training", hint)
        if self.root.exists() and not self.root.is_dir():
            raise InputError.of("--output", f"`{self.root}` is no folder", hint)
        known = {*_files_of(self.index), *_files_of(self._making / self.index_name)}
        known |= {self.index_name} if known else set()
        ours = (GRID, self.index_name)
        there = [n for n in (*ours, *names) if n not in known and (self.root / n).exists()]
        if there:
            message = f"`{self.root / there[0]}` is not from an earlier call and would be lost"
            raise InputError.of("--output", message, hint)

    @contextmanager
    def making(self) -> Iterator[Path]:
        """An empty folder to make pictures in; what is left of it at the end is removed.

        Raises:
            DiskError: it cannot be made.
        """
        self._go_on()
        with disk_errors(self.root):
            folder = fresh_folder(self._making)
        try:
            yield folder
        finally:
            # One that holds an index is whole, and the next call goes on with it.
            if not (folder / self.index_name).exists():
                discard(folder)

    def publish(self, index: Mapping[str, Any]) -> None:
        """Puts what was made in the place of what an earlier call left.

        Args:
            index: what the pictures are.

        Raises:
            DiskError: the folder cannot be written.
        """
        text = json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(self._making / self.index_name, text)
        self._go_on()

    def _go_on(self) -> None:
        """Goes on with a replacement wherever it was cut off; nothing where none was begun."""
        folder, earlier = self._making, self._making / _EARLIER
        if not (folder / self.index_name).exists():
            return
        with disk_errors(self.root):
            if self.index.exists():
                os.replace(self.index, earlier)
                sync_folder(self.root)
            if earlier.exists():
                for name in _files_of(earlier):
                    (self.root / name).unlink(missing_ok=True)
                earlier.unlink()
            for path in sorted(folder.iterdir()):
                if path.name != self.index_name:
                    os.replace(path, self.root / path.name)
            sync_folder(self.root)
            os.replace(folder / self.index_name, self.index)
            sync_folder(self.root)
            remove_folder(folder)


def _files_of(index: Path) -> set[str]:
    """The files that an index names, itself aside; names that lead elsewhere are none."""
    try:
        content = json.loads(index.read_bytes())
        names = {GRID, *(picture["path"] for picture in content["pictures"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str) and _is_plain(name)}


def _is_plain(name: str) -> bool:
    return name not in ("", "..") and Path(name).name == name
