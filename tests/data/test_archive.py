"""Reading entries out of folders, zips, tars and data: URIs, safely."""

from __future__ import annotations

import base64
import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from grid import grid_bytes, write_folder, zip_bytes

from trainer.data import archive
from trainer.data.archive import BadEntry, open_source
from trainer.errors import InputError

Pack = Callable[[dict[str, bytes]], bytes]
FILES = {"b.png": b"second", "sub/a.png": b"first", "sub/deep/c.txt": b"words"}


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def contents(location: str) -> dict[str, bytes]:
    with open_source(location) as source:
        return {entry.name: source.read(entry.name) for entry in source.entries()}


def refusal(location: str | None) -> str:
    with pytest.raises(InputError) as error, open_source(location):
        pass
    assert {problem.field for problem in error.value.problems} == {"images_data_url"}
    return str(error.value)


def written(tmp_path: Path, content: bytes, name: str = "set.zip") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("set.zip", zip_bytes),
        ("set.tar", tar_bytes),
        ("set.tar.gz", lambda files: tar_bytes(files, "w:gz")),
        ("named_wrongly.bin", zip_bytes),
    ],
)
def test_every_archive_gives_the_same_entries_as_the_folder(
    tmp_path: Path, name: str, pack: Pack
) -> None:
    folder = write_folder(tmp_path / "folder", FILES)

    from_archive = contents(written(tmp_path, pack(FILES), name))

    assert from_archive == contents(str(folder)) == FILES


def test_a_data_uri_holds_an_archive() -> None:
    uri = "data:application/zip;base64," + base64.b64encode(zip_bytes(FILES)).decode()

    assert contents(uri) == FILES


def test_a_data_uri_holds_a_single_picture_that_can_be_read_twice() -> None:
    picture = grid_bytes()
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()

    with open_source(uri) as source:
        (entry,) = source.entries()
        assert source.read(entry.name) == source.read(entry.name) == picture


def test_entries_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    backwards = zip_bytes({"c.png": b"3", "b.png": b"2", "a.png": b"1"})

    assert list(contents(written(tmp_path, backwards))) == ["a.png", "b.png", "c.png"]


def test_equal_base_names_in_two_folders_are_both_kept(tmp_path: Path) -> None:
    files = {"a/1.jpg": b"one", "b/1.jpg": b"other"}

    assert contents(written(tmp_path, zip_bytes(files))) == files


def test_files_that_systems_leave_behind_are_not_entries(tmp_path: Path) -> None:
    junk = dict.fromkeys(
        ["__MACOSX/._a.png", ".DS_Store", "sub/Thumbs.db", ".hidden/b.png", "desktop.ini"], b"x"
    )
    files = {"a.png": b"picture"}

    assert contents(written(tmp_path, zip_bytes(junk | files))) == files
    assert contents(str(write_folder(tmp_path / "folder", junk | files))) == files


def test_names_from_windows_and_from_tar_of_a_folder_become_plain(tmp_path: Path) -> None:
    assert list(contents(written(tmp_path, zip_bytes({"sub\\a.png": b"x"})))) == ["sub/a.png"]
    assert list(contents(written(tmp_path, tar_bytes({"./a.png": b"x"})))) == ["a.png"]


@pytest.mark.parametrize("pack", [zip_bytes, tar_bytes])
@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"]
)
def test_a_path_that_leads_out_refuses_the_whole_archive(
    tmp_path: Path, pack: Pack, name: str
) -> None:
    message = refusal(written(tmp_path, pack({"good.jpg": b"x", name: b"evil"})))

    assert "unsafe path" in message
    assert name in message


def test_links_in_archives_are_left_out_by_name_and_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as packed:
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            packed.addfile(member)
        packed.addfile(tarfile.TarInfo("good.jpg"))
    link = zipfile.ZipInfo("soft.jpg")
    link.external_attr = 0o120777 << 16
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as packed_zip:
        packed_zip.writestr(link, str(secret))
        packed_zip.writestr("good.jpg", b"")

    for content, left_out in (
        (tar.getvalue(), ["soft.jpg", "hard.jpg"]),
        (zipped.getvalue(), ["soft.jpg"]),
    ):
        with open_source(written(tmp_path, content)) as source:
            assert [entry.name for entry in source.entries()] == ["good.jpg"]
            assert [note.message.split("`")[1] for note in source.notes] == left_out


def test_a_folder_reads_linked_files_but_no_pipe_broken_link_or_linked_folder(
    tmp_path: Path,
) -> None:
    outside = write_folder(tmp_path / "outside", {"x.png": b"x"})
    folder = write_folder(tmp_path / "folder", {"a.png": b"a"})
    (folder / "linked.png").symlink_to(outside / "x.png")
    (folder / "broken.png").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")

    with open_source(str(folder)) as source:
        assert {e.name: source.read(e.name) for e in source.entries()} == {
            "a.png": b"a",
            "linked.png": b"x",
        }
        assert len(source.notes) == 3


def test_reading_leaves_the_users_folder_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", FILES)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))

    contents(str(folder))

    assert sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


@pytest.mark.parametrize("mode", ["zip", "gz"])
def test_what_unpacks_to_more_than_200_times_its_size_is_refused(tmp_path: Path, mode: str) -> None:
    zeros = {"bomb.png": bytes(4 * 2**20)}
    content = zip_bytes(zeros) if mode == "zip" else tar_bytes(zeros, "w:gz")

    assert "200 times" in refusal(written(tmp_path, content))


def test_small_entries_may_shrink_as_they_like(tmp_path: Path) -> None:
    flat = {"flat.bmp": bytes(2**20)}

    assert contents(written(tmp_path, zip_bytes(flat))) == flat


def test_an_archive_that_lies_about_a_size_gives_no_content(tmp_path: Path) -> None:
    content = bytearray(zip_bytes({"a.png": b"x" * 1000, "b.png": b"good"}))
    # The uncompressed size stands 24 bytes into the first entry of the central directory.
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 10)

    with open_source(written(tmp_path, bytes(content))) as source:
        with pytest.raises(BadEntry):
            source.read("a.png")
        assert source.read("b.png") == b"good"


def test_a_damaged_entry_leaves_the_others_readable(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("bad.png", b"damaged content")
        zipped.writestr("good.png", b"good")
    content = packed.getvalue().replace(b"damaged content", b"DAMAGED content")

    with open_source(written(tmp_path, content)) as source:
        with pytest.raises(BadEntry, match="damaged"):
            source.read("bad.png")
        assert source.read("good.png") == b"good"


def test_the_number_of_entries_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    names = [f"{number}.png" for number in range(4)]

    assert len(contents(written(tmp_path, zip_bytes(dict.fromkeys(names[:3], b"x"))))) == 3
    assert "more than 3 files" in refusal(written(tmp_path, zip_bytes(dict.fromkeys(names, b"x"))))


def test_the_declared_bytes_of_all_entries_are_bounded(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "huge.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = 5 * 2**30
        tar.addfile(member)

    assert "more than 4 GiB" in refusal(str(tmp_path / "huge.tar"))


def test_a_tar_header_cannot_ask_for_unreasonable_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 3 * 2**30
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)

    assert "a header asks for" in refusal(written(tmp_path, content, "set.tar"))


def test_a_name_that_comes_twice_is_used_once_and_said(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("a.png", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            zipped.writestr("a.png", b"second")

    with open_source(written(tmp_path, packed.getvalue())) as source:
        assert source.read("a.png") == b"first"
        assert ["twice" in note.message for note in source.notes] == [True]


def test_a_password_protected_zip_is_refused(tmp_path: Path) -> None:
    content = bytearray(zip_bytes({"a.jpg": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1

    assert "password-protected (`a.jpg`)" in refusal(written(tmp_path, bytes(content)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (0 bytes)"),
        (b"Rar!\x1a\x07", "is a RAR archive"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"nothing known", "is neither an archive nor a picture"),
        (zip_bytes({"a.png": bytes(range(256)) * 9})[:-40], "cut off or damaged"),
        (tar_bytes({"a.png": bytes(9000)})[:2000], "cut off or damaged"),
        (tar_bytes({"a.png": os.urandom(9000)}, "w:gz")[:-400], "cut off or damaged"),
        (tar_bytes({"a.png": b"a", "b.png": b"b"})[:1024] + b"x" * 1024, "cut off or damaged"),
        (zip_bytes({}), "holds no files"),
        (zip_bytes({"__MACOSX/._a": b"x", ".DS_Store": b"x"}), "holds no files"),
    ],
)
def test_what_is_no_archive_is_refused_with_its_reason(
    tmp_path: Path, content: bytes, says: str
) -> None:
    assert says in refusal(written(tmp_path, content))


@pytest.mark.parametrize(
    ("location", "says"),
    [
        (None, "is required"),
        ("/nowhere/set.zip", "`/nowhere/set.zip` does not exist"),
        ("https://example.com/set.zip", "URLs are not available yet"),
        ("s3://bucket/set.zip", "only local paths"),
        ("/dev/null", "is not a file"),
        ("a\0b", "cannot be read"),
        ("UEsDB" * 2000, "cannot be read"),
        ("data:application/zip;base64", "has no comma"),
        ("data:application/zip;base64,AAAA!AAA", "damaged at character 4"),
        ("data:application/zip;base64,AAAAA", "cut off or damaged"),
        ("data:application/zip;base64,", "is empty"),
    ],
)
def test_a_location_that_cannot_be_used_is_refused_with_its_reason(
    location: str | None, says: str
) -> None:
    assert says in refusal(location)


def test_a_message_does_not_repeat_a_whole_data_uri() -> None:
    assert len(refusal("data:application/zip;base64," + "A" * 100_000)) < 400
