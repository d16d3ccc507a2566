"""Colours of any kind to sRGB, by the picture's own profile."""

from __future__ import annotations

import numpy as np
import pytest
from grid import encoded, grid_image
from PIL import Image, ImageCms
from profiles import (
    P3_TO_SRGB,
    cmyk_profile,
    curved,
    display_p3,
    grey_profile,
    linear,
    told,
)

from trainer.images.pictures import decode


def patches() -> Image.Image:
    """27 colours, 20 pixels large each, well inside what both spaces show."""
    levels = (80, 130, 180)
    colours = np.array([(r, g, b) for r in levels for g in levels for b in levels], np.uint8)
    return Image.fromarray(colours.repeat(20, axis=0)[None].repeat(20, axis=0))


def test_display_p3_becomes_srgb_by_the_matrices_of_css() -> None:
    """Row 63 of the bad inputs: a photograph of a phone."""
    stored = patches()

    picture = decode(encoded(stored, icc_profile=display_p3()))

    expected = curved(linear(np.asarray(stored) / 255) @ P3_TO_SRGB.T) * 255
    assert abs(np.asarray(picture.image) - expected).max() <= 1.5
    assert told(picture) == [("info", "has its colours converted from `Display P3` to sRGB")]


def test_an_srgb_profile_leaves_every_pixel_as_it_is() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored = grid_image(64, 64, blue=77)

    picture = decode(encoded(stored, icc_profile=profile))

    np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(stored))
    assert picture.remarks == ()


def test_transparency_is_not_touched_by_a_profile() -> None:
    opacity = Image.linear_gradient("L").resize((540, 20))
    stored = patches()
    stored.putalpha(opacity)

    picture = decode(encoded(stored, icc_profile=display_p3()))

    assert picture.alpha is not None
    np.testing.assert_array_equal(np.asarray(picture.alpha), np.asarray(opacity))
    opaque = np.asarray(decode(encoded(patches(), icc_profile=display_p3())).image).astype(float)
    share = np.asarray(opacity)[..., None] / 255
    expected = opaque * share + 255 * (1 - share)
    assert abs(np.asarray(picture.image) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_converted_by_its_profile(mode: str) -> None:
    """128 at gamma 1 is half of the light, which sRGB writes as 188."""
    grey = Image.new("L", (32, 32), 128)
    stored = Image.fromarray(np.full((32, 32), 128 * 257, np.uint16))
    content = encoded(
        stored if mode == "I;16" else grey.convert(mode), icc_profile=grey_profile(1.0)
    )

    picture = decode(content)

    assert picture.image.getpixel((5, 5)) == pytest.approx((188, 188, 188), abs=1)
    assert ("info", "has its colours converted from `Grey` to sRGB") in told(picture)


def test_grey_with_a_profile_of_colours_stays_grey() -> None:
    """Many programs do so; the curve of Display P3 is that of sRGB."""
    picture = decode(encoded(Image.new("L", (32, 32), 90), icc_profile=display_p3()))

    assert picture.image.getpixel((5, 5)) == pytest.approx((90, 90, 90), abs=1)


def test_a_palette_is_converted_by_its_profile() -> None:
    stored = patches()

    picture = decode(encoded(stored.quantize(64), icc_profile=display_p3()))

    expected = np.asarray(decode(encoded(stored, icc_profile=display_p3())).image).astype(int)
    assert abs(np.asarray(picture.image) - expected).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile(kind: str) -> None:
    """Lightness 50 is grey 119; the plain formula would make it 127, and cyan blue-green."""
    stored = Image.new("CMYK", (32, 32), (200, 0, 0, 128))

    picture = decode(encoded(stored, kind, icc_profile=cmyk_profile()))

    assert picture.image.getpixel((5, 5)) == pytest.approx((119, 119, 119), abs=2)
    assert told(picture) == [("info", "has its colours converted from `Ink` to sRGB")]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_without_a_profile_is_converted_by_the_plain_formula_and_said(kind: str) -> None:
    """Row 30."""
    picture = decode(encoded(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), kind))

    assert picture.image.getpixel((5, 5)) == pytest.approx((0, 255, 255), abs=3)
    assert told(picture) == [
        ("info", "is CMYK, converted without a colour profile; its colours may be off")
    ]


@pytest.mark.parametrize("profile", [b"no profile", display_p3()[:200], cmyk_profile()])
def test_a_profile_that_cannot_be_used_changes_nothing_and_is_said(profile: bytes) -> None:
    """Row 64: damaged, cut off, of another kind of picture."""
    stored = grid_image(32, 32)

    picture = decode(encoded(stored, icc_profile=profile))

    np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(stored))
    ((kind, text),) = told(picture)
    assert kind == "warning"
    assert text.startswith("has a colour profile that cannot be used (")


def test_any_damage_to_a_profile_gives_a_picture() -> None:
    rng = np.random.default_rng(3)
    for profile in (display_p3(), grey_profile(2.2), cmyk_profile()):
        for _ in range(30):
            damaged = bytearray(profile)
            for place in rng.integers(0, 400, 4):
                damaged[place] = rng.integers(0, 256)
            content = encoded(grid_image(20, 20), icc_profile=bytes(damaged))

            assert decode(content).image.mode == "RGB"
