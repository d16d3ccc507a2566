"""The page on the names of layers is what the tables say."""

from __future__ import annotations

import make_file_names

from trainer import families


def test_the_page_on_file_names_is_current() -> None:
    page = make_file_names.PAGE.read_text(encoding="utf-8")

    assert page == make_file_names.page(), "run scripts/make_file_names.py"


def test_the_page_has_a_row_for_every_layer_that_changes_its_name() -> None:
    rows = [line for line in make_file_names.page().splitlines() if line.startswith("| ")]

    for name in families.family_names():
        names = families.load_family(name).kohya
        for ours, theirs in names.layers.items():
            assert any(
                f"`{ours}`" in row and f"`{theirs.replace('.', '_')}`" in row for row in rows
            )
        for theirs, parts in names.fusions.items():
            row, *_ = [
                row
                for row in rows
                if row.endswith(f" | `{theirs.replace('.', '_')}` |")
                and all(f"`{part}`" in row for part in parts)
            ]
            # In the order of the rows.
            places = [row.index(f"`{part}`") for part in parts]
            assert places == sorted(places)
