"""Masks: the arithmetic of the segmenter's answer, and what a given mask must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grid import encoded, grid_image
from PIL import Image

from trainer.config import MaskConfig
from trainer.images.masks import (
    BadMask,
    alpha_mask,
    given_mask,
    is_faint,
    mask_of,
    mask_origin,
    resized_mask,
)
from trainer.images.pictures import decode
from trainer.images.segmenters import luminance


def logits_of(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_the_mask_is_the_biased_sigmoid_divided_by_its_largest_value() -> None:
    mask = mask_of(logits_of([0, 2], [-4, 1]), temperature=2.0, bias=0.01)

    # By hand: 1 / (1 + exp(-logit / 2)) + 0.01, the largest is that of 2.
    largest = 1 / (1 + math.exp(-1)) + 0.01
    expected = [(1 / (1 + math.exp(-x / 2)) + 0.01) / largest for x in (0, 2, -4, 1)]
    assert mask.dtype == np.float32
    assert mask.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 5.0])
def test_it_is_the_softmax_over_prompt_and_nothing_of_cog_sdxl(temperature: float) -> None:
    of_prompt, of_nothing = torch.randn(2, 11, 13, generator=torch.Generator().manual_seed(0)) * 5

    mask = mask_of((of_prompt - of_nothing).numpy(), temperature=temperature, bias=0.05)

    # preprocess.py: softmax(logits / temp)[0] + bias, clamped, divided by its maximum.
    softmax = (torch.stack([of_prompt, of_nothing]).double() / temperature).softmax(0)[0]
    expected = (softmax + 0.05).clamp(0, 1)
    np.testing.assert_allclose(mask, (expected / expected.max()).numpy(), atol=1e-6)


def test_a_larger_temperature_gives_a_flatter_mask() -> None:
    logits = logits_of([-3, 0, 3])

    spreads = [float(np.ptp(mask_of(logits, temperature=t, bias=0.0))) for t in (0.5, 1, 4, 100)]

    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.03


def test_the_bias_is_the_weight_that_every_pixel_keeps() -> None:
    mask = mask_of(logits_of([-60, 60]), temperature=1.0, bias=0.001)

    # The sum is clamped to 1 at its largest, so nothing is divided.
    assert mask.tolist() == [[pytest.approx(0.001), 1]]
    assert mask_of(logits_of([-60, -0.5]), temperature=1.0, bias=1.0).tolist() == [[1, 1]]


def test_an_inverted_mask_is_inverted_before_bias_and_normalising() -> None:
    mask = mask_of(logits_of([0, math.log(9)]), temperature=1.0, bias=0.1, inverted=True)

    # Probabilities 0.5 and 0.9, inverted 0.5 and 0.1, biased 0.6 and 0.2, divided by 0.6.
    assert mask[0].tolist() == pytest.approx([1, 1 / 3], abs=1e-6)


def test_logits_of_any_size_do_not_overflow() -> None:
    mask = mask_of(logits_of([-1e4, 1e4]), temperature=0.01, bias=0.0)

    assert mask.tolist() == [[0, 1]]
    assert mask_of(logits_of([-1e4, -1e4]), temperature=0.01, bias=0.0).tolist() == [[1, 1]]


def test_a_subject_that_is_nowhere_probable_is_faint() -> None:
    assert is_faint(logits_of([-9, -4]), temperature=1.0)  # at most 1.8 %
    assert not is_faint(logits_of([-9, -4]), temperature=4.0)  # 27 %


def test_the_luminance_segmenter_gives_the_luminance_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    pixels[0, :2] = [[0, 0, 0], [255, 255, 255]]

    logits = luminance(Image.fromarray(pixels), "anything")

    # ITU-R BT.601.
    red, green, blue = (pixels[..., channel] / 255 for channel in range(3))
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    assert logits.dtype == np.float32
    np.testing.assert_allclose(1 / (1 + np.exp(-logits.astype(float))), expected, atol=1e-6)


GREY = np.linspace(0, 255, 40 * 60).astype(np.uint8).reshape(40, 60)


def test_a_given_mask_is_its_grey_values_as_they_are() -> None:
    mask = given_mask(encoded(Image.fromarray(GREY // 2)), (40, 60), inverted=False)

    assert mask.dtype == np.float32
    # Neither biased nor divided by its largest value.
    np.testing.assert_allclose(mask, (GREY // 2) / 255, atol=1e-7)


def test_a_given_mask_inverted_counts_what_is_black() -> None:
    mask = given_mask(encoded(Image.fromarray(GREY)), (40, 60), inverted=True)

    np.testing.assert_allclose(mask, 1 - GREY / 255, atol=1e-6)


def test_sixteen_bits_of_a_given_mask_are_kept() -> None:
    values = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)

    mask = given_mask(encoded(Image.fromarray(values)), (40, 60), inverted=False)

    np.testing.assert_allclose(mask, values / 65535, atol=1e-7)
    assert len(np.unique(mask)) > 2000


def test_a_coloured_given_mask_counts_by_its_brightness() -> None:
    image = Image.new("RGB", (60, 40), (255, 0, 0))

    mask = given_mask(encoded(image), (40, 60), inverted=False)

    assert mask.flatten()[0] == pytest.approx(0.299, abs=0.002)


def test_transparent_pixels_of_a_given_mask_count_as_black() -> None:
    pixels = np.full((40, 60, 4), 255, np.uint8)
    pixels[:, :30, 3] = 0

    mask = given_mask(encoded(Image.fromarray(pixels)), (40, 60), inverted=False)

    assert (mask[:, :30] == 0).all()
    assert (mask[:, 30:] == 1).all()


def test_a_given_mask_is_turned_by_its_own_exif_data() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(GREY)

    mask = given_mask(encoded(stored, exif=exif), (60, 40), inverted=False)

    np.testing.assert_allclose(mask, np.rot90(GREY, -1) / 255, atol=1e-7)


def test_a_given_mask_may_be_smaller_but_not_of_another_shape() -> None:
    content = encoded(Image.fromarray(GREY))

    # 603 x 400 is wider by half a percent exactly, 607 x 400 by more than one.
    for size in ((400, 600), (400, 603), (20, 30)):
        assert given_mask(content, size, inverted=False).shape == (40, 60)
    with pytest.raises(BadMask, match="is 60x40, its picture 607x400") as error:
        given_mask(content, (400, 607), inverted=False)
    assert "shape of its picture" in error.value.hint


def test_a_given_mask_may_be_a_few_pixels_coarse() -> None:
    pixels = np.array([[0, 255, 0], [0, 0, 51]], np.uint8)

    mask = given_mask(encoded(Image.fromarray(pixels)), (400, 600), inverted=False)

    np.testing.assert_allclose(mask, pixels / 255, atol=1e-7)


def test_a_given_mask_that_leaves_nothing_is_refused() -> None:
    black, white = (encoded(Image.new("L", (60, 40), value)) for value in (0, 255))

    with pytest.raises(BadMask, match="is all black"):
        given_mask(black, (40, 60), inverted=False)
    with pytest.raises(BadMask, match="is all white, and class_image_mask_style is invert"):
        given_mask(white, (40, 60), inverted=True)
    assert given_mask(black, (40, 60), inverted=True).min() == 1


def test_a_given_mask_that_is_no_picture_is_refused() -> None:
    with pytest.raises(BadMask, match="cannot be used: the file is empty"):
        given_mask(b"", (40, 60), inverted=False)
    with pytest.raises(BadMask, match="web page"):
        given_mask(b"<html>", (40, 60), inverted=False)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_opacity_turns_upright_with_its_picture(orientation: int) -> None:
    pixels = np.dstack([np.asarray(grid_image(40, 60)), GREY])
    exif = Image.Exif()
    exif[0x0112] = orientation

    picture = decode(encoded(Image.fromarray(pixels), exif=exif))

    quarters = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    assert picture.alpha is not None
    mask = alpha_mask(picture.alpha, inverted=False)
    assert mask.shape == picture.size
    np.testing.assert_allclose(mask, np.rot90(GREY, quarters) / 255, atol=1e-7)
    inverted = alpha_mask(picture.alpha, inverted=True)
    np.testing.assert_allclose(inverted, 1 - mask, atol=1e-6)


def test_an_opaque_picture_has_no_opacity_to_speak_of() -> None:
    pixels = np.dstack([np.asarray(grid_image(40, 60)), np.full((40, 60), 255, np.uint8)])

    assert decode(encoded(Image.fromarray(pixels))).alpha is None
    assert decode(encoded(grid_image(40, 60))).alpha is None


def test_a_thin_structure_survives_when_a_mask_shrinks() -> None:
    mask = np.zeros((64, 64), np.float32)
    mask[:, 33] = 1

    small = resized_mask(mask, (8, 8))

    assert small.dtype == np.float32
    # One column of 64 is an eighth of one of 8, wherever it falls.
    assert small.sum(1).tolist() == pytest.approx([1 / 8] * 8, rel=1e-5)


SEGMENTED = MaskConfig(clip_seg_mask_prompt="head", clip_seg_mask_temperature=2.0)


@pytest.mark.parametrize(
    ("mask", "of_class", "given", "has_alpha", "expected"),
    [
        (MaskConfig(), False, None, False, None),
        (MaskConfig(), False, "a1", True, ("given", False)),
        (MaskConfig(), False, None, True, ("alpha", False)),
        (SEGMENTED, False, "a1", True, ("given", False)),
        (SEGMENTED, False, None, True, ("alpha", False)),
        (SEGMENTED, False, None, False, ("segmented", False)),
        (SEGMENTED.model_copy(update={"use_given_masks": False}), False, "a1", True, "segmented"),
        (MaskConfig(use_given_masks=False), False, "a1", True, None),
        # The style is for class pictures only.
        (SEGMENTED.model_copy(update={"class_image_mask_style": "none"}), False, None, False, "s"),
        (SEGMENTED.model_copy(update={"class_image_mask_style": "none"}), True, "a1", True, None),
        (SEGMENTED.model_copy(update={"class_image_mask_style": "invert"}), True, "a1", True, "gi"),
        (SEGMENTED.model_copy(update={"class_image_mask_style": "invert"}), True, None, True, "ai"),
        (
            SEGMENTED.model_copy(update={"class_image_mask_style": "invert"}),
            True,
            None,
            False,
            "si",
        ),
        (MaskConfig(class_image_mask_style="invert"), True, None, False, None),
    ],
)
def test_given_masks_come_before_opacity_and_that_before_a_segmenter(
    mask: MaskConfig, of_class: bool, given: str | None, has_alpha: bool, expected: object
) -> None:
    origin = mask_origin(mask, of_class=of_class, given_sha256=given, has_alpha=has_alpha)

    short = {
        "s": ("segmented", False),
        "segmented": ("segmented", False),
        "gi": ("given", True),
        "ai": ("alpha", True),
        "si": ("segmented", True),
    }
    wanted = short[expected] if isinstance(expected, str) else expected
    assert (origin and (origin.kind, origin.inverted)) == wanted


def test_another_prompt_or_number_is_another_origin_only_where_a_segmenter_is_asked() -> None:
    def origins(has_alpha: bool, **options: object) -> object:
        mask = MaskConfig(**{"clip_seg_mask_prompt": "head", **options})
        return mask_origin(mask, of_class=False, given_sha256=None, has_alpha=has_alpha)

    for options in (
        {"clip_seg_mask_prompt": "hand"},
        {"clip_seg_mask_temperature": 3.0},
        {"clip_seg_mask_bias": 0.5},
        {"segmenter": "luminance"},
    ):
        assert origins(False, **options) != origins(False)
        assert origins(True, **options) == origins(True)
