"""Novita's own Python client, through a training and pictures with it, against a server."""

from __future__ import annotations

import time
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from running import running_server

novita_client = pytest.importorskip("novita_client")


def test_the_client_uploads_trains_lists_and_makes_pictures(
    tmp_path: Path, fake_jobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novita_client.settings, "DEFAULT_POLL_INTERVAL", 0.05)
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    with running_server(tmp_path / "data", "--gpus", "cpu") as server:
        # A slash at the end makes the client ask for //v3/….
        client = novita_client.NovitaClient("any-key", f"{server.url}/")

        id = client.create_training_subject(
            name="me",
            base_model="v1-5-pruned-emaonly",
            images=[str(path) for path in paths],
            instance_prompt="a photo of ohwx man",
            class_prompt="person",
            max_train_steps="20",
            components=novita_client.FACE_TRAINING_DEFAULT_COMPONENTS,
        )
        style = client.create_training_style(
            name="a style",
            base_model="v1-5-pruned-emaonly",
            images=[str(path) for path in paths],
            captions=["noise", "more noise"],
        )
        for task in (id, style):
            until = time.monotonic() + 30
            while client.query_training_subject_status(task).task_status != "SUCCESS":
                assert time.monotonic() < until
                time.sleep(0.05)
        status = client.query_training_subject_status(id)
        listed = client.list_training()
        made = client.txt2img_v3(
            model_name="v1-5-pruned-emaonly.safetensors",
            prompt="a photo of ohwx man",
            image_num=2,
            response_image_type="png",
            # What fetches them in the client leaves threads behind.
            download_images=False,
            loras=[
                novita_client.Txt2ImgV3LoRA(model_name=status.models[0].model_name, strength=0.7)
            ],
        )

        assert [task.task_type for task in listed] == ["style", "subject"]
        assert listed.get_by_task_name("me").models[0].model_name == status.models[0].model_name
        assert status.models[0].model_status == "SERVING"
        contents = [httpx2.get(url).content for url in made.get_image_urls()]
        assert [content[:4] for content in contents] == [b"\x89PNG"] * 2
        (trained,) = client.query_model_v3(source="training", query="me").models
        assert trained.sd_name == status.models[0].model_name
