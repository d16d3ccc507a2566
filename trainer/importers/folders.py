"""What can be seen of the pictures on this machine: how many there are, and what folders say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.folder_names import PICTURE_SUFFIXES, KohyaFolder, kohya_folder
from trainer.rules.ordinary import is_ordinary

_NUMBERED = re.compile(r"\d+_.*")


def is_here(location: str) -> bool:
    """Whether a location is a folder on this machine."""
    try:
        return Path(location).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def count(location: str) -> int | None:
    """The pictures that an epoch shows, with the repeats of kohya's folders.

    None where the folder is not on this machine.
    """
    if not is_here(location):
        return None
    return sum(_repeats(name) for name in _pictures(location))


def has_captions(location: str) -> bool:
    """Whether text files or a table of captions lie among the pictures."""
    if not is_here(location):
        return False
    root = Path(location).expanduser()
    stems = {root / Path(name).with_suffix(".txt") for name in _pictures(location)}
    return any(file.is_file() for file in stems) or (root / "metadata.jsonl").is_file()


def kohya_folders(location: str) -> list[KohyaFolder]:
    """The folders inside a location whose names say repeats and a caption."""
    found = [kohya_folder(f"{name}/picture.png") for name in _inside(location)]
    return [folder for folder in found if folder is not None]


def misread_folders(location: str) -> list[str]:
    """Folders that kohya's programs read repeats from, and this one takes for dates and such."""
    names = _inside(location)
    return [n for n in names if _NUMBERED.fullmatch(n) and kohya_folder(f"{n}/a.png") is None]


def identifier_in(caption: str) -> str | None:
    """The word for the subject in a caption such as `sks dog`: the first of several, if rare."""
    words = caption.replace(",", " ").split()
    return words[0] if len(words) > 1 and not is_ordinary(words[0]) else None


def _inside(location: str) -> list[str]:
    if not is_here(location):
        return []
    return sorted(path.name for path in Path(location).expanduser().iterdir() if path.is_dir())


def _pictures(location: str) -> Iterator[str]:
    root = Path(location).expanduser()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
            yield path.relative_to(root).as_posix()


def _repeats(name: str) -> int:
    folder = kohya_folder(name)
    return 1 if folder is None else folder.repeats
