"""fal's storage: files come whole or in parts, under tokens, and are there whole or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeServer
from running import settled_room
from starlette.testclient import TestClient

from trainer.server.database import Database
from trainer.server.files import SCHEMA, FileStore, TooLarge
from trainer.server.parts import Parts
from trainer.server.room import Room

JSON = {"file_name": "me.zip", "content_type": "application/zip"}


def initiated(server: TestClient, kind: str = "initiate") -> tuple[str, str]:
    answer = server.post(f"/storage/upload/{kind}?storage_type=fal-cdn-v3", json=JSON)
    assert answer.status_code == 200
    return answer.json()["upload_url"], answer.json()["file_url"]


def part_url(upload_url: str, last: str) -> str:
    """As JavaScript's client makes it: the query stays at the end."""
    path, _, query = upload_url.partition("?")
    return f"{path}/{last}?{query}"


def put_part(server: TestClient, upload_url: str, number: int, content: bytes) -> dict[str, Any]:
    answer = server.put(part_url(upload_url, str(number)), content=content)
    assert answer.status_code == 200
    # One client reads the header, the other one the body.
    assert answer.headers["etag"] == f'"{answer.json()["etag"]}"'
    part: dict[str, Any] = answer.json()
    return part


def test_a_token_ends_at_a_moment_that_python_can_compare(server: TestClient) -> None:
    answer = server.post("/storage/auth/token?storage_type=fal-cdn-v3", json={}).json()
    expires = datetime.fromisoformat(answer["expires_at"])

    # A moment without its offset cannot be compared with this one at all.
    assert timedelta(minutes=30) < expires - datetime.now(UTC) < timedelta(days=1)
    assert answer["token"]
    assert (answer["token_type"], answer["base_url"]) == ("Bearer", "http://127.0.0.1:8700")


def test_a_token_uploads_for_a_while_and_holds_no_key(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(keys=("id:secret",))
    headers = {"Authorization": "Key id:secret"}
    answer = server.post("/storage/auth/token", json={}, headers=headers)
    bearer = {"Authorization": f"Bearer {answer.json()['token']}"}
    longer = {"Authorization": f"Bearer 9{answer.json()['token']}"}

    def uploaded(path: str, headers: dict[str, str]) -> int:
        return server.post(path, content=b"x", headers=headers).status_code

    assert "secret" not in answer.text
    for path in ("/files/upload", "/files/upload/multipart"):
        assert [uploaded(path, h) for h in (headers, bearer, longer, {})] == [200, 200, 401, 401]
    # A token is for uploads alone.
    assert server.post("/storage/auth/token", json={}, headers=bearer).status_code == 401
    now = time.time()
    monkeypatch.setattr("trainer.server.fal.storage.time.time", lambda: now + 3700)
    assert uploaded("/files/upload", bearer) == 401


def test_a_file_in_the_body_is_uploaded_as_it_is(server: TestClient) -> None:
    headers = {"X-Fal-File-Name": "../me.zip", "Content-Type": "application/zip"}
    url = server.post("/files/upload", content=b"zip", headers=headers).json()["access_url"]
    fetched = server.get(url)

    assert url.startswith("http://127.0.0.1:8700/files/")
    assert url.endswith("/me.zip")
    assert (fetched.content, fetched.headers["content-type"]) == (b"zip", "application/zip")


def test_an_upload_url_is_absolute_and_good_once_without_a_key(make_server: MakeServer) -> None:
    server = make_server(keys=("secret",))
    server.headers["Authorization"] = "Key secret"
    upload_url, file_url = initiated(server)
    del server.headers["Authorization"]

    assert server.get(file_url).status_code == 404
    assert server.put(upload_url.replace("token=", "token=x"), content=b"a").status_code == 403
    assert server.put(upload_url, content=b"zip").status_code == 200
    assert server.put(upload_url, content=b"other").status_code == 403
    assert server.get(file_url).content == b"zip"


def test_what_is_larger_than_allowed_leaves_nothing(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(max_upload_mib=1)
    upload_url, file_url = initiated(server)
    declared = server.put(upload_url, content=bytes(2**20 + 1))
    streamed = server.put(upload_url, content=iter([bytes(2**20), b"1"]))

    assert (declared.status_code, streamed.status_code) == (413, 413)
    assert server.get(file_url).status_code == 404
    assert list((tmp_path / "data/files").iterdir()) == []


def test_parts_in_any_order_become_one_file_in_theirs(server: TestClient, tmp_path: Path) -> None:
    upload_url, file_url = initiated(server, "initiate-multipart")
    second = put_part(server, upload_url, 2, b"world")
    first = put_part(server, upload_url, 1, b"hell")
    first = put_part(server, upload_url, 1, b"hello ")
    done = server.post(part_url(upload_url, "complete"), json={"parts": [second, first]})

    assert done.status_code == 200
    assert server.get(file_url).content == b"hello world"
    assert len(list((tmp_path / "data/files").iterdir())) == 1
    assert server.put(part_url(upload_url, "3"), content=b"!").status_code == 403


def test_python_uploads_parts_at_the_address_of_the_file(server: TestClient) -> None:
    headers = {"X-Fal-File-Name": "me.zip", "Content-Type": "application/zip"}
    begun = server.post("/files/upload/multipart", headers=headers).json()
    address = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    etags = [server.put(f"{address}/{n}", content=b"abc").headers["etag"] for n in (1, 2)]
    parts = [{"partNumber": n, "etag": etag} for n, etag in enumerate(etags, start=1)]
    done = server.post(f"{address}/complete", json={"parts": parts})

    assert done.status_code == 200
    assert server.get(begun["access_url"]).content == b"abcabc"


def test_parts_that_are_no_whole_file_are_400_and_can_be_mended(server: TestClient) -> None:
    upload_url, file_url = initiated(server, "initiate-multipart")
    first = put_part(server, upload_url, 1, b"a")
    third = put_part(server, upload_url, 3, b"c")
    complete = part_url(upload_url, "complete")
    second = {"partNumber": 2, "etag": "0"}
    wrong: dict[str, list[Any]] = {
        "part 2 is missing": [first, third],
        "part 2 is missing ": [first, second, third],
        "part 1 has another etag": [{**first, "etag": third["etag"]}],
        "`partNumber` of its own": [first, first],
        "`parts` must be a list": [],
    }
    for text, parts in wrong.items():
        answer = server.post(complete, json={"parts": parts})
        assert (answer.status_code, text.strip() in answer.json()["detail"]) == (400, True), text
    assert server.get(file_url).status_code == 404
    second = put_part(server, upload_url, 2, b"b")

    assert server.post(complete, json={"parts": [first, second, third]}).status_code == 200
    assert server.get(file_url).content == b"abc"


def test_parts_together_are_no_larger_than_a_file_may_be(make_server: MakeServer) -> None:
    server = make_server(max_upload_mib=1)
    upload_url, _ = initiated(server, "initiate-multipart")
    put_part(server, upload_url, 1, bytes(2**19))

    assert server.put(part_url(upload_url, "2"), content=bytes(2**19 + 1)).status_code == 413
    # A part that comes again takes the place of its first try.
    put_part(server, upload_url, 1, bytes(2**20))


@pytest.mark.parametrize("number", ["0", "10001", "-1", "one"])
def test_a_number_that_no_part_has_is_400(server: TestClient, number: str) -> None:
    upload_url, _ = initiated(server, "initiate-multipart")

    assert server.put(part_url(upload_url, number), content=b"a").status_code == 400


def test_an_upload_is_trained_on_by_its_address(server: TestClient) -> None:
    url = server.post("/files/upload", content=b"zip").json()["access_url"]
    gone = f"{url.rpartition('/files/')[0]}/files/{'0' * 32}/me.zip"
    answers = [
        server.post("/fal-ai/personalization", json={"images_data_url": u, "photo_class": "Man"})
        for u in (url, gone)
    ]

    assert [answer.status_code for answer in answers] == [200, 422]
    assert answers[1].json()["detail"][0]["loc"] == ["body", "images_data_url"]


def test_uploads_have_the_room_of_the_data_folder_and_no_more(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(max_data_gib=1)
    room = settled_room(server)
    url, _ = initiated(server)
    parts_url, _ = initiated(server, "initiate-multipart")
    room.used = before = 2**30 - 5

    answers = [
        server.put(url, content=b"123456"),
        server.put(part_url(parts_url, "1"), content=b"123456"),
        server.post("/files/upload", content=b"123456"),
    ]
    assert [answer.status_code for answer in answers] == [507] * 3
    assert (room.used, list((tmp_path / "data/files").iterdir())) == (before, [])
    assert server.put(url, content=b"12345").status_code == 200
    assert room.used == 2**30
    assert server.post("/storage/upload/initiate", json=JSON).status_code == 507


def test_parts_that_come_at_once_are_together_no_larger_than_a_file_may_be(tmp_path: Path) -> None:
    room, parts = Room(), Parts()
    store = FileStore(Database(tmp_path / "db", SCHEMA), tmp_path / "files", room)

    async def work() -> list[Any]:
        both = asyncio.Barrier(2)

        async def content() -> AsyncIterator[bytes]:
            await both.wait()
            yield bytes(60)

        return await asyncio.gather(
            *(parts.put("id", number, content(), store, 100) for number in (1, 2)),
            return_exceptions=True,
        )

    found = asyncio.run(work())

    assert {type(answer) for answer in found} == {str, TooLarge}
    assert room.used == 60
    parts.remove("id", store)
    assert (room.used, list((tmp_path / "files").iterdir())) == (0, [])


def test_an_upload_is_known_by_its_id_under_whatever_name_it_was_made(server: TestClient) -> None:
    url = server.post("/files/upload", content=b"zip").json()["access_url"]
    elsewhere = url.replace("127.0.0.1:8700", "gpu.lan:9000")
    body = {"images_data_url": elsewhere, "photo_class": "Man"}
    id = server.post("/fal-ai/personalization", json=body).json()["request_id"]

    workshop = server.app.state.workshop
    upload = workshop.files.find(url.split("/")[4])
    work = workshop.queue.find(id).work
    assert str(upload.path) in work
    assert upload.id not in work, "anybody who reads a configuration could fetch it"
