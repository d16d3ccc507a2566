"""Pictures by fal's names: the body tells them from a training, and results act as LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from test_fal_queue import GUIDE, ended, submit

APP = "fal-ai/flux-lora"


def asked(tmp_path: Path, submitted: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "data/jobs" / submitted["request_id"] / "run/generation.json"
    request: dict[str, Any] = json.loads(path.read_text())
    return request


def test_a_prompt_makes_pictures_with_the_services_defaults(
    server: TestClient, tmp_path: Path
) -> None:
    submitted = submit(server, APP, json={"prompt": "a cat", "num_images": 2, "seed": 7})
    status = ended(server, submitted)
    result = server.get(submitted["response_url"]).json()
    request = asked(tmp_path, submitted)

    assert "training_id" not in submitted
    # The types of the service's own client have these.
    assert (request["width"], request["height"]) == (1024, 768)
    assert (request["num_inference_steps"], request["guidance_scale"]) == (28, 3.5)
    assert request["model"] == {"model_url": "black-forest-labs/FLUX.1-dev"}
    assert result.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert (result["prompt"], result["seed"]) == ("a cat", 7)
    assert result["has_nsfw_concepts"] == [False, False]
    # The fake job's picture has one pixel: the size is the file's.
    assert [(i["width"], i["height"]) for i in result["images"]] == [(1, 1), (1, 1)]
    assert server.get(result["images"][1]["url"]).headers["content-type"] == "image/jpeg"
    assert result["timings"]["inference"] == status["metrics"]["inference_time"]


def test_a_result_is_a_lora_by_its_address_at_a_scale(server: TestClient, tmp_path: Path) -> None:
    training = submit(server, APP, json=GUIDE)
    ended(server, training)
    url = server.get(training["response_url"]).json()["diffusers_lora_file"]["url"]
    body = {"prompt": "TOK", "loras": [{"path": url, "scale": 0.5}], "image_size": "square"}
    submitted = submit(server, APP, json=body)
    ended(server, submitted)
    request = asked(tmp_path, submitted)

    run = tmp_path / "data/jobs" / training["request_id"] / "run"
    assert request["trained"] == [{"run": str(run), "strength": 0.5}]
    # The base model is the one that it was trained on.
    assert request["model"] == {}
    assert (request["width"], request["height"]) == (512, 512)


def test_what_no_training_here_made_is_no_lora(server: TestClient) -> None:
    upload = server.post("/files/upload", content=b"lora").json()["access_url"]
    for path in ("https://hf.example/lora.safetensors", "http://[", upload):
        answer = server.post(f"/{APP}", json={"prompt": "x", "loras": [{"path": path}]})

        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "loras", 0, "path"]


WRONG: dict[str, list[object]] = {
    "image_size": ["huge", {"width": 5}],
    "num_images": [0],
    "seed": [-1],
    "output_format": ["gif"],
    "num_inference_steps": ["28"],
    "loras": [[{"path": "x", "scale": 4.1}], [{"path": "x", "scale": -0.1}]],
}


def test_a_picture_field_that_cannot_be_meant_is_named(server: TestClient) -> None:
    for field, values in WRONG.items():
        for value in values:
            answer = server.post(f"/{APP}", json={"prompt": "x", field: value})

            assert answer.status_code == 422
            assert answer.json()["detail"][0]["loc"][:2] == ["body", field]


def test_neither_pictures_nor_a_prompt_names_both(server: TestClient) -> None:
    answer = server.post(f"/{APP}", json={"seed": 1})
    fields = [detail["loc"] for detail in answer.json()["detail"]]

    assert answer.status_code == 422
    assert fields == [["body", "training_images"], ["body", "prompt"]]
    assert "to make pictures" in answer.json()["message"]


def test_other_bases_take_their_own_size_and_guidance(server: TestClient, tmp_path: Path) -> None:
    submitted = submit(server, "fal-ai/sd15-lora", json={"prompt": "x", "negative_prompt": "y"})
    ended(server, submitted)
    request = asked(tmp_path, submitted)

    assert request["model"] == {"model_url": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    assert (request["width"], request["guidance_scale"]) == (None, None)
    assert request["negative_prompt"] == "y"


def test_fields_that_pictures_do_not_have_are_told_in_log_and_result(server: TestClient) -> None:
    size = {"width": 64, "height": 64, "depth": 1}
    body = {"prompt": "x", "enable_safety_checker": True, "sparkle": 1, "image_size": size}
    submitted = submit(server, APP, json=body)
    logs = ended(server, submitted)["logs"]
    result = server.get(submitted["response_url"]).json()

    assert result["ignored_options"].keys() == {
        "request.enable_safety_checker",
        "request.sparkle",
        "request.image_size.depth",
    }
    warned = {line["message"] for line in logs if line["level"] == "WARN"}
    assert "ignored: request.enable_safety_checker there is no safety checker here" in warned


def test_pictures_come_in_the_answer_itself_where_that_is_asked_for(server: TestClient) -> None:
    body = {"prompt": "x", "sync_mode": True, "output_format": "png"}
    answer = server.post(f"/run/{APP}", json=body)

    assert answer.json()["images"][0]["url"].startswith("data:image/png;base64,iVBOR")


def lora_of(server: TestClient, app: str, **more: Any) -> str:
    """The address of what a training gave."""
    training = submit(server, app, json={**GUIDE, "model_type": app.partition("/")[2], **more})
    ended(server, training)
    return str(server.get(training["response_url"]).json()["diffusers_lora_file"]["url"])


def test_a_lora_of_another_base_model_is_refused_with_the_app_that_takes_it(
    server: TestClient, tmp_path: Path
) -> None:
    url = lora_of(server, "fal-ai/sdxl-lora")
    body = {"prompt": "TOK", "loras": [{"path": url, "scale": 4}]}

    refused = server.post("/fal-ai/flux-lora", json=body)
    taken = submit(server, "fal-ai/sdxl-lora", json=body)
    ended(server, taken)

    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "loras", 0, "path"]
    assert "`fal-ai/sdxl-lora`" in refused.json()["message"]
    assert asked(tmp_path, taken)["trained"][0]["strength"] == 4


def test_a_lora_of_a_base_model_of_its_own_is_put_on_the_app_s(
    server: TestClient, tmp_path: Path
) -> None:
    job = {"model_url": "someone/made-of-sdxl", "photo_class": "Man"}
    job["images_data_url"] = "https://x.example/a.zip"
    training = submit(server, "fal-ai/personalization", json=job)
    ended(server, training)
    url = server.get(training["response_url"]).json()["config_file"]["url"]
    submitted = submit(server, "fal-ai/sdxl-lora", json={"prompt": "x", "loras": [{"path": url}]})
    logs = ended(server, submitted)["logs"]

    request = asked(tmp_path, submitted)
    assert request["model"]["model_url"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert any("another base model" in line["message"] for line in logs)


def test_pictures_that_fail_say_in_the_request_s_words_what_was_wrong_and_left_aside(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ("width", "trained", "model_url", "prompt")
    problems = [{"field": field, "message": "is wrong", "hint": ""} for field in found]
    failed = {"status": "failed", "error_kind": "input", "error": "no", "problems": problems}
    monkeypatch.setenv("FAKE_RESULT", json.dumps(failed))

    submitted = submit(server, APP, json={"prompt": "x", "sparkle": 1})
    ended(server, submitted)
    body = server.get(submitted["response_url"]).json()

    places = [detail["loc"] for detail in body["detail"]]
    assert places == [["body", "image_size"], ["body", "loras"], ["body"], ["body", "prompt"]]
    assert body["ignored_options"].keys() == {"request.sparkle"}


def test_a_request_may_be_refused_where_too_many_wait(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "30")
    for _ in range(3):
        submit(server, APP, json=GUIDE)
    # One runs, or is about to; two wait at least.
    longer = server.post(f"/{APP}?fal_max_queue_length=1", json={"prompt": "x"})
    taken = server.post(f"/{APP}?fal_max_queue_length=9", json={"prompt": "x"})
    wrong = server.post(f"/{APP}?fal_max_queue_length=few", json={"prompt": "x"})

    assert (longer.status_code, taken.status_code, wrong.status_code) == (507, 200, 422)
    assert "`fal_max_queue_length` is 1" in longer.json()["detail"]
    assert wrong.json()["detail"][0]["loc"] == ["query", "fal_max_queue_length"]
