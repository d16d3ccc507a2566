"""A stand-in for the Hugging Face hub on this machine: the routes that an upload goes through.

It keeps what it is sent, and plays the hub's refusals. Large files come by Git LFS; the hub's own
client would send them by Xet to the real one, which nothing here plays.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

TOKEN = "hf_standInTokenOfAnnaAlone"
READS_ONLY = "hf_standInTokenThatOnlyReads"
ACCOUNTS = {TOKEN: ("anna", "write"), READS_ONLY: ("anna", "read")}


@dataclass
class Repository:
    """What was sent to one repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in has and hears.

    Args:
        address: of its server.
        repositories: by `owner/name`.
        requests: method and path of each, in order.
        refusing: the status of every commit, where none is to be made.
        slow: seconds that every large file takes.
        private: whether a repository is, of which nobody says it, as an organisation may choose.
    """

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusing: int = 0
    slow: float = 0.0
    private: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)

    def commit(self, repository: Repository, lines: bytes) -> str:
        """Takes what a commit says."""
        for entry in map(json.loads, lines.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                repository.files[value["path"]] = self.stored[value["oid"]]
        return f"{len(repository.commits):040x}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _account(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return ACCOUNTS.get(token)

    def _heard(self) -> str:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def do_GET(self) -> None:
        path, account = self._heard(), self._account()
        if account is None:
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            name, role = account
            return self._answer(200, {"name": name, "auth": {"accessToken": {"role": role}}})
        name = path.removeprefix("/api/models/")
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        return self._answer(200, {"id": name, "private": repository.private, "sha": "0" * 40})

    def do_POST(self) -> None:
        path, body, account = self._heard(), self._body(), self._account()
        if account is None or account[1] != "write":
            return self._answer(403, {"error": "Forbidden"})
        if path == "/api/repos/create":
            return self._create(json.loads(body), account[0])
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        name, _, route = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        assert route == "" or route in ("preupload", "commit"), path
        return self._preupload(body) if route == "preupload" else self._commit(name, body)

    def do_PUT(self) -> None:
        path, body = self._heard(), self._body()
        time.sleep(self.hub.slow)
        digest = hashlib.sha256(body).hexdigest()
        assert path == f"/store/{digest}"
        self.hub.stored[digest] = body
        self._answer(200)

    def _create(self, asked: dict[str, Any], owner: str) -> None:
        name = f"{asked['organization'] or owner}/{asked['name']}"
        url = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        by_default = "private" if self.hub.private else "public"
        # Older clients say it by `private`.
        said = {True: "private", False: "public", None: by_default}[asked.get("private")]
        is_private = asked.get("visibility", said) == "private"
        self.hub.repositories[name] = Repository(is_private)
        return self._answer(200, {"url": url})

    def _preupload(self, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/store/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        if self.hub.refusing:
            return self._answer(self.hub.refusing, {"error": "You have no room left"})
        oid = self.hub.commit(self.hub.repositories[name], body)
        url = f"{self.hub.address}/{name}/commit/{oid}"
        return self._answer(200, {"commitUrl": url, "commitOid": oid})


@contextmanager
def stand_in_hub(home: Path, *, token: str | None = TOKEN) -> Iterator[Hub]:
    """While this lasts, the hub of this process and of those that it starts is the stand-in.

    Args:
        home: the folder where the hub's client keeps tokens.
        token: that it finds there, as after `hf auth login`; None: there is none.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    home.mkdir(parents=True, exist_ok=True)
    if token is not None:
        (home / "token").write_text(token)
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with patch.dict(os.environ, own):
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
                os.environ.pop(name, None)
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
