"""Draws a figure that the small world has never seen, as photographs with captions, for the demo.

Twelve pictures of a striped disc, on each of four grounds three.
"""

from __future__ import annotations

from pathlib import Path

import click
from learning import write_photos
from world_pictures import BACKGROUNDS

PLACES = [(ground, place) for ground in BACKGROUNDS for place in ("center", "left", "top")]


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Writes the pictures as PNG files, and the captions beside them."""
    write_photos(folder, PLACES)


if __name__ == "__main__":
    main()
