"""What the checks of reliability share: how thorough they are, and the figure each one reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interrupted import Course
from rank_jobs import Zygote


@pytest.fixture
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether a check tries everything: `--thorough`; otherwise it takes a small sample."""
    return bool(pytestconfig.getoption("thorough"))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Sets the figure that the table of `scripts/check_reliability` prints for a check."""
    return lambda text: record_property("figure", text)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts trainings in two processes without the seconds that imports take."""
    made = Zygote(tmp_path_factory.mktemp("cache"))
    yield made
    made.end()


@pytest.fixture(scope="session")
def courses(
    tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, photo_folder: Path
) -> Callable[..., Course]:
    """Makes trainings with these options, each with its uninterrupted run; equal ones once."""
    made: dict[str, Course] = {}

    def make(**leaves: Any) -> Course:
        name = repr(sorted(leaves.items()))
        if name not in made:
            root = tmp_path_factory.mktemp("course")
            made[name] = Course(root, sd15_folder, photo_folder, **leaves)
        return made[name]

    return make
