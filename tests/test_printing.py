"""How what was found out is printed: each thing once, data on stdout and talk on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import printing
from trainer.errors import DiskError, InputError

ROOT = Path(__file__).parent.parent
REFUSED = ["-m", "trainer", "train", "--rank", "0", "--json"]

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


def shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments and a shell's redirection."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_refusal_as_json_that_nobody_reads_has_its_exit_code(closed_pipe: int) -> None:
    refused = subprocess.run(
        [sys.executable, *REFUSED],
        cwd=ROOT,
        stdout=closed_pipe,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )

    assert refused.returncode == InputError.exit_code
    assert "error[input]" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("redirection", [">/dev/full", "<&- >&- 2>&-"])
def test_a_full_or_closed_stream_leaves_the_exit_code_of_a_refusal(redirection: str) -> None:
    refused = shell(redirection, *REFUSED)

    assert refused.returncode == InputError.exit_code
    assert "Traceback" not in refused.stderr


def test_data_that_finds_no_room_is_a_failure_of_a_command_without_another() -> None:
    schema = shell(">/dev/full", "-m", "trainer", "schema")

    assert schema.returncode == DiskError.exit_code
    assert schema.stderr.startswith("error[disk]: stdout could not be written: No space left")


def test_a_reader_that_had_enough_is_no_failure(closed_pipe: int) -> None:
    stream = printing.Unfailing(os.dup(closed_pipe))
    stream.write("words\n")
    with open("/dev/full", "wb") as full:
        other = printing.Unfailing(os.dup(full.fileno()))
        other.write("words")

    assert stream.failure is None
    assert isinstance(other.failure, OSError)


# Says which numbers the next files get, and of which kind its streams are.
NEXT = """
import os, sys
from trainer.printing import open_streams
open_streams()
assert sys.stdin.read() == ""
print("lost", flush=True)
numbers = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
os._exit(0 if min(numbers) > 2 else 1)
"""


def test_no_file_gets_the_number_of_a_stream_that_was_closed() -> None:
    assert shell("<&- >&- 2>&-", "-c", NEXT).returncode == 0
