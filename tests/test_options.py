"""Every option acts: the option-effect matrix, one row for each statement about an option.

A row flips leaves of a tiny training of the real classes and asserts what is seen of it where the
option acts; see `options.matrix`. Whatever stands only in the written configuration, in headers
or in logs is no effect.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from options.case import Case, Lab
from options.matrix import Row
from options.tables import ROWS, observables
from options.world import World

from trainer.config import LEAVES


@pytest.fixture(scope="module")
def lab(sd15_folder: Path, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """What the rows share."""
    models = {"sd15": sd15_folder, "sdxl": sdxl_folder}
    worlds = {
        family: World(tmp_path_factory.mktemp(f"world-{family}"), family, model)
        for family, model in models.items()
    }
    return Lab(worlds, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    ("family", "row"),
    [
        pytest.param(family, row, id=f"{family}-{row.name}")
        for family in ("sd15", "sdxl")
        for row in ROWS
        if family in row.families
    ],
)
def test_the_option_does_what_its_row_says(family: str, row: Row, lab: Lab) -> None:
    row.shows(Case(row, family, lab))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.acts_on])
def test_an_option_that_acts_is_not_said_to_be_idle(row: Row, lab: Lab) -> None:
    case = Case(row, row.families[0], lab)

    assert row.leaf not in case.config(row.flipped).resolved.ignored_options


def test_every_option_has_a_row_for_every_family() -> None:
    assert len(LEAVES) > 90
    for family in ("sd15", "sdxl"):
        rows = {row.leaf for row in ROWS if family in row.families}
        assert rows == set(LEAVES)


@pytest.mark.parametrize("leaf", LEAVES)
def test_an_option_is_seen_somewhere_or_only_ever_refused(leaf: str) -> None:
    assert (observables()[leaf] == ()) == (leaf == "model_family")
