"""How good one picture is, in numbers: sharpness, light, and a fingerprint to know copies by.

What the picture shows is not known here, nor are the other pictures of its set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

from trainer.images.crop import Size, enlargement
from trainer.images.findings import Remark

# Everything is measured at this many pixels of the longer side, so that pictures of all sizes
# compare. Smaller ones are not enlarged: that would make them look soft.
MEASURED_SIDE = 256
# At that size sharp photographs have a sharpness of about 400 to 1800; the same, blurred by 2, 4
# and 8 of 512 pixels, about 130, 19 and 5.
SOFT = 25.0
# Mean brightness of 255 below which a picture is dark.
DARK = 30.0
# Standard deviation of the brightness, of 255, below which a picture is one flat colour.
FLAT = 4.0
# Share of pure white, or black, from which that is worth a word: cut-outs on white are usual.
CLIPPED = 0.5
# A picture enlarged more than this teaches blur.
LARGEST_ENLARGEMENT = 2.0
# Less is nothing to speak of: it reads as `1.0 times`.
_SMALLEST_ENLARGEMENT = 1.05
# Share of a picture that its window should keep; 16:9 keeps 0.56 in a square.
_LEAST_KEPT = 0.4

_HASH_SIDE = 16
_WHITE, _BLACK = 254, 1


class Measures(BaseModel):
    """What is measured of a picture.

    Args:
        sharpness: variance of the Laplacian of the brightness.
        brightness: its mean, 0 to 255.
        contrast: its standard deviation.
        overexposed: share of the area that is pure white.
        black: share of the area that is pure black.
        fingerprint: 256 bits in hexadecimal, nearly the same for nearly the same picture.
        mirrored: the fingerprint of the mirrored picture.
    """

    model_config = ConfigDict(frozen=True)
    sharpness: float
    brightness: float
    contrast: float
    overexposed: float
    black: float
    fingerprint: str
    mirrored: str

    @property
    def is_flat(self) -> bool:
        """Whether the picture is almost one colour."""
        return self.contrast < FLAT

    @property
    def is_dark(self) -> bool:
        """Whether too little light is in it to tell more."""
        return not self.is_flat and self.brightness < DARK

    @property
    def is_soft(self) -> bool:
        """Whether it looks blurred; of dark and flat pictures nobody can tell."""
        return not (self.is_flat or self.is_dark) and self.sharpness < SOFT


def measure(image: Image.Image) -> Measures:
    """The measures of a picture of mode RGB."""
    scale = min(1.0, MEASURED_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # Pixels are averaged down to three times the size before the filter: as good, and fast.
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("L")
    grey = np.asarray(small).astype(np.float64)
    cells = small.resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    steps = np.asarray(cells).astype(int)
    return Measures(
        sharpness=round(_laplacian_variance(grey), 2),
        brightness=round(float(grey.mean()), 2),
        contrast=round(float(grey.std()), 2),
        overexposed=round(float((grey >= _WHITE).mean()), 4),
        black=round(float((grey <= _BLACK).mean()), 4),
        fingerprint=_hash(steps),
        mirrored=_hash(steps[:, ::-1]),
    )


def remarks_on_quality(
    measures: Measures, size: Size, target: Size | None = None
) -> tuple[Remark, ...]:
    """What is odd about one picture.

    Args:
        size: (height, width) of what is used of it, before it is resized.
        target: trained (height, width), if that is known.
    """
    on_size = () if target is None else _remarks_on_size(size, target)
    return (*on_size, *_remarks_on_light(measures))


def _remarks_on_size(size: Size, target: Size) -> tuple[Remark, ...]:
    (height, width), remarks = size, []
    times = enlargement(size, target)
    enlarged = f"({width}x{height}) is enlarged {times:.1f} times"
    if times > LARGEST_ENLARGEMENT:
        remarks.append(Remark.warning(f"{enlarged} and teaches blur; use a larger one"))
    elif times > _SMALLEST_ENLARGEMENT:
        remarks.append(Remark.info(f"{enlarged} to fill {target[1]}x{target[0]}"))
    kept = (target[0] * target[1]) / (times**2 * height * width)
    if kept < _LEAST_KEPT:
        aspect = max(height, width) / min(height, width)
        window = f"a {target[1]}x{target[0]} window keeps only {kept:.0%} of it"
        remarks.append(Remark.warning(f"({width}x{height}) is {aspect:.1f}:1; {window}"))
    return tuple(remarks)


def _remarks_on_light(measures: Measures) -> tuple[Remark, ...]:
    if measures.is_flat:
        return (Remark.warning("is (almost) one flat colour"),)
    if measures.is_dark:
        return (Remark.warning(f"is very dark (mean brightness {measures.brightness:.0f} of 255)"),)
    remarks = []
    if measures.is_soft:
        sharpness = f"sharpness {measures.sharpness:.0f}; under {SOFT:.0f} is soft"
        remarks.append(Remark.warning(f"looks blurred or heavily enlarged ({sharpness})"))
    for share, colour in ((measures.overexposed, "white"), (measures.black, "black")):
        if share >= CLIPPED:
            remarks.append(Remark.info(f"is pure {colour} over {share:.0%} of its area"))
    return tuple(remarks)


def _laplacian_variance(grey: npt.NDArray[np.float64]) -> float:
    """How much brightness differs from the mean of its four neighbours; 0 without any inside."""
    inner = grey[1:-1, 1:-1]
    if not inner.size:
        return 0.0
    beside = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((beside - 4 * inner).var())


def _hash(cells: npt.NDArray[np.int_]) -> str:
    """Whether each of 16 x 16 cells is brighter than the one to its right (dHash)."""
    bits = cells[:, :-1] > cells[:, 1:]
    return np.packbits(bits).tobytes().hex()
