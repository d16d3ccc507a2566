"""BFL's own example program, through a finetune and a picture with it, against a server."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import bfl_finetune
import httpx2
import pytest
import requests
from PIL import Image
from running import running_server


def test_the_script_finetunes_makes_a_picture_and_deletes(
    tmp_path: Path, fake_jobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "finetuning.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "0.png")
        archive.writestr("0.txt", "a photo of TOK")
    with running_server(tmp_path / "data", "--gpus", "cpu") as server:
        monkeypatch.setenv("BFL_API_URL", server.url)
        monkeypatch.setenv("BFL_API_KEY", "any-key")

        asked = bfl_finetune.request_finetuning(str(tmp_path / "finetuning.zip"), "myfirstfinetune")
        id = asked["finetune_id"]
        _ready(bfl_finetune.finetune_progress, id)
        listed = bfl_finetune.finetune_list()
        details = bfl_finetune.finetune_details(id)
        made = bfl_finetune.finetune_inference(id, prompt="image of a TOK", seed=1)
        picture = _ready(bfl_finetune.get_inference, made["id"])["result"]
        content = httpx2.get(picture["sample"]).content
        deleted = bfl_finetune.finetune_delete(id)

        assert listed == {"finetunes": [id]}
        assert details["finetune_details"]["finetune_comment"] == "myfirstfinetune"
        assert (picture["prompt"], picture["seed"]) == ("image of a TOK", 1)
        assert content.startswith(b"\x89PNG")
        assert deleted["deleted_finetune_id"] == id
        with pytest.raises(requests.exceptions.RequestException, match="Task not found"):
            bfl_finetune.finetune_progress(id)


def _ready(ask: Any, id: str) -> dict[str, Any]:
    until = time.monotonic() + 30
    while (told := ask(id))["status"] == "Pending":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert told["status"] == "Ready", told
    answer: dict[str, Any] = told
    return answer
