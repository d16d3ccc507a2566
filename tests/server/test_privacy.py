"""What strangers, other users of the machine and jobs do not get to see."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeServer
from running import wait_for
from starlette.testclient import TestClient

from trainer.errors import DiskError
from trainer.server.backends.slurm import run
from trainer.server.slots import Slot

APP = "/fal-ai/flux-lora-fast-training"
REQUEST = {"images_data_url": "https://photos.example/a.zip"}


def ended(server: TestClient) -> dict[str, Any]:
    """The answer to a request that failed."""
    id = server.post(APP, json=REQUEST).json()["request_id"]
    url = f"{APP}/requests/{id}"
    wait_for(lambda: server.get(f"{url}/status").json()["status"] == "COMPLETED", seconds=10)
    answer: dict[str, Any] = {
        **server.get(url).json(),
        "status": server.get(f"{url}/status?logs=1").json(),
    }
    return answer


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("`{data}/jobs/1/run/outputs/a b.zip` is full", "`a b.zip` is full"),
        ("cannot open {data}/jobs/1/log.txt: it is gone", "cannot open jobs/1/log.txt: it is gone"),
        ("`/home/me/my models/x` is none", "`x` is none"),
        ("`/models/` and `~/x`", "`models` and `x`"),
        ("No such file: '/home/me/model.safetensors'", "No such file: 'model.safetensors'"),
        ("see (/opt/trainer/a.py), then /opt/b/", "see (a.py), then "),
        ("file:///home/me/a.zip is none", "a.zip is none"),
        (
            "https://a.example/b/c.zip and/or 1/2 `a/b` /files",
            "https://a.example/b/c.zip and/or 1/2 `a/b` /files",
        ),
        ("`https://a.example/b/c.zip`", "`https://a.example/b/c.zip`"),
    ],
)
def test_of_a_path_only_its_last_part_is_told(server: TestClient, text: str, told: str) -> None:
    workshop = server.app.state.workshop
    data = workshop.settings.data.resolve()

    assert workshop.without_paths(text.format(data=data)) == told


def test_a_failed_job_tells_no_paths(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "`/home/owner/secret/model`"
    problem = {"field": "rank", "message": f"{place} is none", "hint": f"not {place}"}
    result = {"error": f"{place} is broken", "hint": f"mend {place}"}
    monkeypatch.setenv("FAKE_FAIL", "crash")
    monkeypatch.setenv("FAKE_RESULT", json.dumps(result))
    note = {"event": "note", "note": "warning", "field": "rank", "message": f"{place} is old"}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([note]))
    server = make_server()

    failed = str(ended(server))
    monkeypatch.setenv("FAKE_RESULT", json.dumps({**result, "problems": [problem]}))
    wrong = str(ended(server))

    for told, text in ((failed, "`model` is broken"), (wrong, "`model` is none")):
        assert text in told
        assert "`model` is old" in told
        assert "/home" not in told


def test_a_full_disk_is_told_without_its_place(
    server: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise DiskError("`/srv/secret` could not be written", "")

    workshop = server.app.state.workshop
    monkeypatch.setattr(workshop.queue, "submit", full)
    monkeypatch.setattr(workshop.files, "expect", full)

    for answer in (
        server.post(APP, json=REQUEST),
        server.post("/storage/upload/initiate", json={}),
    ):
        assert answer.status_code == 507
        assert "cannot write to its disk" in answer.text
        assert "secret" not in answer.text
    assert "/srv/secret" in caplog.text


def test_the_data_folder_is_for_its_owner_alone(make_server: MakeServer, tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "files").mkdir(parents=True)
    (there / "server.sqlite3").touch()
    for path in (there, there / "files", there / "server.sqlite3"):
        path.chmod(0o755)
    make_server()
    make_server(data=there)

    new = tmp_path / "data"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (new, *new.iterdir())]
    assert all(mode & 0o077 == 0 for mode in modes[:1])
    for path in (new / "files", new / "jobs", there / "files", *there.glob("server.sqlite3*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize(
    "name", ["TRAINER_KEYS", "TRAINER_JOB_COMMAND", "TRAINER_GENERATION_COMMAND"]
)
def test_jobs_do_not_get_what_is_the_servers_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "photos.lan")

    for got in (Slot("0", tmp_path).environment(), _environment_of(run(["env"]).stdout)):
        assert name not in got
        assert got["TRAINER_ALLOWED_HOSTS"] == "photos.lan"
        assert got["PATH"].endswith(os.environ["PATH"])


def _environment_of(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
