"""The segmenters that can find a subject, by name: how each is made ready and known again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.config import MaskConfig
from trainer.images import clipseg
from trainer.images.masks import Segmenter

# Keeps the logits of black and white finite.
_CLIPPED = 1e-7


@dataclass(frozen=True)
class SegmenterKind:
    """One way to find a subject.

    Args:
        ready: makes it ready; called when a first mask is needed.
        identity: of what its answers depend on beside picture and prompt.
    """

    ready: Callable[[MaskConfig], Segmenter]
    identity: Callable[[MaskConfig], str]


def luminance(image: Image.Image, _: str) -> npt.NDArray[np.float32]:
    """Logits whose sigmoid is the luminance (ITU-R BT.601, red 0.299, green 0.587, blue 0.114)."""
    rgb = np.asarray(image.convert("RGB"), np.float64) / 255
    values = (rgb @ np.array([0.299, 0.587, 0.114])).clip(_CLIPPED, 1 - _CLIPPED)
    logits: npt.NDArray[np.float32] = np.log(values / (1 - values)).astype(np.float32)
    return logits


# By the value of `MaskConfig.segmenter`.
SEGMENTERS: Mapping[str, SegmenterKind] = {
    "clipseg": SegmenterKind(
        lambda mask: clipseg.clipseg(mask.clipseg_url),
        lambda mask: clipseg.identity_of(mask.clipseg_url),
    ),
    "luminance": SegmenterKind(lambda _: luminance, lambda _: "BT.601"),
}
