"""fal's queue, at the bytes: what its clients need is in every answer."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeServer
from starlette.requests import Request
from starlette.testclient import TestClient

from trainer.server.fal import requests
from trainer.server.protocols import fal
from trainer.server.queue import NewJob

APP = "fal-ai/personalization"
REQUEST = {"images_data_url": "https://photos.example/a.zip", "photo_class": "Man"}
GUIDE = {
    "model_type": "flux-lora",
    "training_images": ["https://photos.example/1.jpg"],
    "trigger_word": "SIDAI",
    "num_epochs": 1000,
    "learning_rate": 1e-4,
}


def submit(server: TestClient, app: str = APP, **more: Any) -> dict[str, Any]:
    answer = server.post(f"/{app}", **{"json": REQUEST, **more})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def ended(server: TestClient, submitted: dict[str, Any], logs: str = "1") -> dict[str, Any]:
    """The status at the end, over the address that the submission gave."""
    for _ in range(300):
        answer = server.get(submitted["status_url"], params={"logs": logs})
        if answer.status_code == 200:
            content: dict[str, Any] = answer.json()
            return content
        assert answer.status_code == 202
        time.sleep(0.02)
    raise AssertionError("it does not end")


def waiting(server: TestClient) -> dict[str, Any]:
    """A request that waits behind one that takes long."""
    running = submit(server)
    for _ in range(300):
        if server.get(running["status_url"]).json()["status"] == "IN_PROGRESS":
            return submit(server)
        time.sleep(0.02)
    raise AssertionError("nothing begins")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, make_server: MakeServer) -> TestClient:
    """A server whose jobs take long, for cancelling and looking."""
    monkeypatch.setenv("FAKE_SECONDS", "30")
    return make_server(grace_seconds=1)


def test_a_submission_answers_with_every_key_that_clients_read(server: TestClient) -> None:
    answer = server.post(f"/{APP}/", json=REQUEST)
    content = answer.json()
    address = f"http://127.0.0.1:8700/{APP}/requests/{content['request_id']}"

    assert answer.status_code == 200
    assert content == {
        "status": "IN_QUEUE",
        "request_id": answer.headers["x-fal-request-id"],
        "gateway_request_id": content["request_id"],
        "training_id": content["request_id"],
        "response_url": address,
        "status_url": f"{address}/status",
        "cancel_url": f"{address}/cancel",
        "queue_position": 0,
        "logs": None,
        "metrics": {},
    }


def test_a_request_goes_from_202_in_the_queue_to_202_in_progress(slow: TestClient) -> None:
    second = waiting(slow)
    queued = slow.get(second["status_url"], params={"logs": "true"})
    slow.put(second["cancel_url"])
    first = submit(slow)
    third = submit(slow)

    assert queued.status_code == 202
    assert queued.json() == {
        "status": "IN_QUEUE",
        "queue_position": 0,
        "logs": None,
        **{name: second[name] for name in ("request_id", "response_url", "status_url")},
        "cancel_url": second["cancel_url"],
    }
    assert slow.get(first["status_url"]).json()["queue_position"] == 0
    assert slow.get(third["status_url"]).json()["queue_position"] == 1


def test_the_end_is_200_completed_with_logs_metrics_and_a_result(server: TestClient) -> None:
    submitted = submit(server)
    status = ended(server, submitted)
    result = server.get(submitted["response_url"])

    assert status["status"] == "COMPLETED"
    assert status["metrics"]["inference_time"] > 0
    assert not {"error", "error_type", "queue_position"} & status.keys()
    assert [line["message"] for line in status["logs"]][0] == "Training 4 steps on 3 pictures"
    assert all(
        line.keys() == {"message", "level", "source", "timestamp"} for line in status["logs"]
    )
    assert result.status_code == 200
    assert result.headers["x-fal-request-id"] == submitted["request_id"]
    assert result.json().keys() == {"diffusers_lora_file", "kohya_lora_file", "config_file"}
    file = result.json()["kohya_lora_file"]
    assert server.get(file["url"]).content == b"kohya"
    assert (file["file_name"], file["file_size"]) == ("lora.safetensors", 5)


def test_logs_are_null_where_they_are_not_asked_for(server: TestClient) -> None:
    submitted = submit(server)

    for logs in ("false", "0", ""):
        assert ended(server, submitted, logs)["logs"] is None


def test_addresses_with_a_slash_at_the_end_and_without_the_app_answer(server: TestClient) -> None:
    submitted = submit(server)
    ended(server, submitted)
    bare = f"/requests/{submitted['request_id']}"

    # An answer that leads elsewhere would stop clients that follow nothing.
    for path in (f"{submitted['status_url']}/", f"{submitted['response_url']}/", f"{bare}/status"):
        assert server.get(path, follow_redirects=False).status_code == 200
    assert server.get(bare).json() == server.get(submitted["response_url"]).json()


def test_a_result_before_its_time_is_400_and_never_what_clients_repeat(slow: TestClient) -> None:
    submitted = submit(slow)
    answer = slow.get(submitted["response_url"])

    assert answer.status_code == 400
    assert answer.json()["detail"] == "Request is still in progress"
    assert answer.headers["x-fal-request-id"] == submitted["request_id"]


def test_cancelling_in_the_queue_is_at_once_and_a_second_time_says_so(slow: TestClient) -> None:
    submitted = waiting(slow)
    first = slow.put(submitted["cancel_url"])
    status = slow.get(submitted["status_url"])
    result = slow.get(submitted["response_url"])
    second = slow.put(submitted["cancel_url"])

    assert (first.status_code, first.json()["status"]) == (200, "OK")
    assert (status.status_code, status.json()["status"]) == (200, "COMPLETED")
    assert status.json()["error_type"] == "client_cancelled"
    assert (result.status_code, result.json()["detail"]) == (499, "the request was cancelled")
    assert (second.status_code, second.json()["status"]) == (400, "ALREADY_COMPLETED")


def test_cancelling_what_runs_is_a_wish_that_comes_true(slow: TestClient) -> None:
    waiting(slow)
    (running,) = slow.app.state.workshop.queue.running()
    path = f"/{APP}/requests/{running.id}"
    answer = slow.put(f"{path}/cancel")

    assert (answer.status_code, answer.json()["status"]) == (202, "CANCELLATION_REQUESTED")
    status = ended(slow, {"status_url": f"{path}/status"})
    assert status["error_type"] == "client_cancelled"
    assert status["metrics"]["inference_time"] >= 0


def test_cancelling_nothing_is_not_found(server: TestClient) -> None:
    answer = server.put(f"/{APP}/requests/none/cancel")

    assert (answer.status_code, answer.json()["status"]) == (404, "NOT_FOUND")


def test_bad_input_is_422_by_field_at_submission(server: TestClient) -> None:
    answer = server.post(f"/{APP}", json={"images_data_url": "https://a.example/a.zip", "rank": 0})
    details = {detail["loc"][-1]: detail for detail in answer.json()["detail"]}

    assert answer.status_code == 422
    assert details["photo_class"]["loc"] == ["body", "photo_class"]
    assert details["photo_class"]["type"] == "missing"
    assert details["rank"]["type"] == "value_error"
    assert "got 0" in details["rank"]["msg"]
    # JavaScript's client shows nothing else.
    assert "`rank`: got 0" in answer.json()["message"]


def test_a_field_inside_a_list_is_named_by_its_place(server: TestClient) -> None:
    answer = server.post("/fal-ai/flux-lora", json={**GUIDE, "training_images": ["data:,", 3]})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "training_images", 1]


def test_bad_input_that_the_job_finds_is_422_of_the_result(
    monkeypatch: pytest.MonkeyPatch, make_server: MakeServer
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "input")
    problem = {"field": "max_train_steps", "message": "got 0; allowed: at least 1", "hint": ""}
    monkeypatch.setenv("FAKE_RESULT", json.dumps({"problems": [problem]}))
    server = make_server()
    submitted = submit(server, "fal-ai/flux-lora", json=GUIDE)
    status = ended(server, submitted)
    result = server.get(submitted["response_url"])

    assert status["status"] == "COMPLETED"
    assert "got 0" in status["error"]
    assert result.status_code == 422
    # By the name that the request has for it.
    assert result.json()["detail"][0]["loc"] == ["body", "num_epochs"]


def test_a_failure_is_completed_with_an_error_and_500_of_the_result(
    monkeypatch: pytest.MonkeyPatch, make_server: MakeServer
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "memory")
    server = make_server()
    submitted = submit(server)
    status = ended(server, submitted)
    result = server.get(submitted["response_url"])

    assert (status["error"], status["error_type"]) == ("it went wrong", "internal_error")
    assert result.status_code == 500
    assert result.json() == {
        "detail": "it went wrong",
        "message": "it went wrong",
        "error_type": "internal_error",
    }
    assert result.headers["x-fal-error-type"] == "internal_error"


def test_a_start_that_comes_too_late_is_504_by_the_users_own_wish(slow: TestClient) -> None:
    waiting(slow)
    submitted = submit(slow, headers={"X-Fal-Request-Timeout": "0.1"})
    status = ended(slow, submitted)
    result = slow.get(submitted["response_url"])

    assert status["error_type"] == "request_timeout"
    assert result.status_code == 504
    # Without it both clients ask again.
    assert result.headers["x-fal-request-timeout-type"] == "user"


def test_low_priority_goes_after_what_came_later(slow: TestClient) -> None:
    low = waiting(slow)
    slow.put(low["cancel_url"])
    low = submit(slow, headers={"X-Fal-Queue-Priority": "low"})
    normal = submit(slow, headers={"X-Fal-Queue-Priority": "normal"})

    assert slow.get(normal["status_url"]).json()["queue_position"] == 0
    assert slow.get(low["status_url"]).json()["queue_position"] == 1


def test_a_header_that_cannot_be_meant_is_named(server: TestClient) -> None:
    timeout = "X-Fal-Request-Timeout"
    for header, value in [
        ("X-Fal-Queue-Priority", "high"),
        *((timeout, value) for value in ("soon", "nan", "0", "inf")),
    ]:
        answer = server.post(f"/{APP}", json=REQUEST, headers={header: value})

        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["header", header.lower()]


def test_an_idempotency_key_gives_the_same_request_again(slow: TestClient) -> None:
    key = {"Idempotency-Key": "one"}
    first, again = submit(slow, headers=key), submit(slow, headers=key)
    other = slow.post(f"/{APP}", json={**REQUEST, "rank": 8}, headers=key)

    assert first["request_id"] == again["request_id"]
    assert other.status_code == 422


def test_the_guides_training_has_an_id_and_runs_under_the_name_of_its_model(
    server: TestClient,
) -> None:
    submitted = submit(server, "fal-ai/flux-lora", json=GUIDE)
    ended(server, submitted)

    assert submitted["training_id"] == submitted["request_id"]
    assert "diffusers_lora_file" in server.get(submitted["response_url"]).json()


def test_an_archive_under_the_guides_name_is_trained_as_the_fast_trainer_does(
    server: TestClient, tmp_path: Path
) -> None:
    body = {"images_data_url": "https://photos.example/a.zip", "trigger_word": "TOK", "steps": 7}
    submitted = submit(server, "fal-ai/flux-lora", json=body)
    ended(server, submitted)
    path = tmp_path / "data/jobs" / submitted["request_id"] / "config.yaml"
    sections = [part for part in yaml.safe_load(path.read_text()).values() if part]
    config = {name: value for part in sections for name, value in part.items()}

    assert config["max_train_steps"] == 7
    assert config["images_data_url"] == body["images_data_url"]


def test_unknown_fields_are_told_in_the_log_and_in_the_result(
    monkeypatch: pytest.MonkeyPatch, make_server: MakeServer, tmp_path: Path
) -> None:
    reason = "fal has no such field"
    note = {"event": "note", "note": "ignored", "field": "request.sparkle", "message": reason}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([note]))
    ignored = {"request.sparkle": reason}
    monkeypatch.setenv("FAKE_RESULT", json.dumps({"ignored_options": ignored}))
    server = make_server()
    submitted = submit(server, json={**REQUEST, "sparkle": 3, "webhookUrl": "https://a.example"})
    logs = ended(server, submitted)["logs"]
    folder = tmp_path / "data/jobs" / submitted["request_id"]
    config = yaml.safe_load((folder / "config.yaml").read_text())

    # The job is told, and what it says of it comes back.
    assert config["ignored_options"].keys() >= {"request.sparkle", "request.webhookUrl"}
    warned = [line["message"] for line in logs if line["level"] == "WARN"]
    assert warned[0].startswith("warning: request.webhookUrl calls nobody")
    assert f"ignored: request.sparkle {reason}" in warned
    assert server.get(submitted["response_url"]).json()["ignored_options"] == ignored


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_the_stream_gives_new_lines_alone_and_ends_with_completed(
    monkeypatch: pytest.MonkeyPatch, make_server: MakeServer
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.8")
    server = make_server()
    submitted = submit(server)
    answer = server.get(f"{submitted['status_url']}/stream", params={"logs": "1"})
    events = events_of(answer.text)
    streamed = [line for event in events for line in event["logs"] or []]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [event["status"] for event in events][-1] == "COMPLETED"
    assert len([event for event in events if event["status"] == "COMPLETED"]) == 1
    assert len([event for event in events if event["logs"]]) > 1
    assert streamed == ended(server, submitted)["logs"]


def test_a_silent_stream_says_ping(
    monkeypatch: pytest.MonkeyPatch, make_server: MakeServer
) -> None:
    monkeypatch.setattr("trainer.server.fal.requests._PING_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_SECONDS", "0.8")
    server = make_server()
    answer = server.get(f"{submit(server)['status_url']}/stream")

    assert ": ping\n\n" in answer.text
    assert all(event["logs"] is None for event in events_of(answer.text))


def test_a_run_that_waits_answers_with_the_result(server: TestClient) -> None:
    answer = server.post(f"/run/{APP}", json=REQUEST)

    assert answer.status_code == 200
    assert answer.json().keys() >= {"diffusers_lora_file", "config_file"}
    status = server.get(f"/requests/{answer.headers['x-fal-request-id']}/status")
    assert status.json()["status"] == "COMPLETED"


def test_a_run_that_is_refused_says_why(server: TestClient) -> None:
    answer = server.post(f"/run/{APP}", json={})

    assert answer.status_code == 422
    assert {detail["type"] for detail in answer.json()["detail"]} == {"missing"}


def test_an_app_that_is_not_here_is_404_and_says_which_are(server: TestClient) -> None:
    for path in ("/fal-ai/veo3", "/fal-ai/personalization/sub", "/run/fal-ai/x"):
        answer = server.post(path, json={})

        assert answer.status_code == 404
        assert APP in answer.json()["detail"]


def test_a_request_of_another_protocol_is_none_of_fals(server: TestClient) -> None:
    workshop = server.app.state.workshop
    new = NewJob(protocol="other", app="x", kind="training", request={}, work="")
    job = workshop.queue.submit(new)

    assert server.get(f"/requests/{job.id}/status").status_code == 404
    assert server.put(f"/requests/{job.id}/cancel").status_code == 404


def test_a_body_that_is_no_object_is_400_with_a_text(server: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[1]", b'"text"', b'{"rank": NaN}'):
        answer = server.post(f"/{APP}", content=body, headers=headers)

        assert answer.status_code == 400
        assert isinstance(answer.json()["detail"], str)
        assert answer.json()["error_type"] == "bad_request"


def test_no_body_at_all_is_an_input_without_fields(server: TestClient) -> None:
    assert server.post(f"/{APP}").status_code == 422


def test_a_webhook_is_told_what_the_result_is(server: TestClient) -> None:
    url = "https://hook.example/done"
    submitted = submit(server, params={"fal_webhook": url})
    ended(server, submitted)
    workshop = server.app.state.workshop
    job = workshop.queue.find(submitted["request_id"])
    told = fal.announced(job, workshop)
    key = server.get("/.well-known/jwks.json").json()["keys"][0]

    assert job.webhook["url"] == url
    assert told == {
        "request_id": job.id,
        "gateway_request_id": job.id,
        "status": "OK",
        "payload": server.get(submitted["response_url"]).json(),
    }
    assert fal.signed(job, b"{}", workshop)["X-Fal-Webhook-Request-Id"] == job.id
    assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")


def test_a_webhook_of_a_failure_has_the_bodies_of_the_result(slow: TestClient) -> None:
    submitted = waiting(slow)
    slow.put(submitted["cancel_url"])
    workshop = slow.app.state.workshop
    told = fal.announced(workshop.queue.find(submitted["request_id"]), workshop)

    assert (told["status"], told["error"]) == ("ERROR", "Invalid status code: 499")
    assert told["payload"] == slow.get(submitted["response_url"]).json()


def test_a_webhook_that_nobody_may_be_sent_to_is_named(server: TestClient) -> None:
    for url in ("ftp://hook.example", "http://169.254.169.254/", "none"):
        answer = server.post(f"/{APP}", json=REQUEST, params={"fal_webhook": url})

        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["query", "fal_webhook"]


def test_a_client_that_goes_away_ends_its_run_unless_it_can_come_back(slow: TestClient) -> None:
    workshop = slow.app.state.workshop

    async def left(key: str | None) -> str:
        """The state of a job whose client left as soon as it had asked."""
        headers = [
            (b"content-length", b"99"),
            *([(b"idempotency-key", key.encode())] if key else []),
        ]
        scope = {
            **{"type": "http", "method": "POST", "path": f"/run/{APP}", "query_string": b""},
            **{"headers": headers, "scheme": "http", "server": ("127.0.0.1", 8700)},
        }
        said = [
            {"type": "http.request", "body": json.dumps(REQUEST).encode(), "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> dict[str, Any]:
            return said.pop(0) if len(said) > 1 else said[0]

        answer = await requests.runs(APP)(Request(scope, receive), workshop)
        assert answer.status_code == 499
        (job, *_) = workshop.queue.listed("fal", "training")
        return "cancelled" if job.cancel_requested else job.state

    waiting(slow)
    assert asyncio.run(left(None)) == "cancelled"
    assert asyncio.run(left("again")) == "queued"
