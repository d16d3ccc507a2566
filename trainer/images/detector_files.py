"""YuNet's file of weights: fetched from the hub once, and checked.

What reads it is not known here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from trainer.images.findings import first_line

# MIT licence; the checksum is that of github.com/opencv/opencv_zoo.
YUNET_HUB = "opencv/face_detection_yunet"
YUNET_FILE = "face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"

# What the hub's client raises, and below it its own transports.
_HUB_FAILURES = (OSError, EntryNotFoundError, HTTPError, RuntimeError)


class Missing(Exception):
    """YuNet's file or the part of OpenCV that runs it cannot be had; its text is the reason."""


def yunet_file() -> bytes:
    """YuNet's file from the hub, or from its cache.

    Raises:
        Missing: it cannot be had, or is another file.
    """
    try:
        path = Path(hf_hub_download(YUNET_HUB, YUNET_FILE))
        content = path.read_bytes()
    except _HUB_FAILURES as error:
        message = f"its file (0.2 MB) could not be downloaded ({first_line(error)})"
        raise Missing(message) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest == YUNET_SHA256:
        return content
    # The name in the cache is a link to the content.
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise Missing(
        f"`{YUNET_FILE}`: its checksum differs (got {digest}); it is deleted here and downloaded "
        "again next time"
    )
