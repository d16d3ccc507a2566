"""What a submission costs: contents stay only where it is taken, and retries are free."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeServer
from running import settled_room
from starlette.testclient import TestClient

from trainer.server.database import Database
from trainer.server.files import SCHEMA, FileStore
from trainer.server.room import Room

APP = "/fal-ai/flux-lora-fast-training"
CONTENT = b"PK" + bytes(3000)
REQUEST = {"images_data_url": base64.b64encode(CONTENT).decode()}


@pytest.fixture
def full_server(make_server: MakeServer) -> TestClient:
    """A server in whose queue one job waits and no other one may."""
    return make_server(max_queued=1, gpus=())


def kept(data: Path) -> list[str]:
    return [path.name for path in (data / "files").iterdir()]


def submit(server: TestClient, key: str = "", **more: Any) -> tuple[int, str]:
    """The status of the answer and the id of the job."""
    headers = {"Idempotency-Key": key} if key else {}
    body = {**REQUEST, **more.pop("body", {})}
    query = more.pop("query", "")
    answer = server.post(APP + query, json=body, headers={**headers, **more})
    return answer.status_code, answer.json().get("request_id", "")


def test_a_request_that_is_taken_keeps_its_content_once(server: TestClient, tmp_path: Path) -> None:
    assert [submit(server)[0], submit(server)[0]] == [200, 200]
    assert len(kept(tmp_path / "data")) == 1


def test_a_request_that_is_wrong_leaves_no_content(server: TestClient, tmp_path: Path) -> None:
    assert submit(server, body={"steps": "many"})[0] == 422
    assert kept(tmp_path / "data") == []


def test_a_request_for_which_the_queue_has_no_room_leaves_no_content(
    full_server: TestClient, tmp_path: Path
) -> None:
    assert submit(full_server, body={"images_data_url": "https://a.example/a.zip"})[0] == 200
    assert submit(full_server)[0] == 507
    assert kept(tmp_path / "data") == []


def test_a_content_that_the_data_folder_has_no_room_for_is_refused_and_not_kept(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(max_data_gib=1)
    room = settled_room(server)
    room.used = 2**30 - len(CONTENT) + 1

    assert submit(server)[0] == 507
    assert kept(tmp_path / "data") == []
    room.used -= 1
    assert submit(server)[0] == 200
    assert room.used == 2**30


def test_a_retry_is_answered_where_nothing_new_is_taken(full_server: TestClient) -> None:
    workshop = full_server.app.state.workshop
    first = submit(full_server, "a")
    again = submit(full_server, "a")

    assert first == again
    assert first[0] == 200
    assert submit(full_server, "b")[0] == 507
    workshop.room.require = lambda: pytest.fail("asked for room")
    assert submit(full_server, "a") == first


@pytest.mark.parametrize(
    "other",
    [
        {"query": "?fal_webhook=https://hooks.example/b"},
        {"x-fal-queue-priority": "low"},
        {"x-fal-request-timeout": "99"},
        {"body": {"images_data_url": REQUEST["images_data_url"][:-4] + "AAAB"}},
        {"body": {"trigger_word": "TOK"}},
    ],
)
def test_a_key_that_comes_with_anything_else_is_refused(
    server: TestClient, other: dict[str, Any]
) -> None:
    usual = {"query": "?fal_webhook=https://hooks.example/a", "x-fal-request-timeout": "30"}
    first = submit(server, "a", **usual)

    assert submit(server, "a", **usual) == first
    # Under another of its names it is the same server.
    assert submit(server, "a", **usual, host="localhost:8700") == first
    assert submit(server, "a", **{**usual, **other})[0] == 422


def test_a_content_stays_while_another_request_has_it(tmp_path: Path) -> None:
    room = Room()
    store = FileStore(Database(tmp_path / "db", SCHEMA), tmp_path / "files", room)
    has_it, refused = threading.Event(), threading.Event()
    places: list[Path] = []

    def taken() -> None:
        with store.for_one_request():
            places.append(store.keep(CONTENT, "a"))
            has_it.set()
            assert refused.wait(5)

    other = threading.Thread(target=taken)
    with pytest.raises(KeyError), store.for_one_request():
        store.keep(CONTENT, "a")
        other.start()
        assert has_it.wait(5)
        raise KeyError
    refused.set()
    other.join()

    assert places[0].read_bytes() == CONTENT
    with pytest.raises(KeyError), store.for_one_request():
        store.keep(CONTENT, "a")
        raise KeyError
    assert places[0].exists(), "a job has it already"
    assert room.used == len(CONTENT)


def test_what_is_measured_and_what_comes_meanwhile_counts() -> None:
    room = Room(100)

    def measured() -> int:
        room.take(7)
        return 50

    room.take(90)
    room.measure(measured)

    assert room.used == 57
