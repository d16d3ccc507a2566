"""Archives: their kind, their content, and the same bytes every time."""

from __future__ import annotations

import os
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.export.archive import Container, write_archive

FILES = [
    ("images/000001_größe.png", b"\x89PNG" + bytes(range(256)) * 9),
    ("images/000000_a.png", b""),
    ("examples.jsonl", b'{"caption": "a photo of TOK"}\n' * 50),
]
CONTAINERS: list[Container] = ["zip", "tar", "tar.gz"]


def content(path: Path) -> list[tuple[str, bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return [(name, archive.read(name)) for name in archive.namelist()]
    with tarfile.open(path) as archive:
        return [(entry.name, archive.extractfile(entry).read()) for entry in archive]


# Sources: PKWARE's APPNOTE 4.3.7; POSIX ustar, offset 257; RFC 1952.
@pytest.mark.parametrize(
    ("container", "offset", "magic"),
    [("zip", 0, b"PK\x03\x04"), ("tar", 257, b"ustar\x00"), ("tar.gz", 0, b"\x1f\x8b\x08")],
)
def test_an_archive_is_what_its_name_says(
    container: Container, offset: int, magic: bytes, tmp_path: Path
) -> None:
    path = write_archive(tmp_path / "debug_dataset", FILES, container)

    assert path == tmp_path / f"debug_dataset.{container}"
    assert path.read_bytes()[offset : offset + len(magic)] == magic


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_has_the_same_content_in_the_order_given(
    container: Container, tmp_path: Path
) -> None:
    path = write_archive(tmp_path / "a", FILES, container)

    assert content(path) == FILES


@pytest.mark.parametrize("container", CONTAINERS)
def test_another_time_and_place_give_the_same_bytes(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_archive(tmp_path / "a", FILES, container)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    previous = os.umask(0o077)
    try:
        second = write_archive(tmp_path / "there" / "b", FILES, container)
    finally:
        os.umask(previous)

    assert first.read_bytes() == second.read_bytes()


def test_entries_belong_to_nobody_and_can_be_read(tmp_path: Path) -> None:
    with tarfile.open(write_archive(tmp_path / "a", FILES, "tar")) as archive:
        entries = archive.getmembers()
    with zipfile.ZipFile(write_archive(tmp_path / "a", FILES, "zip")) as archive:
        infos = archive.infolist()

    assert {(e.mode, e.uid, e.gid, e.uname, e.gname, e.mtime) for e in entries} == {
        (0o644, 0, 0, "", "", 0)
    }
    assert {(i.external_attr >> 16, i.date_time) for i in infos} == {(0o644, (1980, 1, 1, 0, 0, 0))}


@pytest.mark.parametrize("container", CONTAINERS)
def test_entries_go_to_the_disk_one_by_one(container: Container, tmp_path: Path) -> None:
    sizes = []

    def files() -> Iterator[tuple[str, bytes]]:
        for number in range(3):
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            yield f"{number}", os.urandom(1 << 20)

    write_archive(tmp_path / "a", files(), container)

    # By the third entry, most of the first has left the memory.
    assert sizes[2] > 1 << 19


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_archive_that_fails_half_way_leaves_nothing(
    container: Container, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="called `a`"):
        write_archive(tmp_path / "x", [("a", b"1"), ("a", b"2")], container)

    assert list(tmp_path.iterdir()) == []
