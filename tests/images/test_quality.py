"""Measures of one picture, and what is said of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from grid import grid_image
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from skimage import data

from trainer.images.crop import Size
from trainer.images.quality import Measures, measure, remarks_on_quality

PHOTOGRAPHS = ("astronaut", "coffee", "cat", "rocket")


def photograph(name: str = "astronaut") -> Image.Image:
    return Image.fromarray(getattr(data, name)())


def distance(first: str, second: str) -> float:
    """The share of bits in which two fingerprints differ: 0 for the same, about 0.5 for any two."""
    return (int(first, 16) ^ int(second, 16)).bit_count() / (4 * len(first))


def told(
    image: Image.Image, size: Size | None = None, target: Size | None = None
) -> list[tuple[str, str]]:
    found = remarks_on_quality(measure(image), size or (image.height, image.width), target)
    return [(remark.kind, remark.text) for remark in found]


def saved_again(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=40)
    return Image.open(file).convert("RGB")


def test_the_laplacian_is_that_of_hand_arithmetic() -> None:
    """One white pixel in black 5 x 5: four 255, one -1020, four 0 in the middle 3 x 3."""
    pixels = np.zeros((5, 5, 3), np.uint8)
    pixels[2, 2] = 255

    assert measure(Image.fromarray(pixels)).sharpness == pytest.approx(
        (4 * 255**2 + 1020**2) / 9, abs=0.01
    )


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_sharp_photograph_gives_no_remark(name: str) -> None:
    assert measure(photograph(name)).sharpness > 400
    assert told(photograph(name)) == []


def test_blur_lowers_sharpness_as_calibrated() -> None:
    """The calibration of the thresholds, with the astronaut at 512 pixels."""
    blurred = [photograph().filter(ImageFilter.GaussianBlur(radius)) for radius in (2, 4, 8)]

    assert [measure(image).sharpness for image in blurred] == pytest.approx([130, 19, 5], rel=0.1)


def test_sharpness_does_not_depend_on_the_size_of_a_photograph() -> None:
    small, large = photograph(), photograph().resize((2048, 2048), Image.Resampling.LANCZOS)

    assert measure(large).sharpness == pytest.approx(measure(small).sharpness, rel=0.1)


def test_a_small_picture_is_not_enlarged_before_it_is_measured() -> None:
    small = photograph().resize((64, 64), Image.Resampling.LANCZOS)

    assert measure(small).sharpness > measure(small.resize((256, 256))).sharpness


def test_a_blurred_photograph_is_said() -> None:
    """Row 41."""
    ((kind, text),) = told(photograph().filter(ImageFilter.GaussianBlur(8)))

    assert kind == "warning"
    assert text == "looks blurred or heavily enlarged (sharpness 5; under 25 is soft)"


def test_a_dark_photograph_is_said_and_not_called_blurred() -> None:
    """Row 42."""
    ((kind, text),) = told(ImageEnhance.Brightness(photograph()).enhance(0.1))

    assert kind == "warning"
    assert text == "is very dark (mean brightness 11 of 255)"


@pytest.mark.parametrize("colour", ["white", "black", (90, 120, 30)])
def test_a_flat_picture_is_called_so_and_nothing_else(colour: str) -> None:
    """Row 42."""
    assert told(Image.new("RGB", (400, 300), colour)) == [
        ("warning", "is (almost) one flat colour")
    ]


@pytest.mark.parametrize("colour", ["white", "black"])
def test_a_picture_of_mostly_white_or_black_is_said_without_a_warning(colour: str) -> None:
    """Row 33: cut-outs on white are usual."""
    image = Image.new("RGB", (1000, 1000), colour)
    image.paste(photograph("coffee").resize((500, 600)), (0, 0))

    assert told(image) == [("info", f"is pure {colour} over 70% of its area")]


def test_a_tiny_photograph_is_said_with_its_enlargement() -> None:
    """Row 40."""
    assert told(photograph(), (120, 120), (768, 768)) == [
        ("warning", "(120x120) is enlarged 6.4 times and teaches blur; use a larger one")
    ]


def test_a_panorama_is_said_with_what_its_window_keeps() -> None:
    """Row 43: 3000x600 for 768x768 is enlarged by 768 / 600 and loses four fifths."""
    assert told(photograph(), (600, 3000), (768, 768)) == [
        ("info", "(3000x600) is enlarged 1.3 times to fill 768x768"),
        ("warning", "(3000x600) is 5.0:1; a 768x768 window keeps only 20% of it"),
    ]


def test_a_panorama_that_is_trained_as_one_is_all_right() -> None:
    assert told(photograph(), (512, 2048), (512, 2048)) == []


@pytest.mark.parametrize("size", [(768, 768), (760, 760), (1080, 1920)])
def test_a_picture_of_about_the_trained_size_or_a_usual_shape_gives_no_remark(size: Size) -> None:
    assert told(photograph(), size, (768, 768)) == []


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_nearly_the_same_picture_has_nearly_the_same_fingerprint(name: str) -> None:
    """The calibration: up to 0.05 for what changes nothing to see, 0.06 to 0.23 for a crop of 3 %
    or a turn of 3 degrees, about 0.5 for another picture.
    """
    image = photograph(name)
    own = measure(image).fingerprint
    same = [
        saved_again(image),
        image.resize((image.width // 2, image.height // 2)),
        ImageEnhance.Brightness(image).enhance(1.2),
    ]

    assert max(distance(own, measure(copy).fingerprint) for copy in same) <= 0.05
    others = [measure(photograph(other)) for other in PHOTOGRAPHS if other != name]
    assert min(distance(own, other.fingerprint) for other in others) > 0.4
    assert min(distance(own, other.mirrored) for other in others) > 0.3


def test_a_mirrored_picture_is_known_by_the_mirrored_fingerprint() -> None:
    image = measure(photograph())
    mirrored = measure(ImageOps.mirror(photograph()))

    assert distance(mirrored.mirrored, image.fingerprint) < 0.05
    assert distance(mirrored.fingerprint, image.fingerprint) > 0.3


def test_a_fingerprint_is_256_bits() -> None:
    found = measure(grid_image(40, 256))

    assert len(found.fingerprint) == len(found.mirrored) == 64
    # Red rises from left to right, so that no cell is brighter than the one to its right.
    assert found.fingerprint == "0" * 64
    assert distance(found.fingerprint, found.mirrored) == 1.0


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1000), (5000, 16)])
def test_a_picture_of_any_size_can_be_measured(size: Size) -> None:
    found = measure(Image.new("RGB", size, (10, 20, 30)))

    assert found.is_flat
    assert found.sharpness == 0


def test_measures_come_back_from_json_as_they_were() -> None:
    found = measure(photograph())

    assert Measures.model_validate_json(found.model_dump_json()) == found
