"""How processes meet that a launcher started together."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError  # type: ignore[attr-defined]

from trainer import processes
from trainer.errors import ProcessError
from trainer.job import RunFolder
from trainer.processes import Launched, _place

MEETING = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launched:
    """The second of two processes, as a launcher starts it."""
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    return Launched(5, RunFolder(tmp_path), lambda: False)


def test_processes_that_are_started_again_read_nothing_that_earlier_ones_left_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def place_of(attempt: str) -> str:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        # Each process counts from the beginning.
        monkeypatch.setattr(processes, "_NUMBERS", itertools.count())
        return _place()

    assert place_of("0") == place_of("0")
    assert len({place_of("0"), place_of("1"), _place(), place_of("11")}) == 4


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("MASTER_ADDR", None, "MASTER_ADDR (not set)"),
        ("MASTER_PORT", None, "MASTER_PORT (not set)"),
        ("MASTER_PORT", "http", "MASTER_PORT `http`"),
        ("MASTER_PORT", "70000", "MASTER_PORT `70000`"),
    ],
)
def test_what_a_launcher_did_not_set_is_named(
    variable: str,
    value: str | None,
    told: str,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable)
    with pytest.raises(ProcessError) as caught, launched:
        pass
    assert told in caught.value.message
    assert "torchrun" in caught.value.hint


def test_an_address_where_no_store_answers_is_named(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise DistNetworkError("connection refused")

    met = SimpleNamespace(host="node0", port=29500), 1, 2
    monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([met]))
    monkeypatch.setattr(processes, "TCPStore", refused)
    with pytest.raises(ProcessError) as caught, launched:
        pass
    assert "MASTER_ADDR `node0`, MASTER_PORT `29500`" in caught.value.message
    assert "connection refused" in caught.value.message


def test_last_words_leave_a_result_that_is_there_as_it_is_whoever_wrote_it(
    launched: Launched, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text('{"of": "another version"}')
    launched._last_words(ProcessError("lost"), True)
    assert (tmp_path / "result.json").read_text() == '{"of": "another version"}'


def test_last_words_are_said_even_where_the_folder_cannot_be_locked(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(_: RunFolder) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(RunFolder, "lock", no_locks)
    launched._last_words(ProcessError("lost"), False)
    assert "error[process]: lost" in capsys.readouterr().err
