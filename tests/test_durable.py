"""Writing leaves the old state or the new one, and says what is wrong with the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import durable
from trainer.errors import DiskError

# Writes more than the size limit allows: a real error of the operating system.
FILL = """
import resource, sys
from pathlib import Path
from trainer import durable
from trainer.errors import DiskError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    durable.write_bytes(Path(sys.argv[1]), b"x" * 5000)
except DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "a.txt", "old and long")
    durable.write_text(tmp_path / "a.txt", "new ü")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new ü"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    durable.write_chunks(tmp_path / "b" / "c" / "a.bin", [b"one", b"two"])
    assert (tmp_path / "b" / "c" / "a.bin").read_bytes() == b"onetwo"


def test_content_that_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise ZeroDivisionError

    durable.write_bytes(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError):
        durable.write_chunks(tmp_path / "a", chunks())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_a_disk_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    command = [sys.executable, "-c", FILL, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert str(tmp_path / "a") in done.stdout
    assert "file size limit" in done.stdout
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "the folder may not be written to"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_reason_is_said_in_words(number: int, reason: str) -> None:
    with (
        pytest.raises(DiskError, match=f"`/out/x` could not be written: {reason}"),
        durable.disk_errors(Path("/out/x")),
    ):
        raise OSError(number, os.strerror(number))


def test_a_path_below_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="Not a directory|File exists"):
        durable.write_text(tmp_path / "file" / "x", "")


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        durable.write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_folder_gets_its_name_with_everything_in_it(tmp_path: Path) -> None:
    temporary = durable.fresh_folder(tmp_path / ".tmp-1")
    durable.write_text(temporary / "inner" / "a", "1")
    durable.publish_folder(temporary, tmp_path / "step-1")
    assert (tmp_path / "step-1" / "inner" / "a").read_text() == "1"
    assert not temporary.exists()


def test_a_name_that_is_taken_is_a_disk_error_and_both_stay(tmp_path: Path) -> None:
    temporary = durable.fresh_folder(tmp_path / ".tmp-1")
    durable.write_text(tmp_path / "step-1" / "a", "old")
    with pytest.raises(DiskError):
        durable.publish_folder(temporary, tmp_path / "step-1")
    assert (tmp_path / "step-1" / "a").read_text() == "old"


def replacing(folder: Path) -> None:
    temporary = durable.fresh_folder(folder / ".tmp-1")
    durable.write_text(temporary / "inner" / "a", "new")
    durable.replace_folder(temporary, folder / "outputs")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_is_replaced_whole(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        durable.write_text(tmp_path / "outputs" / "a", "old")
        # Of an earlier crash.
        durable.write_text(tmp_path / ".tmp-old-outputs" / "a", "older")
    replacing(tmp_path)
    assert (tmp_path / "outputs" / "inner" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["inner"]


@pytest.mark.parametrize("which", range(3))
def test_a_crash_at_any_rename_of_replacing_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    durable.write_text(tmp_path / "outputs" / "a", "old")
    calls, real = [0], os.rename

    def rename(source: Path, target: Path) -> None:
        if calls[0] == which:
            raise KeyboardInterrupt
        calls[0] += 1
        real(source, target)

    with monkeypatch.context() as broken, contextlib.suppress(KeyboardInterrupt):
        broken.setattr(os, "rename", rename)
        replacing(tmp_path)
    durable.put_back(tmp_path / "outputs")

    left = tmp_path / "outputs"
    found = {path.relative_to(left).as_posix(): path.read_text() for path in left.rglob("a")}
    assert found == ({"a": "old"} if which < 2 else {"inner/a": "new"})


def test_a_folder_that_cannot_take_a_name_leaves_it_to_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.write_text(tmp_path / "outputs" / "a", "old")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name == ".tmp-1":
            raise OSError(errno.ENOSPC, "")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(DiskError, match="the disk is full"):
        replacing(tmp_path)
    assert (tmp_path / "outputs" / "a").read_text() == "old"


def test_a_fresh_folder_is_empty_whatever_stood_there(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "x" / "old", "")
    assert list(durable.fresh_folder(tmp_path / "x").iterdir()) == []


def test_a_removed_folder_leaves_nothing(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "x" / "old", "")
    durable.write_text(tmp_path / ".tmp-old-x" / "from a crash", "")
    durable.remove_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append(f"name {Path(target).name}")
        real_rename(source, target)

    temporary = durable.fresh_folder(tmp_path / ".tmp-1")
    (temporary / "a").write_text("1")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    durable.publish_folder(temporary, tmp_path / "step-1")
    assert calls == ["sync a", "sync .tmp-1", "name step-1", f"sync {tmp_path.name}"]


def test_a_finished_file_gets_its_name_in_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a").write_bytes(b"new")
    (tmp_path / "a").write_bytes(b"old")

    durable.publish_file(tmp_path / ".tmp-a", tmp_path / "a")

    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


def test_a_finished_file_that_is_gone_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="could not be written"):
        durable.publish_file(tmp_path / ".tmp-a", tmp_path / "a")


# Makes a folder as a user without rights of its own.
AS_ANYBODY = """
import os, sys
from pathlib import Path
from trainer import durable
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
durable.make_folder(Path(sys.argv[1]))
"""


def test_a_folder_is_made_in_one_that_can_be_written_to_and_not_read() -> None:
    # Below pytest's own folder nobody else may look.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o711)
        parent = Path(place) / "drop"
        parent.mkdir()
        parent.chmod(0o333)
        command = [sys.executable, "-c", AS_ANYBODY, str(parent / "runs" / "me")]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent.parent,
        )
        assert done.returncode == 0, done.stderr
        parent.chmod(0o755)
        assert (parent / "runs" / "me").is_dir()
