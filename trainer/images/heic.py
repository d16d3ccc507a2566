"""Reads HEIC photographs in a process of its own, through the optional library pi_heif.

A damaged file can crash that library (with pi_heif 1.4.0 one wrong byte in the list of a file's
items does) and with it the whole process: here only the one that reads the file. That process
runs this module as a script, so nothing else of the project is imported here.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

# Seconds; a photograph of 48 megapixels takes a few.
_TIMEOUT = 120
_REFUSED, _TOO_LARGE, _NO_READER = 3, 4, 5


@dataclass(frozen=True)
class Heic:
    """The primary picture of a HEIC file.

    Args:
        image: upright, 8 bits, its colour profile in `info`.
        is_deep: whether the file has more than 8 bits a channel.
        num_pictures: in the file.
    """

    image: Image.Image
    is_deep: bool
    num_pictures: int


def is_installed() -> bool:
    """Whether HEIC files can be read on this machine."""
    return importlib.util.find_spec("pi_heif") is not None


def read_heic(content: bytes, max_pixels: int) -> Heic:
    """The primary picture in the content of a HEIC file.

    Raises:
        ImportError: the library is there but does not work.
        OSError: the file is cut off or damaged.
        DecompressionBombError: the picture has more than `max_pixels`.
    """
    # -P: the script's own folder is no place to import from.
    command = [sys.executable, "-P", __file__, str(max_pixels)]
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"reading it took more than {_TIMEOUT} seconds") from error
    if done.returncode == _TOO_LARGE:
        raise Image.DecompressionBombError
    said = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode == _NO_READER:
        raise ImportError(said)
    if done.returncode == _REFUSED:
        raise OSError(said)
    if done.returncode != 0:
        raise OSError("it makes its reader crash")
    header, _, rest = done.stdout.partition(b"\n")
    facts = json.loads(header)
    pixels = rest[facts["profile_bytes"] :]
    image = Image.frombytes(facts["mode"], tuple(facts["size"]), pixels)
    if facts["profile_bytes"]:
        image.info["icc_profile"] = rest[: facts["profile_bytes"]]
    return Heic(image, facts["is_deep"], facts["num_pictures"])


def _main() -> None:
    """Reads a file from stdin; writes a line of facts, the colour profile and the pixels."""
    try:
        import pi_heif  # noqa: PLC0415  (optional)
    # Of libraries that it needs and that do not fit, too.
    except (ImportError, OSError) as error:
        sys.stderr.write(str(error))
        sys.exit(_NO_READER)
    try:
        file = pi_heif.open_heif(BytesIO(sys.stdin.buffer.read()))
        width, height = file.size
        if width * height > int(sys.argv[1]):
            sys.exit(_TOO_LARGE)
        # Turned by the file's own boxes. The orientation in its EXIF data repeats what they say,
        # or does not count (ISO/IEC 23008-12, 6.5.10).
        image = file.to_pillow()
    except (OSError, EOFError, SyntaxError, ValueError, LookupError, RuntimeError) as error:
        sys.stderr.write(str(error))
        sys.exit(_REFUSED)
    profile = image.info.get("icc_profile") or b""
    facts = {
        "mode": image.mode,
        "size": image.size,
        "profile_bytes": len(profile),
        "is_deep": image.info["bit_depth"] > 8,
        "num_pictures": len(file),
    }
    sys.stdout.buffer.write(json.dumps(facts).encode() + b"\n" + profile + image.tobytes())


if __name__ == "__main__":
    _main()
