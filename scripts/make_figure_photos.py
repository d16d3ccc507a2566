"""Draws a figure that the small world has never seen, as photographs with captions, for the demo.

Eight pictures of a striped disc, on each of four grounds two.
"""

from __future__ import annotations

from pathlib import Path

import click
from learning import write_photos


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Writes the pictures as PNG files, and the captions beside them."""
    write_photos(folder)


if __name__ == "__main__":
    main()
