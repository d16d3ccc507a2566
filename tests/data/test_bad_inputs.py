"""Whatever users give as pictures, captions and options about them: 82 cases with their messages.

The rows stand in `bad_archives`, `bad_pictures`, `bad_captions` and `bad_subjects`.
"""

from __future__ import annotations

from pathlib import Path

import bad_archives
import bad_captions
import bad_pictures
import bad_subjects
import pytest
from asking import Case, Place, folder_of, prepared

CASES = sorted(
    (*bad_archives.CASES, *bad_pictures.CASES, *bad_captions.CASES, *bad_subjects.CASES),
    key=lambda case: case.number,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd15_folder: Path) -> Place:
    return Place(tmp_path, monkeypatch, sd15_folder)


def test_the_table_has_every_row_once() -> None:
    assert [case.number for case in CASES] == list(range(1, 83))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number} {case.what}")
def test_a_bad_input_is_answered_as_its_row_says(case: Case, place: Place) -> None:
    answer = case.door(case.make(place), place)

    assert case.is_said_by(answer), "\n".join(answer.said)
    assert (answer.left, answer.captions) == (case.left, case.captions)


def test_of_good_pictures_nothing_is_said(place: Place) -> None:
    answer = prepared(folder_of()(place), place)

    assert (answer.left, answer.said) == (5, ())
