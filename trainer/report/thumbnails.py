"""Pictures small enough to be carried by the page itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

# Longest side in pixels and quality of JPEG, from the finest on.
_FORMS = ((320, 84), (240, 80), (176, 74), (128, 66), (96, 55))
# Bytes that the pictures of one table take at most.
_MOST = 1_800_000
_THREADS = 4


def thumbnails(paths: Iterable[Path]) -> Mapping[Path, str]:
    """Small forms of pictures as addresses that hold them, as fine as all of them may be.

    A file that is no picture is left out.
    """
    wanted = list(dict.fromkeys(paths))
    made: dict[Path, str] = {}
    for side, quality in _FORMS[_first_form(len(wanted)) :]:
        make = partial(embedded, room=(side, side), quality=quality)
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip(wanted, pool.map(make, wanted), strict=True))
        made = {path: address for path, address in found.items() if address is not None}
        if sum(map(len, made.values())) <= _MOST:
            break
    return made


def _first_form(count: int) -> int:
    """The finest form that is worth a try: pictures are decoded anew for each."""
    return 0 if count <= 60 else 1 if count <= 120 else 2


def embedded(path: Path, *, room: tuple[int, int], quality: int) -> str | None:
    """A picture as an address that holds it; nothing where it cannot be read.

    Args:
        room: width and height that it is fitted into, in pixels.
        quality: of JPEG.
    """
    content = BytesIO()
    try:
        with Image.open(path) as image:
            image.draft("RGB", room)
            image.thumbnail(room, Image.Resampling.BICUBIC, reducing_gap=2.0)
            image.convert("RGB").save(content, "JPEG", quality=quality, optimize=True)
    # Damaged PNGs are told as errors of syntax.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def picture(address: str, words: str) -> str:
    """A picture on the page.

    Args:
        address: that holds it.
        words: what it shows, for those who do not see it.
    """
    return f'<img src="{address}" alt="{escape(words)}">'
