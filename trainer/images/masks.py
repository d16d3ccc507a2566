"""Which pixels of a picture the loss counts: made from a segmenter's answer, or given by the user.

A mask is float32 (h, w) in [0, 1] from here to the loss. Where files lie and what a step draws
is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

from trainer.config import MaskConfig
from trainer.images.crop import Box, Mask, Size
from trainer.images.pictures import BadPicture, decode_grey

# An upright picture and a prompt to the logits of the prompt against nothing, (h, w) of any size.
Segmenter = Callable[[Image.Image, str], npt.NDArray[np.float32]]

# Two shapes are one if their aspects differ by no more than this share: rounding, not cropping.
ASPECT_TOLERANCE = 0.005
# Below this probability at its best place, a subject is probably not in the picture. A guess.
FAINT = 0.05


class BadMask(Exception):
    """A given mask that cannot be used; its text is the reason, `hint` the remedy."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class MaskOrigin(BaseModel):
    """What a mask is made of: equal origins of equal pictures are equal masks.

    Args:
        kind: a file that the user gave, the picture's opacity, or a segmenter's answer.
        inverted: whether it keeps the rest of the picture instead.
        given_sha256: of the file given.
        segmenter: its name.
        weights: where its weights come from, if it has any.
        prompt: what the segmenter looks for.
        temperature: see `mask_of`.
        bias: see `mask_of`.
        without_other_faces: whether faces but the largest are taken out.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["given", "alpha", "segmented"]
    inverted: bool
    given_sha256: str = ""
    segmenter: str = ""
    weights: str = ""
    prompt: str = ""
    temperature: float = 1.0
    bias: float = 0.0
    without_other_faces: bool = False


def mask_origin(
    mask: MaskConfig,
    *,
    of_class: bool,
    given_sha256: str | None,
    has_alpha: bool,
    without_other_faces: bool = False,
) -> MaskOrigin | None:
    """What the mask of a picture is to be made of; nothing where the whole picture counts.

    Args:
        mask: the section on masks.
        of_class: whether it is a class picture, to which `class_image_mask_style` applies.
        given_sha256: of the mask file that belongs to the picture, if there is one.
        has_alpha: whether a pixel of the picture is not opaque.
        without_other_faces: take faces but the largest out of what a segmenter finds.
    """
    style = mask.class_image_mask_style if of_class else "normal"
    if style == "none":
        return None
    inverted = style == "invert"
    if mask.use_given_masks and given_sha256 is not None:
        return MaskOrigin(kind="given", inverted=inverted, given_sha256=given_sha256)
    if mask.use_given_masks and has_alpha:
        return MaskOrigin(kind="alpha", inverted=inverted)
    if not mask.clip_seg_mask_prompt.strip():
        return None
    return MaskOrigin(
        kind="segmented",
        inverted=inverted,
        segmenter=mask.segmenter,
        weights=mask.clipseg_url if mask.segmenter == "clipseg" else "",
        prompt=mask.clip_seg_mask_prompt,
        temperature=mask.clip_seg_mask_temperature,
        bias=mask.clip_seg_mask_bias,
        without_other_faces=without_other_faces,
    )


def mask_of(
    logits: npt.NDArray[np.float32], *, temperature: float, bias: float, inverted: bool = False
) -> Mask:
    """The mask of a segmenter's logits, 1 at its best place.

    The order of operations is that of cog-sdxl's `clipseg_mask_generator` (preprocess.py), whose
    softmax over prompt and nothing is this sigmoid.

    Args:
        logits: (h, w) of the prompt against nothing.
        temperature: larger is flatter.
        bias: what every pixel gets before normalising, in [0, 1].
        inverted: keep what the prompt does not mean.
    """
    probabilities = _probabilities(logits, temperature)
    if inverted:
        probabilities = 1 - probabilities
    weights = (probabilities + bias).clip(0, 1)
    largest = weights.max()
    # Only without any bias, and with nothing of the subject in the picture.
    if largest == 0:
        return np.ones_like(logits, np.float32)
    mask: Mask = (weights / largest).astype(np.float32)
    return mask


def is_faint(logits: npt.NDArray[np.float32], *, temperature: float) -> bool:
    """Whether the subject is nowhere more probable than `FAINT`."""
    return bool(_probabilities(logits, temperature).max() < FAINT)


def given_mask(content: bytes, size: Size, *, inverted: bool) -> Mask:
    """The mask in the content of a file that the user gave for a picture.

    Args:
        content: of a file of 8- or 16-bit grey values; colours are converted.
        size: of the upright picture.
        inverted: take black for white.

    Raises:
        BadMask: it cannot be read, has another shape than the picture, or leaves no pixel.
    """
    try:
        mask = decode_grey(content)
    except BadPicture as error:
        raise BadMask(f"cannot be used: {error}", "save it as a greyscale PNG") from error
    (mask_height, mask_width), (height, width) = mask.shape, size
    if abs(mask_width * height / (mask_height * width) - 1) > ASPECT_TOLERANCE:
        raise BadMask(
            f"is {mask_width}x{mask_height}, its picture {width}x{height} upright: the shapes "
            "differ, so they cannot be laid over each other",
            "give the mask the shape of its picture as an image viewer shows it",
        )
    if inverted:
        mask = 1 - mask
    if mask.max() == 0:
        colour, style = (
            ("white", ", and class_image_mask_style is invert") if inverted else ("black", "")
        )
        raise BadMask(
            f"is all {colour}{style}: nothing of its picture would be learned",
            "paint what counts white, or remove the mask or the picture",
        )
    return mask


def alpha_mask(alpha: Image.Image, *, inverted: bool) -> Mask:
    """The mask in a picture's opacity, mode L, of which some pixel is not opaque."""
    opacity = np.asarray(alpha).astype(np.float64) / 255
    return np.asarray(1 - opacity if inverted else opacity, np.float32)


def resized_mask(mask: Mask, size: Size, part: Box | None = None) -> Mask:
    """The mask at another size, bilinear; where it shrinks, every pixel of it counts.

    Args:
        part: left, top, width and height of what is taken of it; may lie between its pixels.
    """
    left, top, width, height = part or (0, 0, *reversed(mask.shape))
    # Within the picture also where the sum of two fractions is not.
    box = left, top, min(left + width, mask.shape[1]), min(top + height, mask.shape[0])
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BILINEAR, box)
    return np.asarray(image, np.float32).clip(0, 1)


def _probabilities(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """The sigmoid of logits / temperature, without overflow."""
    probabilities: npt.NDArray[np.float64] = np.exp(
        -np.logaddexp(0, -logits.astype(np.float64) / temperature)
    )
    return probabilities
