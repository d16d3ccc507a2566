"""Decodes one picture to an upright RGB image or grey values, or says why it cannot be used.

Which programs wrote the file does not matter: the first bytes decide, not the name.
"""

from __future__ import annotations

import re
import struct
import threading
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from trainer.images.colours import SIXTEEN_BITS, to_srgb
from trainer.images.crop import Size
from trainer.images.findings import Remark, first_line
from trainer.images.heic import is_installed, read_heic

# Two-picture phone JPEGs are read through "JPEG"; naming "MPO" here breaks every other format.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
ACCEPTED = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC"
# A training picture smaller than this is an icon or a tracking pixel.
MIN_SIDE = 16
# A flat PNG of any size packs into a few kilobytes. Pillow refuses above the same number.
MAX_PIXELS = 178_956_970

# Pillow warns of large pictures, odd EXIF data and bytes that it does not need.
_WARNINGS = (Image.DecompressionBombWarning, UserWarning)
_PILLOW = r"PIL\."
_FILTERS_LOCK = threading.Lock()

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIC": (".heic", ".heif"),
}
_FORMAT_OF = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}

# What the file type box of an ISO media file says that it holds.
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"))

# Enough of a file to know its format by.
_HEAD = 64

# EXIF orientation (tag 274) and what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

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

_VIDEO = "it is a video, not a still picture"
_FOREIGN = (
    (b"<!doctype html", "it is a web page, probably an error page saved under this name"),
    (b"<html", "it is a web page, probably an error page saved under this name"),
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    (b"<svg", "it is a vector drawing (SVG); export it as PNG"),
    (b"<?xml", "it is a vector drawing (SVG/XML); export it as PNG"),
    (b"%pdf", "it is a PDF document; export its pictures as PNG"),
    (b"8bps", "it is a Photoshop document; export it as PNG"),
    (b"\0\0\0\x0cjxl ", "it is a JPEG XL picture; export it as PNG"),
    (b"\0\0\0\x0cjp  ", "it is a JPEG 2000 picture; export it as PNG"),
    (b"\x1ae\xdf\xa3", _VIDEO),
)


class BadPicture(Exception):
    """A file that cannot be used as a training picture; its text is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Args:
        image: upright, mode RGB, sRGB.
        remarks: what the user should know of its decoding.
        alpha: its opacity, upright, mode L; nothing where every pixel is opaque.
    """

    image: Image.Image
    remarks: tuple[Remark, ...] = ()
    alpha: Image.Image | None = None

    @property
    def size(self) -> Size:
        """(height, width) in pixels, upright."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class _Loaded:
    """A picture as a file has it, its pixels read.

    Args:
        image: upright, in any mode.
        kind: its format, as in `_SUFFIXES`.
        orientation: by which it was turned.
        is_deep: whether the file has more than 8 bits a channel.
        num_frames: pictures or pages that the file holds.
    """

    image: Image.Image
    kind: str
    orientation: int = 1
    is_deep: bool = False
    num_frames: int = 1


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes is of a format that is read."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or bool(_brands(head) & (_AVIF_BRANDS | _HEIC_BRANDS))
    )


def decode(content: bytes, name: str = "") -> Picture:
    """The picture in a file's content: first frame, upright by its EXIF data, sRGB, on white.

    Args:
        name: of the file; says only which format the user takes it for.

    Raises:
        BadPicture: not a picture, damaged, too large, too small or wholly transparent.
    """
    _silence_pillow()
    loaded = _load(content)
    height, width = loaded.image.height, loaded.image.width
    if min(height, width) < MIN_SIDE:
        raise BadPicture(f"{width}x{height} pixels: this looks like an icon or a tracking pixel")
    try:
        opaque, alpha = _parted(loaded.image)
        image, colour_remarks = to_srgb(opaque)
    except _DECODE_ERRORS as error:
        message = f"its colours ({loaded.image.mode}) cannot be converted ({error})"
        raise BadPicture(message) from error
    if alpha is not None and alpha.getextrema() == (0, 0):
        raise BadPicture("every pixel is transparent")
    remarks = [*_remarks_on_the_file(loaded, name), *colour_remarks]
    if alpha is not None:
        image = _on_white(image, alpha)
        remarks.append(Remark.info("has transparent areas, which are filled with white"))
    return Picture(image, tuple(remarks), alpha)


def decode_grey(content: bytes) -> npt.NDArray[np.float32]:
    """The brightness (h, w) in [0, 1] of a picture in a file's content, upright by its EXIF data.

    8 and 16 bits keep their precision, colours are converted, transparent pixels are black. It
    may be of any size: what it says of a picture can be coarse.

    Raises:
        BadPicture: not a picture, damaged or too large.
    """
    _silence_pillow()
    image = _load(content).image
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        return np.asarray(values / 65535, np.float32)
    try:
        # Weights are numbers, not colours: a profile would bend them.
        image.info.pop("icc_profile", None)
        opaque, alpha = _parted(image)
        grey = np.asarray(to_srgb(opaque)[0].convert("L")).astype(np.float64) / 255
    except _DECODE_ERRORS as error:
        message = f"its colours ({image.mode}) cannot be converted ({error})"
        raise BadPicture(message) from error
    opacity = 1 if alpha is None else np.asarray(alpha).astype(np.float64) / 255
    return np.asarray(grey * opacity, np.float32)


def _silence_pillow() -> None:
    """Makes the process ignore what Pillow warns of; for good.

    To put the filters back afterwards, as `warnings.catch_warnings` does, is not for work in
    threads: one that ends puts back what another is still using.
    """
    with _FILTERS_LOCK:
        for category in _WARNINGS:
            known = ("ignore", None, category, re.compile(_PILLOW), 0)
            if known not in warnings.filters:
                warnings.filterwarnings("ignore", category=category, module=_PILLOW)


# Before anybody remembers the filters of the process to put them back.
_silence_pillow()


def _load(content: bytes) -> _Loaded:
    """The pixels of a file, upright.

    Raises:
        BadPicture: not a picture, damaged or too large.
    """
    if not content:
        raise BadPicture("the file is empty (0 bytes)")
    if not is_picture(content[:_HEAD]):
        raise BadPicture(_foreign_reason(content))
    brands = _brands(content[:_HEAD])
    try:
        if brands & _HEIC_BRANDS and not brands & _AVIF_BRANDS:
            return _load_heic(content)
        return _load_by_pillow(content)
    except Image.DecompressionBombError as error:
        message = f"it has more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first"
        raise BadPicture(message) from error
    except UnidentifiedImageError as error:
        # Pillow's own words name a place in memory.
        message = "the file is cut off or damaged (its beginning is not that of a picture)"
        raise BadPicture(f"{message}; copy it again") from error
    except _DECODE_ERRORS as error:
        message = f"the file is cut off or damaged ({error}); copy it again"
        raise BadPicture(message) from error


def _load_by_pillow(content: bytes) -> _Loaded:
    image = Image.open(BytesIO(content), formats=FORMATS)
    # A phone's JPEG of two pictures: the second is a depth map or preview, not a frame.
    kind = "JPEG" if isinstance(image, JpegImagePlugin.JpegImageFile) else str(image.format)
    orientation = _orientation(image)
    image.load()
    # TIFF pictures are turned while they are read, and no longer have an orientation.
    upright = _turned(image, orientation) if _orientation(image) == orientation else image
    num_frames = 1 if kind in ("JPEG", "BMP") else _num_frames(content)
    return _Loaded(upright, kind, orientation, _is_deep(image, content), num_frames)


def _load_heic(content: bytes) -> _Loaded:
    """The primary picture of a HEIC file.

    Raises:
        BadPicture: HEIC files cannot be read on this machine.
    """
    if not is_installed():
        raise BadPicture(
            "it is a HEIC photo (iPhone), and no reader for it is installed; run "
            "`pip install 'tok-trainer[heic]'`, or export it as JPEG"
        )
    try:
        heic = read_heic(content, MAX_PIXELS)
    except ImportError as error:
        raise BadPicture(
            f"it is a HEIC photo (iPhone), and its reader pi_heif cannot be imported "
            f"({first_line(error)}); install it anew, or export the photo as JPEG"
        ) from error
    return _Loaded(heic.image, "HEIC", is_deep=heic.is_deep, num_frames=heic.num_pictures)


def _is_deep(image: Image.Image, content: bytes) -> bool:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
        return int(np.max(bits)) > 8
    # The header of a PNG has its depth at byte 24.
    return content.startswith(b"\x89PNG") and content[24] > 8


def _num_frames(content: bytes) -> int:
    """How many frames or pages a picture has, as far as they can be counted."""
    image = Image.open(BytesIO(content), formats=FORMATS)
    try:
        # Formats that never have frames lack the attribute.
        return int(getattr(image, "n_frames", 1))
    except _DECODE_ERRORS:
        return 1


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data; unreadable data says upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1
    return orientation if orientation in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _parted(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of an image without its opacity, and the opacity where a pixel is not opaque."""
    if not image.has_transparency_data or image.mode in SIXTEEN_BITS:
        return image, None
    if image.mode == "LA":
        colours, alpha = image.split()
    else:
        rgba = image.convert("RGBA")
        colours, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    if "icc_profile" in image.info:
        colours.info["icc_profile"] = image.info["icc_profile"]
    return colours, alpha if alpha.getextrema() != (255, 255) else None


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _remarks_on_the_file(loaded: _Loaded, name: str) -> list[Remark]:
    remarks = []
    suffix = PurePosixPath(name).suffix.lower()
    if _FORMAT_OF.get(suffix, loaded.kind) != loaded.kind:
        remarks.append(Remark.info(f"is named {suffix} but holds {loaded.kind}, and is read so"))
    if loaded.orientation != 1:
        height, width = loaded.image.height, loaded.image.width
        sizes = f": {height}x{width} becomes {width}x{height}"
        remarks.append(
            Remark.info(
                f"is turned upright (EXIF orientation {loaded.orientation})"
                + (sizes if loaded.orientation in _SIDEWAYS else "")
            )
        )
    if loaded.is_deep:
        remarks.append(Remark.info("has more than 8 bits a channel and is scaled to 8"))
    if loaded.num_frames > 1:
        used = "primary one" if loaded.kind == "HEIC" else "first"
        remarks.append(
            Remark.warning(f"has {loaded.num_frames} frames or pages; only the {used} is used")
        )
    return remarks


def _brands(head: bytes) -> frozenset[bytes]:
    """The brands that the file type box of an ISO media file names; none for other files."""
    if head[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    # The major brand, a version, the compatible brands.
    return frozenset(head[place : place + 4] for place in (8, *range(16, end, 4)))


def _foreign_reason(content: bytes) -> str:
    """What a file that is no picture seems to be."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if content[4:8] == b"ftyp" or content[8:12] == b"AVI ":
        return _VIDEO
    for signature, reason in _FOREIGN:
        if start.startswith(signature):
            return reason
    return f"it is not a picture that can be read (accepted: {ACCEPTED})"
