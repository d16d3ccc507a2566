"""Prints how many code blocks of the pages tests execute, and how many they check only."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from documented import PAGES, all_blocks, blocks_of, counted


def main() -> None:
    """A line for each page that has blocks, and one of all."""
    rows = [(page, counted(blocks_of(page))) for page in PAGES]
    rows = [(page, found) for page, found in rows if sum(found.values())]
    width = max(len(page) for page, _ in rows)
    print(f"{'page':{width}}  executed  checked only  listings")
    for page, found in [*rows, ("all", counted(all_blocks()))]:
        print(f"{page:{width}}  {found['executed']:8}  {found['checked']:12}  {found['listing']:8}")


if __name__ == "__main__":
    main()
