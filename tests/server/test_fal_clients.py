"""fal's real clients, Python's and JavaScript's, against a server on loopback with fake jobs."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fal_client
import httpx2
import pytest
from fal_client.client import MultipartUpload
from running import RunningServer, fake_jobs_environment, running_server

from trainer.compat.fal import patch_fal

APP = "fal-ai/personalization"
PROGRAMS = Path(__file__).parent / "js"

# The package leaves its connections to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose jobs are fake, and take half a second."""
    environment = {**fake_jobs_environment(), "FAKE_SECONDS": "0.5"}
    data = tmp_path_factory.mktemp("server") / "data"
    with running_server(data, "--gpus", "0", environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Any]:
    """Python's client, pointed at the server."""
    with pytest.MonkeyPatch.context() as environment, patch_fal(server.url):
        environment.setenv("FAL_KEY", "id:secret")
        yield fal_client.SyncClient()
    # Now, where the complaints are known, and not in a later test.
    gc.collect()


def javascript(program: str, server: RunningServer, fields: object, *files: str) -> dict[str, Any]:
    """What a program of JavaScript's client says."""
    node = shutil.which("node")
    assert node, "the tests need Node.js"
    command = [node, str(PROGRAMS / program), server.url, APP, json.dumps(fields), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_python_uploads_follows_the_states_and_downloads(
    client: Any, server: RunningServer
) -> None:
    url = client.upload(b"zip", "application/zip", "me.zip")
    handle = client.submit(APP, {"images_data_url": url, "photo_class": "Man"}, priority="low")
    states = list(handle.iter_events(with_logs=True, interval=0.05))
    silent = list(handle.iter_events(with_logs=False, interval=0.05))
    result = handle.get()

    assert httpx2.get(url).content == b"zip"
    assert isinstance(states[-1], fal_client.Completed)
    assert states[-1].logs[-1]["message"].startswith("step 4 of 4")
    assert states[-1].error is None
    assert silent[-1].logs is None
    assert httpx2.get(result["kohya_lora_file"]["url"]).content == b"kohya"


def test_python_sees_bad_input_by_field(client: Any) -> None:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        client.submit(APP, {"images_data_url": "https://a.example/a.zip"})

    assert caught.value.status_code == 422
    assert caught.value.response.json()["detail"][0]["loc"] == ["body", "photo_class"]


def test_python_runs_and_cancels(client: Any) -> None:
    request = {"images_data_url": "https://a.example/a.zip", "photo_class": "Man"}
    ran = client.run(APP, request)
    handle = client.submit(APP, request)
    handle.cancel()
    (*_, last) = handle.iter_events(interval=0.05)
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        handle.get()

    assert "config_file" in ran
    assert last.error_type == caught.value.error_type == "client_cancelled"
    assert caught.value.status_code == 499


def test_python_uploads_in_parts_at_once(client: Any) -> None:
    content = os.urandom(50_000)
    url = MultipartUpload.save(
        client=client._get_cdn_client(),
        token_manager=client._token_manager,
        file_name="me.zip",
        data=content,
        chunk_size=8_000,
    )

    assert httpx2.get(url).content == content


def test_python_falls_back_to_the_older_storage(client: Any) -> None:
    url = client.upload(b"zip", "application/zip", "me.zip", repository="fal")

    assert httpx2.get(url).content == b"zip"


def test_python_asks_for_pictures_while_it_awaits(client: Any) -> None:
    async def pictures() -> dict[str, Any]:
        asking = fal_client.AsyncClient()
        made = await asking.subscribe("fal-ai/flux-lora", {"prompt": "a cat", "num_images": 2})
        await (await asking._client).aclose()
        return dict(made)

    assert len(asyncio.run(pictures())["images"]) == 2


def test_the_guides_own_lines_train(client: Any) -> None:
    config = {
        "model_type": "sdxl-lora",
        "training_images": ["data:image/png;base64,iVBORw0KGgo="],
        "trigger_word": "SIDAI",
        "num_epochs": 1000,
        "learning_rate": 1e-4,
    }
    training_id = fal_client.train_model(config)["training_id"]

    assert client.result("fal-ai/sdxl-lora", training_id).keys() >= {"diffusers_lora_file"}


def test_javascript_uploads_a_blob_and_polls(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "me.zip").write_bytes(b"zip")
    fields = {"photo_class": "Man"}
    said = javascript("subscribe.mjs", server, fields, f"images_data_url={tmp_path / 'me.zip'}")

    assert said["statuses"][-1] == "COMPLETED"
    assert said["requestId"] == said["enqueued"] != ""
    assert said["logs"][-1]["message"].startswith("step 4 of 4")
    assert said["data"]["kohya_lora_file"]["file_size"] == 5


def test_javascript_adds_the_lines_of_a_stream_up_to_the_log(server: RunningServer) -> None:
    said = javascript("stream.mjs", server, {"photo_class": "Man", "images_data_url": "data:,x"})
    status = httpx2.get(f"{server.url}/requests/{said['requestId']}/status?logs=1").json()

    # Were each event to have all lines, they would be there many times.
    assert said["logs"] == status["logs"]
    assert said["last"]["status"] == said["statuses"][-1] == "COMPLETED"


def test_javascript_shows_what_is_wrong_by_field(server: RunningServer) -> None:
    said = javascript("errors.mjs", server, {"images_data_url": "data:,x", "rank": 0})

    assert (said["error"]["name"], said["error"]["status"]) == ("ValidationError", 422)
    assert "photo_class" in said["error"]["message"]
    assert said["named"].keys() == {"photo_class", "rank"}


def test_javascript_cancels_and_is_told_so(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANCEL_AT", "IN_PROGRESS")
    said = javascript("cancel.mjs", server, {"photo_class": "Man", "images_data_url": "data:,x"})

    assert said["statuses"][-1] == "COMPLETED"
    assert said["status"]["error_type"] == "client_cancelled"
    assert said["error"]["status"] == 499
    assert said["error"]["message"] == "the request was cancelled"
