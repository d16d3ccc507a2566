"""Every option acts: the option-effect matrix, one row for each statement about an option.

A row flips leaves of a tiny training of the real classes and asserts what is seen of it where the
option acts; see `options.matrix`. Whatever stands only in the written configuration, in headers
or in logs is no effect. With `--every-family` each row runs in every family that it holds for,
otherwise in those that the code behind it knows apart; see `options.tables`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from options.case import Case, Lab
from options.matrix import FAMILIES, Row
from options.tables import ON_A_GPU, ROWS, observables
from options.world import World

from trainer.config import LEAVES


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """What the rows share."""
    models: dict[str, Path] = {n: request.getfixturevalue(f"{n}_folder") for n in FAMILIES}
    worlds = {
        family: World(tmp_path_factory.mktemp(f"world-{family}"), family, model)
        for family, model in models.items()
    }
    return Lab(worlds, tmp_path_factory.mktemp("matrix"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives rows their families."""
    if not {"family", "row"} <= set(metafunc.fixturenames):
        return
    everywhere = metafunc.config.getoption("--every-family")
    cases = [
        (family, row)
        for family in FAMILIES
        for number, row in enumerate(ROWS)
        if family in (row.families if everywhere else row.runs_in(number))
    ]
    names = [f"{family}-{row.name}" for family, row in cases]
    metafunc.parametrize(("family", "row"), cases, ids=names)


def test_the_option_does_what_its_row_says(family: str, row: Row, lab: Lab) -> None:
    row.shows(Case(row, family, lab))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.acts_on])
def test_an_option_that_acts_is_not_said_to_be_idle(row: Row, lab: Lab) -> None:
    case = Case(row, row.families[0], lab)

    assert row.leaf not in case.config(row.flipped).resolved.ignored_options


def test_every_option_has_a_row_for_every_family() -> None:
    assert len(LEAVES) > 90
    for family in FAMILIES:
        rows = {row.leaf for row in ROWS if family in row.families}
        assert rows == set(LEAVES)


def test_every_option_is_seen_somewhere_unless_it_only_ever_refuses_or_spares_a_gpu() -> None:
    unseen = {leaf for leaf, places in observables().items() if places == ()}

    assert unseen == {"model_family", *ON_A_GPU}
