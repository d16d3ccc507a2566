"""What the names of files and folders say: which are pictures, and kohya's repeats and captions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

# How names of pictures end, in small letters.
PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"))
PICTURE_SUFFIXES |= {".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}

# Larger numbers before a folder's name are years and dates rather than repeats.
MOST_REPEATS = 500

# Cameras name their folders so: 100_PANA (Design rule for Camera File system, DCF).
_CAMERA_FOLDER = re.compile(r"[1-9]\d\d_[A-Z0-9_]{4}")
_KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,2})_(.*[^\W\d_].*)")


@dataclass(frozen=True)
class KohyaFolder:
    """What the name of a folder says in kohya's trainers: `10_sks dog`.

    Args:
        name: of the folder alone.
        repeats: times that an epoch shows each of its pictures.
        caption: of its pictures without one of their own.
    """

    name: str
    repeats: int
    caption: str


def kohya_folder(picture: str) -> KohyaFolder | None:
    """What the name of the folder says that a picture lies in, if it is one of kohya's.

    Dates, numbered folders (`01_front`) and cameras' folders are none.
    """
    folder = PurePosixPath(picture).parent.name
    match = _KOHYA_FOLDER.fullmatch(folder)
    if match is None or _CAMERA_FOLDER.fullmatch(folder) or int(match[1]) > MOST_REPEATS:
        return None
    return KohyaFolder(folder, int(match[1]), match[2].strip())
