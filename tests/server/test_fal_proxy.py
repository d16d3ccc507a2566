"""The route of JavaScript's client: fal's hosts and nothing else, answered by this server."""

from __future__ import annotations

import json
import logging

import pytest
from starlette.testclient import TestClient
from test_fal_queue import REQUEST

ROUTE = "/api/fal/proxy"
QUEUE = "https://queue.fal.run/fal-ai/personalization"


def target(address: str) -> dict[str, str]:
    return {"x-fal-target-url": address}


def test_a_whole_request_goes_through_the_route(server: TestClient) -> None:
    submitted = server.post(ROUTE, json=REQUEST, headers=target(QUEUE)).json()
    requests = f"{QUEUE}/requests/{submitted['request_id']}"
    stream = server.get(ROUTE, headers=target(f"{requests}/status/stream?logs=1"))
    status = server.get(ROUTE, headers=target(f"{requests}/status?logs=1"))
    result = server.get(ROUTE, headers=target(requests))
    cancelled = server.put(ROUTE, headers=target(f"{requests}/cancel"))

    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text.count("data: ") >= 1
    assert status.json()["logs"]
    assert result.headers["x-fal-request-id"] == submitted["request_id"]
    assert cancelled.status_code == 400


def test_a_run_and_storage_have_hosts_of_their_own(server: TestClient) -> None:
    run = target("https://fal.run/fal-ai/personalization")
    rest = target("https://rest.fal.ai/storage/upload/initiate?storage_type=fal-cdn-v3")
    initiated = server.post(ROUTE, json={"file_name": "a.zip"}, headers=rest).json()

    assert "config_file" in server.post(ROUTE, json=REQUEST, headers=run).json()
    # The upload itself is not sent through the route.
    assert initiated["upload_url"].startswith("http://127.0.0.1:8700/storage/upload/")


def test_refusals_of_the_route_behind_come_through(server: TestClient) -> None:
    answer = server.post(ROUTE, json={}, headers=target(QUEUE))

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["type"] == "missing"


FOREIGN = [
    "",
    "http://queue.fal.run/fal-ai/x",
    "https://169.254.169.254/latest/meta-data",
    "https://queue.fal.run.evil.example/x",
    "https://queue.fal.run@evil.example/x",
    "https://evil.example#@queue.fal.run/x",
    "https://me:secret@queue.fal.run/fal-ai/x",
    "https://queue.fal.run:8443/x",
    "https://queue.fal.run:x/x",
    "https://api.novita.ai/v3/training",
    "https://queue.fal.run/api/fal/proxy",
    "https://queue.fal.run//api/fal/proxy/",
    "https://queue.fal.run/%61pi/fal/proxy",
    "file:///etc/passwd",
]


def test_nothing_else_is_understood(server: TestClient) -> None:
    for address in FOREIGN:
        for method in ("GET", "POST", "PUT", "DELETE"):
            answer = server.request(method, ROUTE, headers=target(address))

            assert answer.status_code == 400, address
            assert answer.json()["detail"] == "Invalid request"


def test_what_is_asked_through_it_is_logged_by_its_own_path_and_polls_are_not(
    server: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer.server.access")
    id = "0" * 32
    asked = f"https://queue.fal.run/fal-ai/personalization/requests/{id}"
    for address in (f"{asked}/status", asked):
        server.get("/api/fal/proxy", headers={"x-fal-target-url": address})

    (line,) = [
        json.loads(record.getMessage())
        for record in caplog.records
        if record.name.endswith("access")
    ]
    assert line["path"] == "/api/fal/proxy → /fal-ai/personalization/requests/00000000…"
