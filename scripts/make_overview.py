"""Puts what a run saw and how it went into one picture: make_overview.py RUN_FOLDER PICTURE

Above, the photographs upright and at the trained scale; below, the loss over the steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageOps

THUMBNAIL = 160
COLUMNS = 6
GAP = 8


def make_overview(run: Path, target: Path) -> None:
    """Writes the picture.

    Args:
        run: a finished run folder.
        target: the PNG file to write.
    """
    pictures = [Image.open(path) for path in sorted((run / "prepared").glob("*.png"))]
    thumbnails = [_thumbnail(picture) for picture in pictures if picture.mode == "RGB"]
    plot = Image.open(next((run / "outputs").glob("*loss*.png"))).convert("RGB")
    width = COLUMNS * (THUMBNAIL + GAP) + GAP
    plot = plot.resize((width, round(plot.height * width / plot.width)), Image.Resampling.LANCZOS)
    rows = -(-len(thumbnails) // COLUMNS)
    sheet = Image.new("RGB", (width, rows * (THUMBNAIL + GAP) + GAP + plot.height), "white")
    for number, thumbnail in enumerate(thumbnails):
        row, column = divmod(number, COLUMNS)
        corner = (GAP + column * (THUMBNAIL + GAP), GAP + row * (THUMBNAIL + GAP))
        sheet.paste(thumbnail, corner)
    sheet.paste(plot, (0, sheet.height - plot.height))
    sheet.save(target)


def _thumbnail(picture: Image.Image) -> Image.Image:
    size = (THUMBNAIL, THUMBNAIL)
    return ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="white")


def main() -> None:
    """Makes the picture named on the command line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_overview(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
