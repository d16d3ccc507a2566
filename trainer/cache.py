"""The user's cache folder of this program: what it holds can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Below `XDG_CACHE_HOME`, or `.cache` of the user's home; need not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(cache)) / "tok-trainer"
