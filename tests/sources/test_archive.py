"""Reading entries out of folders, zips, tars and data: URIs, safely."""

from __future__ import annotations

import base64
import io
import os
import resource
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grid import encoded, grid_bytes, grid_image, write_folder, zip_bytes

from trainer.errors import DiskError, InputError
from trainer.sources import archive
from trainer.sources.archive import BadEntry, open_source

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


def state(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """Every file and folder below: name, mode, time of change and content."""
    return [
        (str(p), p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    ]


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


def test_reading_leaves_what_the_user_has_as_it_was(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", FILES)
    packed = {
        "set.zip": zip_bytes(FILES),
        "set.tar": tar_bytes(FILES),
        "set.tar.gz": tar_bytes(FILES, "w:gz"),
    }
    write_folder(tmp_path, packed)
    before = state(tmp_path)

    for name in ("folder", *packed):
        assert contents(str(tmp_path / name)) == FILES

    assert state(tmp_path) == before


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
    member = tarfile.TarInfo("a.png")
    member.size = 5 * 2**30
    with open(tmp_path / "huge.tar", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(member.size + 10_240)

    assert "more than 4 GiB" in refusal(str(tmp_path / "huge.tar"))


def test_the_unpacked_bytes_of_a_packed_tar_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 2**20)
    content = tar_bytes({"a.png": os.urandom(2**21)}, "w:gz")

    assert "unpacks to more than" in refusal(written(tmp_path, content))


def test_a_tar_header_cannot_ask_for_unreasonable_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 3 * 2**30
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)

    assert "a header asks for" in refusal(written(tmp_path, content, "set.tar"))


def test_a_zip_directory_cannot_ask_for_unreasonable_memory(tmp_path: Path) -> None:
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 16)
    directory = entry * (5 * 2**20 // len(entry))
    count, size = len(directory) // len(entry), len(directory)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, size, 4, 0)

    message = refusal(written(tmp_path, b"PK\x03\x04" + directory + end))

    assert f"a header asks for {size} bytes" in message


def test_a_large_zip_entry_is_read_whole(tmp_path: Path) -> None:
    packed = io.BytesIO()
    large = os.urandom(6 * 2**20)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("a.png", large)

    assert contents(written(tmp_path, packed.getvalue())) == {"a.png": large}


def test_links_and_folders_are_counted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(11):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)

    assert "more than 10 files" in refusal(written(tmp_path, content.getvalue()))


def test_a_full_temporary_folder_is_told_by_its_name(tmp_path: Path) -> None:
    location = written(tmp_path, tar_bytes({"a.png": os.urandom(3 * 2**20)}, "w:gz"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(DiskError) as error, open_source(location):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert f"could not be written in `{tempfile.gettempdir()}`" in error.value.message
    assert "TMPDIR" in error.value.hint


def test_unpacking_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = written(tmp_path, tar_bytes(FILES, "w:gz"))
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))

    with open_source(location) as source:
        assert source.read("b.png") == b"second"
        assert list(room.iterdir()) == []


def test_a_temporary_folder_that_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = written(tmp_path, tar_bytes(FILES, "w:gz"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(DiskError, match="temporary files"), open_source(location):
        pass


@pytest.mark.parametrize(
    "pack", [zip_bytes, tar_bytes, lambda files: tar_bytes(files, "w:gz")], ids=["zip", "tar", "gz"]
)
def test_a_downloaded_archive_gives_the_same_entries(tmp_path: Path, pack: Pack) -> None:
    file = Path(written(tmp_path, pack(FILES), "download-0"))

    with open_source("https://a.example/set.zip?key=secret", file) as source:
        assert {entry.name: source.read(entry.name) for entry in source.entries()} == FILES
        assert source.label == "https://a.example/set.zip"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://a.example/sub/My%20photo.JPG?key=secret", "My photo.JPG"),
        ("https://a.example/download.php?id=1", "download"),
        ("https://a.example/", "image"),
        ("https://a.example", "image"),
        ("https://a.example/..%2f..%2f.hidden.png", "hidden.png"),
        ("https://a.example/..%2F..", "image"),
    ],
)
def test_a_downloaded_picture_has_the_name_of_its_address(
    tmp_path: Path, url: str, name: str
) -> None:
    file = Path(written(tmp_path, grid_bytes(), "download-0"))

    with open_source(url, file) as source:
        assert [entry.name for entry in source.entries()] == [name]


def test_what_is_wrong_with_a_download_is_told_without_its_key(tmp_path: Path) -> None:
    file = Path(written(tmp_path, b"<!DOCTYPE html><html>", "download-0"))

    with (
        pytest.raises(InputError, match="is a web page") as error,
        open_source("https://a.example/set.zip?key=secret", file),
    ):
        pass

    assert "secret" not in str(error.value)


def test_bare_base64_holds_an_archive() -> None:
    assert contents(base64.b64encode(zip_bytes(FILES)).decode()) == FILES


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
        (tar_bytes({"a.png": b"a"}, "w:bz2"), "packed with bzip2"),
        (tar_bytes({"a.png": b"a"}, "w:xz"), "packed with xz"),
        (b"\x28\xb5\x2f\xfd", "packed with zstd"),
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
        ("file:///home/set.zip", "file:// is not read"),
        ("s3://bucket/set.zip", "only local paths"),
        ("/dev/null", "is not a file"),
        ("a\0b", "cannot be read"),
        ("UEsDB" * 2000, "is neither an archive nor a picture"),
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


@pytest.mark.parametrize("name", ["BMW/1.jpg", "BM.jpg", "GIF8/1.jpg"])
def test_a_tar_archive_whose_first_name_starts_like_a_picture_is_an_archive(
    tmp_path: Path, name: str
) -> None:
    files = {name: b"first", "b.jpg": b"second"}

    assert contents(written(tmp_path, tar_bytes(files), "cars.tar")) == files


def test_a_bitmap_is_a_picture_still(tmp_path: Path) -> None:
    picture = encoded(grid_image(40, 40), "BMP")

    assert contents(written(tmp_path, picture, "a.bmp")) == {"a.bmp": picture}


def test_a_zip_entry_without_a_name_is_left_out(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("a.jpg", b"good")
        nameless = zipfile.ZipInfo("x")
        nameless.filename = ""
        zipped.writestr(nameless, b"x")

    with open_source(written(tmp_path, packed.getvalue())) as source:
        assert [entry.name for entry in source.entries()] == ["a.jpg"]
        assert [note.message for note in source.notes] == ["`.` is left out, it has no name"]


def test_a_tar_member_without_a_name_is_left_out(tmp_path: Path) -> None:
    files = {".": b"x", "a.jpg": b"good"}

    assert contents(written(tmp_path, tar_bytes(files), "set.tar")) == {"a.jpg": b"good"}


def test_a_zip_entry_whose_second_name_is_no_utf8_is_left_out_alone(tmp_path: Path) -> None:
    content = bytearray(zip_bytes({"ä.jpg": b"x", "b.jpg": b"good"}))
    # The name stands 30 bytes into the header in front of the content.
    content[30:32] = b"\xff\xfe"

    with open_source(written(tmp_path, bytes(content))) as source:
        with pytest.raises(BadEntry, match="damaged"):
            source.read("ä.jpg")
        assert source.read("b.jpg") == b"good"


def test_an_entry_before_the_beginning_of_a_data_uri_is_left_out_alone() -> None:
    content = bytearray(zip_bytes({"a.jpg": b"x", "b.jpg": b"good"}))
    # zipfile takes a directory that starts later than said for bytes in front of the archive.
    end = content.index(b"PK\x05\x06") + 16
    start = struct.unpack_from("<I", content, end)[0]
    struct.pack_into("<I", content, end, start + 50)

    place = "data:;base64," + base64.b64encode(content).decode()
    with open_source(place) as source, pytest.raises(BadEntry, match="damaged"):
        source.read("a.jpg")


def test_a_chain_of_tar_headers_without_a_file_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 3
    link = header.tobuf(tarfile.GNU_FORMAT) + b"ab\0".ljust(512, b"\0")
    content = link * 2000 + tar_bytes({"a.jpg": b"x"})

    assert "headers follow each other" in refusal(written(tmp_path, content, "set.tar"))


@pytest.mark.parametrize("length", [3, 4, 10])
def test_the_first_bytes_of_a_gzip_file_are_cut_off(tmp_path: Path, length: int) -> None:
    content = tar_bytes(FILES, "w:gz")[:length]

    assert "cut off or damaged" in refusal(written(tmp_path, content, "set.tar.gz"))


def test_a_sparse_tar_member_is_left_out_by_name(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        sparse = tarfile.TarInfo("a.jpg")
        sparse.pax_headers = {"GNU.sparse.size": str(2**29), "GNU.sparse.map": f"{2**29},0"}
        tar.addfile(sparse)
        tar.addfile(tarfile.TarInfo("b.jpg"))

    with open_source(written(tmp_path, content.getvalue(), "set.tar")) as source:
        assert [entry.name for entry in source.entries()] == ["b.jpg"]
        assert ["sparse" in note.message for note in source.notes] == [True]


def test_why_every_file_of_an_archive_is_left_out_is_told(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
    content = link.tobuf(tarfile.GNU_FORMAT) + bytes(1024)

    message = refusal(written(tmp_path, content, "set.tar"))

    assert "holds no files; `a.jpg` is left out, links" in message


@pytest.mark.parametrize("size", [2**20, -512, -1024])
def test_a_tar_member_that_cannot_be_in_the_archive_is_refused(tmp_path: Path, size: int) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    # Numbers may be written in base 256; the checksum is taken with blanks in its own place.
    header[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    header[124] = 0xFF if size < 0 else 0x80
    if size > 0:
        header[125:128] = bytes(3)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content = tar_bytes({"ok.jpg": b"abc"})[:1024] + bytes(header) + bytes(1024)

    message = refusal(written(tmp_path, content, "set.tar"))

    assert f"`a.jpg` is said to be {size} bytes" in message


@pytest.fixture
def _without_privileges() -> Iterator[None]:
    """As a user whom permissions hold, also where the tests run as one whom they do not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_is_listed_but_not_entered_is_left_out_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = write_folder(
        tmp_path / "set", {"a.png": b"a", "shut/b.png": b"b", "shut/c/d.png": b""}
    )
    tmp_path.chmod(0o755)
    (folder / "shut").chmod(0o444)
    monkeypatch.chdir(tmp_path)
    request.getfixturevalue("_without_privileges")

    with open_source("set") as source:
        assert [entry.name for entry in source.entries()] == ["a.png"]
        left_out = [note.message for note in source.notes]

    assert left_out == [
        "`shut/b.png` is left out, it cannot be read: Permission denied",
        "`shut/c` is left out, it cannot be read: Permission denied",
    ]
    monkeypatch.undo()


@pytest.mark.parametrize("pack", [None, zip_bytes])
def test_two_spellings_of_one_name_are_not_called_twice_the_same(
    tmp_path: Path, pack: Pack | None
) -> None:
    files = {unicodedata.normalize(form, "ä.png"): form.encode() for form in ("NFC", "NFD")}
    place = str(write_folder(tmp_path / "set", files))
    if pack is not None:
        place = written(tmp_path, pack(files))

    with open_source(place) as source:
        assert len(source.entries()) == 1
        (note,) = source.notes

    assert "there twice, its name spelled in two ways" in note.message


@pytest.mark.parametrize(
    ("name", "shown"),
    [(".cap.jpg", "cap.jpg"), ("..\\a.jpg", "a.jpg"), ("a.JPG", "a.JPG"), ("photo.dat", "photo")],
)
def test_a_picture_given_by_itself_is_never_hidden(tmp_path: Path, name: str, shown: str) -> None:
    assert contents(written(tmp_path, grid_bytes(), name)) == {shown: grid_bytes()}


@pytest.mark.parametrize("name", ["..\\a.jpg", "C:\\a.jpg", "\\a.jpg"])
def test_a_name_from_another_system_does_not_refuse_a_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "set", {name: b"x", "b.jpg": b"good"})

    with open_source(str(folder)) as source:
        assert [entry.name for entry in source.entries()] == ["b.jpg"]
        assert [note.message.split("`")[1] for note in source.notes] == [name]
