"""Servers for tests, in this process and with fake jobs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from running import fake_jobs_environment
from starlette.testclient import TestClient

from trainer.server.app import create_app
from trainer.server.settings import ServerSettings

MakeServer = Callable[..., TestClient]


@pytest.fixture
def fake_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are fake: no model, no torch."""
    for name, value in fake_jobs_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that a test starts; none outlives it."""
    programs: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*given: Any, **named: Any) -> subprocess.Popen[bytes]:
        programs.append(popen(*given, **named))
        return programs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", noted)
        yield programs
    for program in programs:
        program.kill()
        program.wait()


@pytest.fixture
def make_server(tmp_path: Path, fake_jobs: None, started: object) -> Iterator[MakeServer]:
    """Starts servers in this process, with settings by name; their jobs are fake."""
    with ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            given = {"data": tmp_path / "data", "gpus": ("cpu",), **settings}
            app = create_app(ServerSettings(**given))
            client = TestClient(app, base_url="http://127.0.0.1:8700", client=("127.0.0.1", 40000))
            return stack.enter_context(client)

        yield make


@pytest.fixture
def server(make_server: MakeServer) -> TestClient:
    """A server with usual settings."""
    return make_server()
