"""Turns the colours of a decoded picture into 8-bit sRGB, by its colour profile where it has one.

Files, turning and transparency are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from trainer.images.findings import Remark

# Grey values of more than 8 bits; Pillow reduces coloured ones as it reads them.
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# The mode in which a picture must be for a profile of each colour space.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# The modes whose pictures a profile of each colour space can be of. Many programs put an RGB
# profile into grey pictures: grey is then a colour whose three channels are equal.
_FITTING = {
    "RGB": ("RGB", "P", "YCbCr", "1", "L"),
    "GRAY": ("1", "L"),
    "CMYK": ("CMYK",),
}
# Other makers' sRGB profiles differ from the standard by rounding: up to so many levels of 255 a
# profile changes nothing to see, and is left alone so that pixels stay as they were stored.
_SAME = 2


def to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[Remark, ...]]:
    """The picture in mode RGB, 8 bits, sRGB, and what was done for it.

    Args:
        image: without transparency, its colour profile in `info`.

    Raises:
        ValueError: the mode cannot be converted.
        OSError: see ValueError.
    """
    profile = image.info.get("icc_profile")
    shallow = _CONVERTERS.get(image.mode, _unchanged)(image)
    if not profile:
        return _plain(shallow)
    try:
        return _by_profile(shallow, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        unused = "has a colour profile that cannot be used ({}); its colours may be slightly off"
        plain, remarks = _plain(shallow)
        return plain, (Remark.warning(unused.format(error)), *remarks)


def _plain(image: Image.Image) -> tuple[Image.Image, tuple[Remark, ...]]:
    if image.mode == "RGB":
        return image, ()
    if image.mode != "CMYK":
        return image.convert("RGB"), ()
    plain = "is CMYK, converted without a colour profile; its colours may be off"
    return image.convert("RGB"), (Remark.info(plain),)


def _by_profile(image: Image.Image, content: bytes) -> tuple[Image.Image, tuple[Remark, ...]]:
    """The picture converted by its profile, or plainly where the profile is sRGB itself.

    Raises:
        PyCMSError: the profile is damaged.
        OSError: see PyCMSError.
        ValueError: the profile is of another kind of picture.
    """
    profile = ImageCms.ImageCmsProfile(BytesIO(content))
    space = profile.profile.xcolor_space.strip()
    if image.mode not in _FITTING.get(space, ()):
        raise ValueError(f"it is of {space} pictures, not of {image.mode}")
    # Relative colorimetric with black point compensation, as image editors do it: what sRGB can
    # show stays exactly itself. Perceptual would move it too, each maker's profile in its own way.
    transform = ImageCms.buildTransformFromOpenProfiles(
        profile,
        ImageCms.createProfile("sRGB"),
        _MODES[space],
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    source = image if image.mode == _MODES[space] else image.convert(_MODES[space])
    if space != "CMYK" and _changes_nothing(transform, source.mode):
        return source.convert("RGB"), ()
    converted = ImageCms.applyTransform(source, transform)
    assert converted is not None
    name = _printable(ImageCms.getProfileDescription(profile)) or "its own profile"
    return converted, (Remark.info(f"has its colours converted from `{name}` to sRGB"),)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    probe = _probe(mode)
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    difference = np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB")).astype(int)
    return bool(abs(difference).max() <= _SAME)


def _probe(mode: str) -> Image.Image:
    """Colours from all over a mode, as a picture: every grey, or 17 levels of each channel."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.rint(np.linspace(0, 255, 17)).astype(np.uint8)
    red, green, blue = np.meshgrid(levels, levels, levels)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).reshape(17, -1, 3))


def _printable(name: str) -> str:
    return "".join(letter for letter in name if letter.isprintable()).strip()[:60]


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values 0 … 65535 as 0 … 255; `convert` would cut them off at 255."""
    values = np.asarray(image).astype(np.float64).clip(0, 65535)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _refuse_floats(image: Image.Image) -> Image.Image:
    raise ValueError("its pixels are floating-point numbers, save it with 8 or 16 bits")


def _unchanged(image: Image.Image) -> Image.Image:
    return image


_CONVERTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **dict.fromkeys(SIXTEEN_BITS, _from_16_bits),
    "F": _refuse_floats,
}
