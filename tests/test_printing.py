"""How what was found out is printed: each thing once, data on stdout and talk on stderr."""

from __future__ import annotations

from typing import Any

import pytest

from trainer import printing

NOTE = {"kind": "warning", "field": "captioner", "message": "is not there"}
LINE = {"topic": "count", "found": "only 2 pictures", "advice": "better 20", "level": "act"}


def a_set(**changes: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"pictures": [], "left_out": [], "notes": [], "contact_sheets": []}
    return {**empty, "advice": {"level": "ok", "lines": []}, **changes}


def test_a_note_on_several_sets_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    printing.prepared({"sets": [a_set(notes=[NOTE]), a_set(notes=[NOTE])]})

    assert capsys.readouterr().err == "warning: `captioner`: is not there\n"


def test_a_set_without_advice_has_no_table_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    printing.prepared({"sets": [a_set()]})
    without = capsys.readouterr().out
    printing.prepared({"sets": [a_set(advice={"level": "act", "lines": [LINE]})]})
    advised = capsys.readouterr().out

    assert "topic" not in without
    assert "only 2 pictures" in advised


def test_the_sheets_come_last(capsys: pytest.CaptureFixture[str]) -> None:
    printing.prepared({"sets": [a_set(contact_sheets=["one.jpg"]), a_set(contact_sheets=["two"])]})

    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Open this contact sheet: one.jpg",
        "Open this contact sheet: two",
    ]
