"""Uploads and results: random ids, tokens good once, nothing in part, limits while it streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trainer.job import ResultFile
from trainer.server.database import Database
from trainer.server.files import (
    SCHEMA,
    UPLOAD_SECONDS,
    FileStore,
    NotExpected,
    StoredFile,
    TooLarge,
    safe_name,
)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(Database(tmp_path / "db", SCHEMA), tmp_path / "files")


async def chunks(*contents: bytes) -> AsyncIterator[bytes]:
    for content in contents:
        yield content


def upload(
    store: FileStore, file: StoredFile, token: str, *contents: bytes, limit: int = 100
) -> StoredFile:
    return asyncio.run(store.take(file.id, token, chunks(*contents), limit=limit))


def left_over(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.temporary().parent.iterdir())


def test_an_upload_is_there_as_it_was_sent(store: FileStore) -> None:
    file, token = store.expect("photos.zip", "application/zip")

    there = upload(store, file, token, b"ab", b"cd")

    assert there.path.read_bytes() == b"abcd"
    assert (there.size, there.content_type, there.is_expected) == (4, "application/zip", False)


def test_a_token_is_good_once(store: FileStore) -> None:
    file, token = store.expect("a", "image/png")
    upload(store, file, token, b"first")

    with pytest.raises(NotExpected):
        upload(store, file, token, b"second")

    assert file.path.read_bytes() == b"first"


def test_of_two_uploads_at_once_under_one_token_one_is_taken_and_none_replaced(
    store: FileStore,
) -> None:
    file, token = store.expect("a", "image/png")

    async def work() -> list[StoredFile | BaseException]:
        both = asyncio.Barrier(2)

        async def content(letter: bytes) -> AsyncIterator[bytes]:
            await both.wait()
            yield letter * 9

        return await asyncio.gather(
            *(store.take(file.id, token, content(letter), limit=9) for letter in (b"a", b"b")),
            return_exceptions=True,
        )

    first = asyncio.run(work())

    assert sorted(isinstance(answer, NotExpected) for answer in first) == [False, True]
    taken = b"a" if isinstance(first[1], NotExpected) else b"b"
    assert file.path.read_bytes() == taken * 9
    assert len(left_over(store)) == 1


def test_where_an_upload_lies_does_not_tell_its_id(store: FileStore) -> None:
    file, _ = store.expect("me.zip", "application/zip")

    assert file.path.name == "me.zip"
    assert file.id not in str(file.path)


def test_a_wrong_token_writes_nothing(store: FileStore) -> None:
    file, _ = store.expect("a", "image/png")

    with pytest.raises(NotExpected):
        upload(store, file, "guess", b"x")

    assert left_over(store) == []


def test_a_token_is_good_for_a_while_only(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, token = store.expect("a", "image/png")
    later = time.time() + UPLOAD_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)

    with pytest.raises(NotExpected):
        upload(store, file, token, b"x")


def test_more_than_the_limit_is_refused_while_it_comes_and_leaves_nothing(store: FileStore) -> None:
    file, token = store.expect("a", "image/png")

    with pytest.raises(TooLarge):
        upload(store, file, token, b"x" * 60, b"x" * 60)

    assert left_over(store) == []


def test_exactly_the_limit_is_taken(store: FileStore) -> None:
    file, token = store.expect("a", "image/png")

    assert upload(store, file, token, b"x" * 100).size == 100


def test_ids_are_random_and_long(store: FileStore) -> None:
    ids = {store.expect("a", "image/png")[0].id for _ in range(20)}

    assert len(ids) == 20
    assert {len(id) for id in ids} == {32}, "128 bits in hexadecimal digits"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("photo 1.jpg", "photo-1.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\a\\b.png", "b.png"),
        (".hidden", "hidden"),
        ("<script>.svg", "script-.svg"),
        ("..", "file"),
        ("", "file"),
        ("ü.png", "png"),
        ("a" * 300 + ".zip", "a" * 116 + ".zip"),
    ],
)
def test_a_name_means_nothing_to_any_system(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@pytest.mark.parametrize("content_type", ["text/html\r\nX: y", "nonsense", "a/b; charset=x"])
def test_a_content_type_that_is_none_is_not_repeated(store: FileStore, content_type: str) -> None:
    assert store.expect("a", content_type)[0].content_type == "application/octet-stream"


def test_the_same_content_of_requests_is_kept_once(store: FileStore) -> None:
    first = store.keep(b"zip", "file_data")
    again = store.keep(b"zip", "file_data")

    assert first == again
    assert first.read_bytes() == b"zip"
    assert left_over(store) == [first.name]


def test_results_keep_their_ids_however_often_they_are_registered(
    store: FileStore, tmp_path: Path
) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    result = ResultFile(
        role="kohya_lora",
        path="lora.safetensors",
        size=1,
        sha256="",
        content_type="application/octet-stream",
    )

    store.register("job", tmp_path, [result])
    before = store.of_job("job")
    store.register("job", tmp_path, [result])

    assert store.of_job("job") == before
    assert [(file.role, file.path) for file in before] == [
        ("kohya_lora", tmp_path / "lora.safetensors")
    ]


def test_old_uploads_go_unless_a_job_works_on_them(store: FileStore) -> None:
    used, unused = store.keep(b"used", "a"), store.keep(b"unused", "b")

    removed = store.remove_uploads_before(time.time() + 1, used=[f"images_data_url: {used}"])

    assert removed == 1
    assert (used.exists(), unused.exists()) == (True, False)


def test_what_a_crash_left_of_uploads_is_swept_away(store: FileStore) -> None:
    store.temporary().write_bytes(b"half")

    store.sweep()

    assert left_over(store) == []
