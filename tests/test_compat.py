"""The real `fal_client`, patched, against a server that writes down what it is asked."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import fal_client
import pytest

from trainer.compat.fal import patch_fal
from trainer.errors import InputError

ROOT = Path(__file__).parent.parent
NAMES = ["QUEUE_URL_FORMAT", "RUN_URL_FORMAT", "REST_URL", "CDN_URL", "REALTIME_URL_FORMAT"]
CONFIG = {"model_type": "flux-lora", "training_images": ["data:,"], "trigger_word": "TOK"}

# The package leaves the connection of an upload to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


class Recorder(BaseHTTPRequestHandler):
    """Answers what the service answers, as far as the client reads it."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, content))  # type: ignore[attr-defined]
        base = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        request = f"{base}/fal-ai/flux-lora/requests/7"
        answers: dict[str, Any] = {
            "/storage/auth/token": {
                "token": "t",
                "token_type": "Bearer",
                "base_url": base,
                "expires_at": "2999-01-01T00:00:00+00:00",
            },
            "/files/upload": {"access_url": f"{base}/files/1"},
            "/run/fal-ai/flux-lora": {"by": "run"},
            "/fal-ai/flux-lora": {
                "request_id": "7",
                "response_url": request,
                "status_url": f"{request}/status",
                "cancel_url": f"{request}/cancel",
            },
        }
        text = json.dumps(answers[path]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class Standin:
    """A server's address and what it was asked."""

    def __init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
        self.asked: list[tuple[str, str, bytes]] = []
        self.server.asked = self.asked  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    monkeypatch.setenv("FAL_KEY", "any:key")
    standin = Standin()
    thread = threading.Thread(target=standin.server.serve_forever, args=(0.01,))
    thread.start()
    yield standin
    # The package's own clients live as long as the process, with their connections.
    kept = vars(fal_client.sync_client).pop("_client", None)
    if kept is not None:
        kept.close()
    if any(path == "/files/upload" for _, path, _ in standin.asked):
        # Now, where the complaint is known, and not in a later test.
        gc.collect()
    standin.server.shutdown()
    standin.server.server_close()
    thread.join()


def test_uploading_submitting_and_running_go_to_the_address_over_plain_http(
    standin: Standin,
) -> None:
    with patch_fal(standin.address):
        url = fal_client.upload(b"zip", "application/zip", "me.zip")
        handle = fal_client.submit("fal-ai/flux-lora", {"images_data_url": url})
        ran = fal_client.run("fal-ai/flux-lora", {})

    assert url == f"{standin.address}/files/1"
    assert handle.status_url == f"{standin.address}/fal-ai/flux-lora/requests/7/status"
    assert ran == {"by": "run"}
    assert [path for _, path, _ in standin.asked] == [
        "/storage/auth/token",
        "/files/upload",
        "/fal-ai/flux-lora",
        "/run/fal-ai/flux-lora",
    ]
    assert standin.asked[1][2] == b"zip"


def test_train_model_submits_the_configuration_and_gives_a_training_id(standin: Standin) -> None:
    with patch_fal(f"{standin.address}/"):
        response = fal_client.train_model(CONFIG)  # type: ignore[attr-defined]

    assert response["training_id"] == "7"
    (asked,) = standin.asked
    assert asked[:2] == ("POST", "/fal-ai/flux-lora")
    assert json.loads(asked[2]) == CONFIG


def test_train_model_can_be_awaited(standin: Standin) -> None:
    async def work() -> dict[str, str]:
        response = await fal_client.train_model_async(CONFIG)  # type: ignore[attr-defined]
        await (await fal_client.async_client._client).aclose()
        del vars(fal_client.async_client)["_client"]
        return dict(response)

    with patch_fal(standin.address):
        assert asyncio.run(work())["training_id"] == "7"


def test_undoing_puts_everything_back() -> None:
    before = {name: vars(fal_client.client)[name] for name in NAMES}

    patch = patch_fal("https://box.example.org/trainer/")
    changed = {name: vars(fal_client.client)[name] for name in NAMES}
    inner = patch_fal("http://127.0.0.1:1")
    inner.undo()
    again = {name: vars(fal_client.client)[name] for name in NAMES}
    patch.undo()
    patch.undo()

    base = "https://box.example.org/trainer"
    assert list(changed.values()) == [
        *(f"{base}/", f"{base}/run/", base, base),
        "wss://box.example.org/trainer/run/",
    ]
    assert again == changed
    assert {name: vars(fal_client.client)[name] for name in NAMES} == before
    assert not hasattr(fal_client, "train_model")


def test_a_name_that_another_module_of_the_package_took_over_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = ModuleType("fal_client.reader")
    stranger = ModuleType("fal_clients")
    for module in (reader, stranger):
        vars(module)["REST_URL"] = fal_client.client.REST_URL
        monkeypatch.setitem(sys.modules, module.__name__, module)

    with patch_fal("http://127.0.0.1:1"):
        assert vars(reader)["REST_URL"] == "http://127.0.0.1:1"
        assert vars(stranger)["REST_URL"] == "https://rest.fal.ai"
    assert vars(reader)["REST_URL"] == "https://rest.fal.ai"


def test_an_upload_before_the_patch_does_not_keep_the_service_s_address(
    standin: Standin,
) -> None:
    kept = fal_client.sync_client._token_manager
    assert kept._url.startswith("https://rest.fal.ai/")

    with patch_fal(standin.address):
        fal_client.upload(b"zip", "application/zip")
        here = fal_client.sync_client._token_manager

    assert here._url.startswith(standin.address)
    assert "_token_manager" not in vars(fal_client.sync_client)


@pytest.mark.parametrize("address", ["127.0.0.1:8700", "ftp://box", "http://", "http://a b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is not an address"):
        patch_fal(address)


def test_a_package_of_another_make_is_refused_by_version_and_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(fal_client.client, "CDN_URL")

    with pytest.raises(InputError, match=rf"version {fal_client.__version__} has no CDN_URL"):
        patch_fal()
    assert fal_client.client.REST_URL == "https://rest.fal.ai"


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fal_client", None)

    with pytest.raises(InputError, match="pip install fal-client"):
        patch_fal()


@pytest.mark.parametrize("config", [{}, {"model_type": 3}, {"model_type": "../../x"}])
def test_a_training_without_a_kind_of_model_is_refused(config: dict[str, object]) -> None:
    with (
        patch_fal("http://127.0.0.1:1"),
        pytest.raises(InputError, match="names no kind of model"),
    ):
        fal_client.train_model(config)  # type: ignore[attr-defined]


# The guide's own lines, which name no address.
SCRIPT = """
import sys, beside
import fal_client
response = fal_client.train_model({"model_type": "flux-lora", "training_images": []})
training_id = response['training_id']
print(training_id, sys.argv, __name__, beside.here, "torch" in sys.modules)
"""


def patched_run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.compat.fal", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


def test_an_unchanged_program_runs_patched_without_torch(standin: Standin, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "beside.py").write_text("here = True\n")
    (folder / "guide.py").write_text(SCRIPT)

    code, said, errors = patched_run(
        tmp_path, "programs/guide.py", "--flag", "x", TRAINER_URL=standin.address
    )

    assert (code, errors) == (0, "")
    assert said == "7 ['programs/guide.py', '--flag', 'x'] __main__ True False"


def test_a_program_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    code, _, errors = patched_run(tmp_path, "nowhere.py")

    assert code == 2
    assert "`nowhere.py` is not a file" in errors
    assert "Traceback" not in errors


def test_the_javascript_client_is_pinned_without_the_address_of_a_registry() -> None:
    wanted = json.loads((ROOT / "tests/server/js/package.json").read_text())
    lock = json.loads((ROOT / "tests/server/js/package-lock.json").read_text())

    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert wanted["dependencies"] == {
        "@fal-ai/client": packages["node_modules/@fal-ai/client"]["version"]
    }
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert "resolved" not in json.dumps(lock)
