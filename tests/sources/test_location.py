"""Telling paths, web addresses, data: URIs and base64 apart, and reading captions files."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
from grid import grid_bytes, zip_bytes

from trainer.errors import InputError
from trainer.locations import content_of, is_web_address, shown_location
from trainer.sources import location
from trainer.sources.location import local_path, read_captions_file

FIELD = "images_data_url"
LONG = bytes(range(256))
NOISE = random.Random(7).randbytes(40_000)
CAPTIONS = b'{"file_name": "a.jpg", "text": "TOK"}\n'


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def refusal(text: str) -> str:
    """Why a location cannot be used, be it on its way to a path or to a content."""
    with pytest.raises(InputError) as error:
        assert local_path(text, FIELD) is None
        content_of(text, FIELD)
    assert all(problem.field == FIELD and problem.hint for problem in error.value.problems)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "is_web"),
    [
        ("http://a.example/x", True),
        ("HTTPS://A.example", True),
        ("/http://a.example", False),
        ("data:text/plain,http://", False),
        ("ftp://a.example", False),
        ("https", False),
    ],
)
def test_http_and_https_addresses_are_web_addresses(text: str, is_web: bool) -> None:
    assert is_web_address(text) is is_web


@pytest.mark.parametrize("text", ["https://a.example/x.zip", "data:,x", base64_of(grid_bytes())])
def test_what_is_not_on_this_disk_has_no_local_path(text: str) -> None:
    assert local_path(text, FIELD) is None


def test_a_path_is_a_path_though_its_name_is_base64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = base64_of(b"PK\x03\x04" + b"x" * 41)[:60].replace("/", "x")
    (tmp_path / name).mkdir()

    assert local_path(name, FIELD) == Path(name)


def test_a_path_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()

    assert local_path("~/photos", FIELD) == tmp_path / "photos"


@pytest.mark.parametrize(
    "content",
    [zip_bytes({"a.png": LONG}), zip_bytes({}), grid_bytes(), b"\xff\xd8\xff" + LONG],
    ids=["zip", "short zip", "png", "jpeg"],
)
def test_base64_of_an_archive_or_picture_is_that_content(content: bytes) -> None:
    text = base64_of(content)

    assert local_path(text, FIELD) is None
    assert content_of(text, FIELD) == content


def test_base64_may_be_broken_into_lines() -> None:
    content = zip_bytes({"a.png": NOISE})
    text = base64.encodebytes(content).decode()

    assert "\n" in text[:100]
    assert local_path(text, FIELD) is None
    assert content_of(text, FIELD) == content


def test_long_base64_of_anything_is_decoded() -> None:
    text = base64_of(b"what this is, its reader says" * 20)

    assert local_path(text, FIELD) is None
    assert content_of(text, FIELD) == b"what this is, its reader says" * 20


@pytest.mark.parametrize(
    "path",
    [
        "photos",
        "my photos/set.zip",
        "/nowhere/set.zip",
        "UEsDBBQA",
        "Qk12",
        "H4sI/Qk12/photos",
        "/9j/photos",
        "/nowhere/" + "photos/" * 40,
        "~/" + "photos/" * 40,
        "nowhere/of/" + "a.b/" * 60,
    ],
)
def test_a_mistyped_path_does_not_exist_whatever_it_decodes_to(path: str) -> None:
    assert "does not exist" in refusal(path)


def test_damaged_base64_is_told_with_its_place() -> None:
    text = base64_of(zip_bytes({"a.png": NOISE}))
    damaged = text[:48213] + "!" + text[48214:]

    assert len(text) > 48213
    assert "the base64 text is damaged at character 48213" in refusal(damaged)


def test_the_place_in_wrapped_base64_is_the_one_in_the_text_as_it_was_given() -> None:
    text = base64.encodebytes(zip_bytes({"a.png": NOISE})).decode()
    place = text.index("\n", 5000) + 7
    damaged = text[:place] + "!" + text[place + 1 :]

    assert f"damaged at character {place}" in refusal(damaged)
    assert f"damaged at character {place}" in refusal(f"data:;base64,{damaged}")


def test_base64_that_is_cut_off_is_told() -> None:
    text = base64_of(zip_bytes({"a.png": NOISE}))

    assert "cut off or damaged" in refusal(text[:-3])


def test_the_base64_of_a_data_uri_is_checked_alike() -> None:
    uri = "data:application/zip;base64,"

    assert content_of(uri + "UEsDBA==", FIELD) == b"PK\x03\x04"
    assert content_of("data:text/plain,a%20b", FIELD) == b"a b"
    assert "data: URI is damaged at character 2" in refusal(uri + "UE?DBA==")
    assert "has no comma" in refusal("data:application/zip;base64")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file:///home/me/photos", "file:// is not read"),
        ("FILE:///home/me/photos", "file:// is not read"),
        ("s3://bucket/set.zip", "only local paths, http(s) URLs and data: URIs"),
        ("a\0b", "cannot be read"),
        ("no such words " * 1000, "no base64 text"),
    ],
)
def test_another_kind_of_location_is_refused(text: str, says: str) -> None:
    assert says in refusal(text)


def test_no_message_repeats_a_long_location() -> None:
    assert len(refusal("A" * 10_000 + "!")) < 400
    assert len(refusal("no/such/path " * 250)) < 400
    assert len(shown_location("A" * 10_000)) < 50


def test_an_address_is_shown_without_its_key() -> None:
    assert shown_location("https://a.example/x.zip?key=secret") == "https://a.example/x.zip"


def test_a_captions_file_is_read_from_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_bytes(CAPTIONS)

    assert read_captions_file(str(path)) == CAPTIONS
    assert read_captions_file(f"data:;base64,{base64_of(CAPTIONS)}") == CAPTIONS
    assert read_captions_file("https://a.example/captions.jsonl", path) == CAPTIONS


def test_a_captions_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_bytes(CAPTIONS)
    monkeypatch.setattr(location, "MAX_CAPTIONS_BYTES", len(CAPTIONS) - 1)

    with pytest.raises(InputError, match="larger than") as error:
        read_captions_file(str(path))

    assert [problem.field for problem in error.value.problems] == ["captions_file_url"]


def test_a_captions_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_captions_file(str(tmp_path))
