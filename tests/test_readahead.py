"""Files read before they are asked for."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from trainer import readahead
from trainer.readahead import read_ahead

SECONDS = 30.0


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.write_bytes(bytes(100))
    return paths


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The files that were opened, with how many of their bytes were read."""
    opened: list[tuple[str, int]] = []

    class Watched(io.BytesIO):
        def __init__(self, path: Path) -> None:
            with open(path, "rb") as file:
                super().__init__(file.read())
            self.path = path

        def close(self) -> None:
            if not self.closed:
                opened.append((self.path.name, self.tell()))
            super().close()

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Watched(path))
    return opened


def wait_for_the_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(SECONDS)


def test_every_file_is_read_to_its_end(
    files: list[Path], read: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_CHUNK", 30)

    with read_ahead(files):
        wait_for_the_thread()

    assert read == [("one", 100), ("two", 100)]


def test_a_file_that_cannot_be_read_is_left_to_who_needs_it(
    files: list[Path], tmp_path: Path
) -> None:
    with read_ahead([tmp_path / "absent", tmp_path, *files]):
        wait_for_the_thread()


def test_nothing_is_read_any_more_when_it_is_of_no_use(tmp_path: Path) -> None:
    endless = Path("/dev/zero")

    with read_ahead([endless]):
        assert any(thread.name == "read ahead" for thread in threading.enumerate())

    assert not any(thread.name == "read ahead" for thread in threading.enumerate())


def test_a_failure_meanwhile_is_the_callers(files: list[Path]) -> None:
    with pytest.raises(KeyError), read_ahead(files):
        raise KeyError
