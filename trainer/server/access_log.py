"""One line of JSON for every request: what was asked, and how it ended; nothing that is secret.

No headers and no queries, which hold keys and tokens. Of the id of a file, by which anyone may
fetch it, only the beginning is written, and of a token, which may stand in a path, nothing. What
clients ask again and again leaves no line.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence

from starlette.types import Scope

# Clients poll these several times a second.
_POLLED = ("/healthz", "/metrics", "/status", "/get_result", "/task-result", "/subject", "/style")
_FILE_ID = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}")
# What follows this word is one, and anything else that has a token's length and letters may be.
_TOKEN = re.compile(r"(?<=/multipart/)[^/]+|(?<=/)[A-Za-z0-9_-]{32}(?=/|$)")
_LONGEST_PATH = 300

log = logging.getLogger("trainer.server.access")


def note_request(scope: Scope, paths: Sequence[str], *, id: str, status: int, began: float) -> None:
    """Writes the line of a request that is over.

    Args:
        paths: that it was asked under, and those that it was answered for.
        id: of the request.
        status: of the answer; 499 where the client left before one.
        began: by `time.perf_counter`.
    """
    method, path = scope["method"], " → ".join(paths)
    if method in ("GET", "HEAD") and path.rstrip("/").endswith(_POLLED) and status < 500:
        return
    client = scope.get("client")
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": method,
        "path": _TOKEN.sub("…", _FILE_ID.sub(r"\1…", path))[:_LONGEST_PATH],
        "status": status,
        "ms": round((time.perf_counter() - began) * 1000, 1),
        "request": id,
        "client": client[0] if client else None,
    }
    # Paths are strangers' text: escaped, none makes a line of its own or moves a terminal's cursor.
    log.info("%s", json.dumps(line))
