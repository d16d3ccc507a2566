"""The server's own description of itself is true: a program that reads it finds what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import fake_jobs_environment, running_server
from starlette.testclient import TestClient

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.mark.thorough
def test_schemathesis_finds_nothing_that_the_description_does_not_say(tmp_path: Path) -> None:
    with running_server(
        tmp_path / "data",
        *("--requests-per-second", "10000"),
        environment=fake_jobs_environment(),
    ) as server:
        done = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "st"), "run", f"{server.url}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--phases", "coverage"),
                *("--max-examples", "4", "--generation-deterministic", "--no-color"),
                # These wait for their jobs.
                *("--exclude-path-regex", "^/run/"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ,
        )

    assert done.returncode == 0, done.stdout[-6000:]
    assert "Tested: " in done.stdout


def test_every_route_of_a_service_is_described(server: TestClient) -> None:
    paths = server.get("/openapi.json").json()["paths"]

    assert {
        "/fal-ai/personalization",
        "/{owner}/{alias}/requests/{request_id}/status",
        "/v3/training/subject",
        "/v1/finetune",
        "/v1/flux-pro-1.1-ultra-finetuned",
    } <= paths.keys()


def test_a_request_is_described_by_the_names_and_defaults_of_its_service(
    server: TestClient,
) -> None:
    description = server.get("/openapi.json").json()
    body = description["paths"]["/v1/finetune"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]

    schema = description["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["properties"]["iterations"]["default"] == 300
    assert {"file_data", "finetune_comment", "mode"} <= set(schema["required"])
