"""The page's routes: what it sends becomes jobs, what jobs leave comes back, and nobody else's."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeServer
from fake_job import PIXEL
from running import wait_for
from starlette.testclient import TestClient

from trainer.config_files import parse_yaml


def uploaded(server: TestClient, content: bytes = PIXEL, name: str = "a.png") -> str:
    """The address of an upload, as the page brings it."""
    answer = server.post("/files/upload", content=content, headers={"X-Fal-File-Name": name})
    address: str = answer.json()["access_url"]
    return address


def submission(server: TestClient, **more: Any) -> dict[str, Any]:
    """What the page sends for one picture."""
    return {"pictures": [{"address": uploaded(server)}], **more}


def begun(server: TestClient, what: str = "trainings", **more: Any) -> str:
    """The id of a job that was begun."""
    answer = server.post(f"/trainer/{what}", json=submission(server, **more))
    assert answer.status_code == 200, answer.text
    id: str = answer.json()["id"]
    return id


def ended(server: TestClient, id: str) -> dict[str, Any]:
    """What is told of a job once it is over."""

    def is_over() -> bool:
        return server.get(f"/trainer/jobs/{id}").json()["state"] not in ("queued", "running")

    wait_for(is_over, seconds=20)
    told: dict[str, Any] = server.get(f"/trainer/jobs/{id}").json()
    return told


def work_of(server: TestClient, id: str) -> dict[str, Any]:
    """The configuration of a job."""
    job = server.app.state.workshop.queue.find(id)
    return parse_yaml(job.work, "work")


def test_what_is_submitted_is_trained(server: TestClient) -> None:
    id = begun(server, presets=["person"], options={"rank": 7, "output_name": "me"})

    told = ended(server, id)
    assert (told["state"], told["name"], told["step"], told["total"]) == ("done", "me", 4, 4)
    assert told["options"] == {"rank": 7, "output_name": "me"}
    written = work_of(server, id)
    assert written["adapter"]["rank"] == 7
    assert written["run"]["max_train_steps"] == 1500


def test_pictures_are_prepared_to_be_looked_at(server: TestClient) -> None:
    id = begun(server, "preparations")

    assert ended(server, id)["state"] == "done"
    (found,) = server.get(f"/trainer/jobs/{id}/prepared").json()["sets"]
    assert found["level"] == "act"
    assert found["left_out"] == [{"name": "001-b.png", "reason": "is no picture"}]
    (picture,) = found["pictures"]
    assert picture["trained_box"] == [16, 0, 64, 64]
    shown = server.get(f"/trainer/jobs/{id}/pictures/{picture['thumbnail']}")
    assert shown.content == PIXEL
    assert shown.headers["content-type"] == "image/jpeg"


def test_pictures_are_prepared_while_a_training_runs(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    training = begun(server)
    monkeypatch.setenv("FAKE_SECONDS", "0")
    wait_for(lambda: server.get(f"/trainer/jobs/{training}").json()["state"] == "running")

    assert ended(server, begun(server, "preparations"))["state"] == "done"
    server.post(f"/trainer/jobs/{training}/cancel")


def test_no_page_elsewhere_starts_anything(make_server: MakeServer) -> None:
    server = make_server()
    body = submission(server)

    for path in ("trainings", "preparations", "checks"):
        headers = {"Origin": "https://elsewhere.example"}
        assert server.post(f"/trainer/{path}", json=body, headers=headers).status_code == 403
