"""The server around its protocols: files, health, measurements, its description, tidy paths."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from trainer.errors import InputError
from trainer.server import upkeep
from trainer.server.app import only_server
from trainer.server.queue import NewJob
from trainer.server.tidying import tidied


@pytest.mark.parametrize(
    ("path", "host", "expected"),
    [
        ("//v3/training", "localhost", "/v3/training"),
        ("/fal-ai/x/requests/1/status/", "localhost", "/fal-ai/x/requests/1/status"),
        ("/", "localhost", "/"),
        ("/fal-ai/x", "queue.fal.run", "/fal-ai/x"),
        ("/fal-ai/x", "fal.run", "/run/fal-ai/x"),
        ("/fal-ai/x", "FAL.run", "/run/fal-ai/x"),
        ("/files/1/a", "fal.run", "/files/1/a"),
        ("/files/upload", "v3.fal.media", "/files/upload"),
        ("/v1/finetune", "api.us1.bfl.ai", "/v1/finetune"),
    ],
)
def test_paths_are_tidied_and_hosts_have_their_place(path: str, host: str, expected: str) -> None:
    assert tidied(path, host) == expected


def stored(server: TestClient, content: bytes, name: str, content_type: str) -> str:
    headers = {"X-Fal-File-Name": name, "Content-Type": content_type}
    url: str = server.post("/files/upload", content=content, headers=headers).json()["access_url"]
    return url.removeprefix(str(server.base_url).rstrip("/"))


def test_a_file_is_fetched_whole_or_by_range(server: TestClient) -> None:
    address = stored(server, b"0123456789", "lora.safetensors", "application/octet-stream")

    whole = server.get(address)
    part = server.get(address, headers={"Range": "bytes=2-4"})

    assert (whole.status_code, whole.content) == (200, b"0123456789")
    assert (part.status_code, part.content) == (206, b"234")
    assert server.head(address).headers["content-length"] == "10"


@pytest.mark.parametrize(
    ("content_type", "disposition"),
    [
        ("image/png", "inline"),
        ("application/json", "inline"),
        ("image/svg+xml", "attachment"),
        ("text/html", "attachment"),
        ("application/zip", "attachment"),
    ],
)
def test_a_browser_shows_only_what_can_do_no_harm(
    server: TestClient, content_type: str, disposition: str
) -> None:
    answer = server.get(stored(server, b"x", "file", content_type))

    assert answer.headers["content-disposition"].startswith(disposition)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox")


def test_a_file_is_found_by_its_id_alone(server: TestClient) -> None:
    address = stored(server, b"x", "a.png", "image/png")
    id = address.split("/")[2]

    assert server.get(f"/files/{id}/other.png").content == b"x"
    assert server.get(f"/files/{'0' * 32}/a.png").status_code == 404
    assert server.get("/files/../server.sqlite3").status_code == 404


def test_an_upload_that_has_not_come_yet_is_not_there(server: TestClient) -> None:
    file, _ = server.app.state.workshop.files.expect("a", "image/png")

    assert server.get(file.address).status_code == 404


def test_health_is_told_as_long_as_the_dispatcher_works(server: TestClient) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}

    server.app.state.tasks[0].cancel()

    deadline = time.monotonic() + 5
    while server.get("/healthz").status_code == 200:
        assert time.monotonic() < deadline


def test_measurements_are_in_prometheus_words(server: TestClient) -> None:
    text = server.get("/metrics").text

    assert 'trainer_jobs{state="queued"} 0' in text.splitlines()
    assert all(line.startswith(("#", "trainer_")) for line in text.splitlines())


def test_a_folder_has_one_server_at_a_time(tmp_path: Path) -> None:
    with (
        only_server(tmp_path / "data"),
        pytest.raises(InputError, match="another server is running"),
        only_server(tmp_path / "data"),
    ):
        pass


MakeServer = Callable[..., TestClient]


def old_job(server: TestClient) -> str:
    workshop = server.app.state.workshop
    new = NewJob("fal", "x", "training", {}, "rank: 4\n", fingerprint="x")
    job = workshop.queue.submit(new)
    deadline = time.monotonic() + 10
    while not workshop.queue.find(job.id).is_over:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    id: str = job.id
    return id


def test_what_the_owner_does_not_keep_goes(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server()
    workshop = server.app.state.workshop
    job = old_job(server)
    folder = workshop.folders.of(job).root
    assert folder.exists()
    parts = (workshop.queue, workshop.files, workshop.folders, workshop.room)

    upkeep.tidy(*parts, data=tmp_path / "data", days=1)
    assert workshop.queue.find(job) is not None
    upkeep.tidy(*parts, data=tmp_path / "data", days=1e-9)

    assert workshop.queue.find(job) is None
    assert workshop.files.of_job(job) == []
    assert not folder.exists()


def test_nothing_is_taken_once_the_data_folder_is_as_large_as_it_may_be(
    make_server: MakeServer,
) -> None:
    server = make_server(max_data_gib=1e-6)
    workshop = server.app.state.workshop
    workshop.room.used = 2**20

    answer = server.post(
        "/fal-ai/personalization",
        json={"images_data_url": "https://a.example/a.zip", "photo_class": "Man"},
    )

    assert answer.status_code == 507
    assert "size that its owner allows" in answer.json()["detail"]


def test_no_torch_is_loaded_by_the_server() -> None:
    program = (
        "import sys; import trainer.server.listening; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if 'torch' in heavy or 'diffusers' in heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ
    )

    assert done.returncode == 0, done.stderr


REQUEST = {"images_data_url": "https://photos.example/a.zip", "photo_class": "Man", "rank": 8}


def worked_on(server: TestClient, answer: Any) -> str:
    workshop = server.app.state.workshop
    work: str = workshop.queue.find(answer.json()["request_id"]).work
    return work


def test_the_owners_options_go_over_every_request(make_server: MakeServer, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("rank: 4\ngradient_checkpointing: true\n")
    server = make_server(overrides=tmp_path / "over.yaml")

    work = worked_on(server, server.post("/fal-ai/personalization", json=REQUEST))

    assert "rank: 4\n" in work
    assert "gradient_checkpointing: true\n" in work


@pytest.mark.parametrize("text", ["rnak: 4\n", "rank: 0\n"])
def test_a_wrong_option_of_the_owners_is_told_to_him_at_the_start(
    make_server: MakeServer, tmp_path: Path, text: str
) -> None:
    (tmp_path / "over.yaml").write_text(text)

    with pytest.raises(InputError, match=text.partition(":")[0]):
        make_server(overrides=tmp_path / "over.yaml")


def test_a_list_that_breaks_later_is_told_to_the_owner_and_not_to_strangers(
    server: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "models.yaml"
    broken.write_text("a: {rank: 4}\n")
    monkeypatch.setenv("TRAINER_BASE_MODELS", str(broken))

    answer = server.post("/fal-ai/personalization", json=REQUEST)

    assert answer.status_code == 500
    assert str(tmp_path) not in answer.text


def test_a_model_without_a_place_is_refused_without_a_path_of_the_machine(
    server: TestClient,
) -> None:
    body = {"prompt": "a", "model_name": "chilloutmix_NiPrunedFp32Fix"}
    answer = server.post("/v3/async/txt2img", json={"request": body})

    assert answer.status_code == 400
    assert "chilloutmix" in answer.text
    assert "/.config" not in answer.text
