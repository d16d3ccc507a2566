"""Decodes one picture to an upright RGB image or grey values, or says why it cannot be used.

Which programs wrote the file does not matter: the first bytes decide, not the name.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

# Two-picture phone JPEGs are read through "JPEG"; naming "MPO" here breaks every other format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
ACCEPTED = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF"
# A training picture smaller than this is an icon or a tracking pixel.
MIN_SIDE = 16

# What Pillow's decoders raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class BadPicture(Exception):
    """A file that cannot be used as a training picture; its text is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Args:
        image: upright, mode RGB.
        remarks: what the user should know of its decoding.
        alpha: its opacity, upright, mode L; nothing where every pixel is opaque.
    """

    image: Image.Image
    remarks: tuple[str, ...] = ()
    alpha: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright."""
        return self.image.height, self.image.width


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes is of a format that is read."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypavif", b"ftypavis")
    )


def decode(content: bytes) -> Picture:
    """The picture in a file's content: first frame, upright by its EXIF data, 8 bits, on white.

    Raises:
        BadPicture: not a picture, damaged, too large, too small or wholly transparent.
    """
    if not content:
        raise BadPicture("the file is empty (0 bytes)")
    if not is_picture(content[:32]):
        raise BadPicture(_foreign_reason(content))
    with warnings.catch_warnings():
        # Pillow warns of large pictures, odd EXIF data and bytes it does not need.
        warnings.simplefilter("ignore")
        image = _load(content)
        if min(image.size) < MIN_SIDE:
            raise BadPicture(
                f"{image.width}x{image.height} pixels: this looks like an icon, not a photograph"
            )
        several = ("only the first of its frames or pages is used",)
        remarks = several if _has_second_frame(content, image.format) else ()
        upright = _upright(image)
        return Picture(_to_rgb(upright), remarks, _alpha(upright))


def decode_grey(content: bytes) -> npt.NDArray[np.float32]:
    """The brightness (h, w) in [0, 1] of a picture in a file's content, upright by its EXIF data.

    8 and 16 bits keep their precision, colours are converted, transparent pixels are black. It
    may be of any size: what it says of a picture can be coarse.

    Raises:
        BadPicture: not a picture, damaged or too large.
    """
    if not is_picture(content[:32]):
        raise BadPicture(_foreign_reason(content) if content else "the file is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _upright(_load(content))
        if image.mode in _SIXTEEN_BITS:
            values = np.asarray(image).astype(np.float64).clip(0, 65535)
            return np.asarray(values / 65535, np.float32)
        if image.mode == "F":
            _refuse_floats(image)
        try:
            grey = np.asarray(image.convert("RGB").convert("L")).astype(np.float64) / 255
            alpha = _alpha(image)
        except _DECODE_ERRORS as error:
            message = f"its colours ({image.mode}) cannot be converted ({error})"
            raise BadPicture(message) from error
        opacity = 1 if alpha is None else np.asarray(alpha).astype(np.float64) / 255
        return np.asarray(grey * opacity, np.float32)


def _load(content: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
        image.load()
    except Image.DecompressionBombError as error:
        # A flat PNG of any size packs into a few kilobytes: Pillow refuses above 179 megapixels.
        raise BadPicture("it has too many megapixels; scale it down first") from error
    except _DECODE_ERRORS as error:
        raise BadPicture(f"the file is cut off or damaged ({error})") from error
    return image


def _has_second_frame(content: bytes, file_format: str | None) -> bool:
    # A second picture inside a JPEG is a phone's depth map or preview, not an animation.
    if file_format in ("JPEG", "MPO"):
        return False
    try:
        Image.open(BytesIO(content), formats=FORMATS).seek(1)
    except _DECODE_ERRORS:
        return False
    return True


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; unreadable EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        usual = _on_white if image.has_transparency_data else _plain_rgb
        return _CONVERTERS.get(image.mode, usual)(image)
    except _DECODE_ERRORS as error:
        raise BadPicture(f"its colours ({image.mode}) cannot be converted ({error})") from error


def _alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of an image, or nothing where every pixel is opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _plain_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (0, 0):
        raise BadPicture("every pixel is transparent")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values 0 … 65535 as 0 … 255; `convert` would cut them off at 255."""
    values = np.asarray(image).astype(np.float64).clip(0, 65535)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")


def _refuse_floats(image: Image.Image) -> Image.Image:
    raise BadPicture("its pixels are floating-point numbers; save it with 8 or 16 bits")


_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_CONVERTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **dict.fromkeys(_SIXTEEN_BITS, _from_16_bits),
    "F": _refuse_floats,
}


def _foreign_reason(content: bytes) -> str:
    """What a file that is no picture seems to be."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    brand = content[8:12]
    if content[4:8] == b"ftyp":
        if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"):
            return "it is a HEIC photo (iPhone), which is not read; export it as JPEG"
        return "it is a video, not a still picture"
    for signature, reason in _FOREIGN:
        if start.startswith(signature):
            return reason
    return f"it is not a picture that can be read (accepted: {ACCEPTED})"


_FOREIGN = (
    (b"<!doctype html", "it is a web page, probably an error page saved under this name"),
    (b"<html", "it is a web page, probably an error page saved under this name"),
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    (b"<svg", "it is a vector drawing (SVG); export it as PNG"),
    (b"<?xml", "it is a vector drawing (SVG/XML); export it as PNG"),
)
