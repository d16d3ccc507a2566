"""Novita's routes, with jobs that train nothing: what its client and its pages expect."""

from __future__ import annotations

import json
import re
import time
from io import BytesIO
from typing import Any

import pytest
import yaml
from PIL import Image
from starlette.testclient import TestClient

from trainer.server.novita import pictures
from trainer.server.workshop import Workshop

EXPERT = {
    "instance_prompt": "a close photo of ohwx man",
    "class_prompt": "person",
    "max_train_steps": 20,
    "learning_rate": "1e-4",
    "seed": None,
    "lr_scheduler": None,
    "with_prior_preservation": None,
    "prior_loss_weight": None,
    "lora_r": None,
    "lora_alpha": None,
    "lora_text_encoder_r": None,
    "lora_text_encoder_alpha": None,
}


def picture(kind: str = "PNG", color: str = "red") -> bytes:
    content = BytesIO()
    Image.new("RGB", (8, 8), color).save(content, kind)
    return content.getvalue()


def asset(server: TestClient, content: bytes | None = None) -> str:
    place = server.post("/v3/assets/training_dataset", json={"file_extension": "jpeg"}).json()
    answer = server.put(place["upload_url"], content=picture() if content is None else content)
    assert answer.status_code == 200
    return str(place["assets_id"])


def wanted(*assets: str, **more: Any) -> dict[str, Any]:
    """A request as the client sends it, null for all that is not set."""
    return {
        "name": "test_subject_01",
        "base_model": "v1-5-pruned-emaonly",
        "image_dataset_items": [{"assets_id": id} for id in assets],
        "width": 512,
        "height": 512,
        "expert_setting": EXPERT,
        "components": None,
        **more,
    }


def train(server: TestClient, *, kind: str = "subject", **more: Any) -> str:
    answer = server.post(f"/v3/training/{kind}", json=wanted(asset(server), **more))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["task_id"])


def over(server: TestClient, id: str) -> dict[str, Any]:
    """What the first answer says that is not about an unfinished training."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told: dict[str, Any] = server.get(f"/v3/training/subject?task_id={id}").json()
        if told["task_status"] not in ("QUEUING", "TRAINING"):
            return told
        time.sleep(0.02)
    raise AssertionError("it does not end")


def drawn(server: TestClient, **request: Any) -> dict[str, Any]:
    """The result of pictures that are made."""
    asked = {"model_name": "v1-5-pruned-emaonly", "prompt": "a photo", "seed": 7, **request}
    answer = server.post("/v3/async/txt2img", json={"request": asked})
    assert answer.status_code == 200, answer.text
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told: dict[str, Any] = server.get(
            f"/v3/async/task-result?task_id={answer.json()['task_id']}"
        ).json()
        if told["task"]["status"] in ("TASK_STATUS_SUCCEED", "TASK_STATUS_FAILED"):
            return told
        time.sleep(0.02)
    raise AssertionError("it does not end")


def work_of(server: TestClient, id: str) -> dict[str, Any]:
    """The configuration of a training."""
    workshop: Workshop = server.app.state.workshop
    job = workshop.queue.find(id)
    assert job is not None
    content: dict[str, Any] = yaml.safe_load(job.work)
    return content


def test_a_place_for_a_picture_is_told_as_the_pages_show_it(server: TestClient) -> None:
    answer = server.post("/v3/assets/training_dataset", json={"file_extension": "png"})

    assert answer.status_code == 200
    place = answer.json()
    assert re.fullmatch("[0-9a-f]{32}", place["assets_id"])
    assert place["upload_url"].startswith("http://127.0.0.1:8700/v3/")
    assert place["method"] == "PUT"
    assert place["headers"] == {"Host": {"values": ["127.0.0.1:8700"]}}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_taken_by_its_content_whatever_it_is_called(
    server: TestClient, kind: str
) -> None:
    place = server.post("/v3/assets/training_dataset", json={"file_extension": None}).json()

    answer = server.put(
        place["upload_url"], content=picture(kind), headers={"Content-Type": "text/html"}
    )

    assert answer.status_code == 200


@pytest.mark.parametrize("content", [b"", b"GIF89a" + bytes(100), b"<svg/>" * 100])
def test_what_is_no_picture_is_refused_and_may_be_uploaded_again(
    server: TestClient, content: bytes
) -> None:
    place = server.post("/v3/assets/training_dataset", json={}).json()

    refused = server.put(place["upload_url"], content=content)

    assert (refused.status_code, refused.json()["reason"]) == (400, "INVALID_IMAGE_FORMAT")
    assert server.put(place["upload_url"], content=picture()).status_code == 200


def test_an_upload_is_taken_once_and_with_its_token_alone(server: TestClient) -> None:
    place = server.post("/v3/assets/training_dataset", json={}).json()
    without = place["upload_url"].partition("?")[0]

    assert server.put(without, content=picture()).status_code == 404
    assert server.put(place["upload_url"], content=picture()).status_code == 200
    assert server.put(place["upload_url"], content=picture(color="blue")).status_code == 404


def test_a_training_succeeds_and_is_served_in_the_same_moment(server: TestClient) -> None:
    id = train(server)

    told = over(server, id)

    assert (told["task_id"], told["task_status"], told["model_type"]) == (id, "SUCCESS", "lora")
    (model,) = told["models"]
    assert re.fullmatch(r"model_\d{10}_[0-9A-F]{10}\.safetensors", model["model_name"])
    assert model["model_status"] == "SERVING"
    lora = told["extra"]["kohya_lora_file"]["url"]
    assert server.get(lora).content == b"kohya"


def test_before_its_end_a_training_has_a_type_and_models_all_the_same(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "30")
    told = server.get(f"/v3/training/style?task_id={train(server)}").json()

    assert told["task_status"] in ("QUEUING", "TRAINING")
    assert told["model_type"] == ""
    assert told["models"] == []
    assert isinstance(told["extra"], dict)


def test_the_pictures_of_a_training_are_the_uploaded_ones(server: TestClient) -> None:
    first, second = asset(server), asset(server, picture("JPEG", "blue"))
    body = wanted(first, second)
    id = server.post("/v3/training/subject", json=body).json()["task_id"]

    located = work_of(server, id)["data"]["images_data_url"]

    workshop: Workshop = server.app.state.workshop
    files = [workshop.files.find(asset_id) for asset_id in (first, second)]
    places = [located.find(str(file.path.resolve())) for file in files if file is not None]
    assert len(places) == 2
    assert 0 < places[0] < places[1]


def test_a_style_keeps_its_captions_and_says_its_type_in_lists(server: TestClient) -> None:
    items = [{"assets_id": asset(server), "caption": "a red square"}]
    id = train(server, kind="style", image_dataset_items=items, name="painter")

    assert "red square" in work_of(server, id)["data"]["images_data_url"].replace("%20", " ")
    (listed,) = server.get("/v3/training").json()["tasks"]
    assert (listed["task_name"], listed["task_type"]) == ("painter", "style")


def test_an_unknown_asset_is_refused_by_its_place(server: TestClient) -> None:
    unknown = "0" * 32
    refused = server.post("/v3/training/subject", json=wanted(asset(server), unknown))

    assert refused.status_code == 400
    body = refused.json()
    assert (body["code"], body["reason"]) == (400, "INVALID_REQUEST_BODY")
    assert list(body["metadata"]) == ["image_dataset_items[1].assets_id"]
    assert unknown in body["message"]


def test_an_asset_that_was_never_uploaded_is_none(server: TestClient) -> None:
    place = server.post("/v3/assets/training_dataset", json={}).json()

    refused = server.post("/v3/training/subject", json=wanted(place["assets_id"]))

    assert "image_dataset_items[0].assets_id" in refused.json()["metadata"]


def test_a_path_or_a_result_is_no_asset(server: TestClient) -> None:
    lora = over(server, train(server))["extra"]["kohya_lora_file"]["url"].split("/")[-2]

    refused = server.post("/v3/training/subject", json=wanted("/etc/hostname", lora))

    assert len(refused.json()["metadata"]) == 2


@pytest.mark.parametrize("number", [0, 51])
def test_too_few_or_too_many_pictures_are_named(server: TestClient, number: int) -> None:
    refused = server.post("/v3/training/subject", json=wanted(*[asset(server)] * number))

    assert (refused.status_code, refused.json()["reason"]) == (400, "INVALID_REQUEST_BODY")
    assert "image_dataset_items" in refused.json()["metadata"]


def test_every_wrong_field_is_named_as_the_request_names_it(server: TestClient) -> None:
    expert = {**EXPERT, "lora_r": 2, "learning_rate": "3"}
    refused = server.post(
        "/v3/training/subject",
        json=wanted(asset(server), width=None, expert_setting=expert),
    )

    assert {"width", "expert_setting.lora_r", "expert_setting.learning_rate"} <= set(
        refused.json()["metadata"]
    )


def test_lists_are_newest_first_in_pages_with_an_end(server: TestClient) -> None:
    shared = asset(server)
    ids = [
        server.post("/v3/training/subject", json=wanted(shared, name=str(number))).json()["task_id"]
        for number in range(3)
    ]

    first = server.get("/v3/training?pagination.limit=2&pagination.cursor=c_0").json()
    second = server.get("/v3/training?pagination.limit=2&pagination.cursor=c_2").json()

    assert [task["task_id"] for task in first["tasks"]] == [ids[2], ids[1]]
    assert first["pagination"]["next_cursor"] == "c_2"
    assert [task["task_id"] for task in second["tasks"]] == [ids[0]]
    assert second["pagination"]["next_cursor"] == ""
    assert isinstance(first["tasks"][0]["created_at"], int)
    assert server.get("/v3/training?task_type=style").json()["tasks"] == []


def test_a_wrong_page_is_named(server: TestClient) -> None:
    refused = server.get("/v3/training?pagination.limit=101&pagination.cursor=5")

    assert refused.status_code == 400
    assert set(refused.json()["metadata"]) == {"pagination.limit", "pagination.cursor"}


def test_a_slash_at_the_end_of_the_base_url_does_no_harm(server: TestClient) -> None:
    assert server.get("http://127.0.0.1:8700//v3/training").status_code == 200


def test_unknown_tasks_and_routes_have_words_of_their_own(server: TestClient) -> None:
    unknown = server.get("/v3/training/subject?task_id=nope")
    nothing = server.get("/v3/nothing")

    assert (unknown.status_code, unknown.json()["reason"]) == (404, "TASK_NOT_FOUND")
    assert server.get("/v3/async/task-result").json()["reason"] == "TASK_NOT_FOUND"
    assert (nothing.status_code, nothing.json()["reason"]) == (404, "API_NOT_FOUND")


def test_keys_that_lack_and_keys_that_are_wrong_are_told_apart(make_server: Any) -> None:
    server = make_server(keys=("right-key",))

    lacking = server.get("/v3/training")
    wrong = server.get("/v3/training", headers={"Authorization": "Bearer wrong"})
    right = server.get("/v3/training", headers={"Authorization": "Bearer right-key"})

    assert (lacking.status_code, lacking.json()["reason"]) == (400, "MISSING_API_KEY")
    assert (wrong.status_code, wrong.json()["reason"]) == (403, "INVALID_API_KEY")
    assert right.status_code == 200


def test_a_failed_training_names_the_field_in_the_request_s_words(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "input")

    told = over(server, train(server))

    assert told["task_status"] == "FAILED"
    assert told["models"] == []
    # The fake job complains of `rank`.
    assert "`expert_setting.lora_r`: got 0" in told["extra"]["reason"]


def test_the_same_idempotency_key_is_the_same_training(server: TestClient) -> None:
    body, key = wanted(asset(server)), {"Idempotency-Key": "once"}

    ids = {
        server.post("/v3/training/subject", json=body, headers=key).json()["task_id"]
        for _ in range(2)
    }
    other = server.post("/v3/training/subject", json={**body, "name": "b"}, headers=key)

    assert len(ids) == 1
    assert other.status_code == 400


def test_pictures_are_made_with_a_trained_model_at_its_strength(server: TestClient) -> None:
    id = train(server)
    name = over(server, id)["models"][0]["model_name"]

    told = drawn(
        server,
        model_name="v1-5-pruned-emaonly.safetensors",
        image_num=2,
        loras=[{"model_name": name, "strength": 0.7}],
        embeddings=[{"model_name": ""}],
        refiner={"switch_at": None},
        sd_vae="",
        clip_skip=None,
    )

    assert told["task"]["status"] == "TASK_STATUS_SUCCEED"
    assert [image["image_type"] for image in told["images"]] == ["png", "png"]
    assert server.get(told["images"][0]["image_url"]).content.startswith(b"\x89PNG")
    assert isinstance(told["images"][0]["image_url_ttl"], int)
    assert told["extra"] == {"seed": 7}
    workshop: Workshop = server.app.state.workshop
    (job,) = workshop.queue.listed("novita", "generation")
    work = yaml.safe_load(job.work)
    assert work["model"] == {"model_url": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    assert work["trained"] == [
        {"run": str(workshop.folders.of(id).run.root.resolve()), "strength": 0.7}
    ]
    # Without a sampler in the request it is the model's own, which fits any.
    assert (work["scheduler"], work["karras"]) == (None, False)


def test_the_id_of_pictures_stands_where_the_client_and_where_the_pages_have_it(
    server: TestClient,
) -> None:
    asked = {"request": {"model_name": "v1-5-pruned-emaonly", "prompt": "a photo"}}

    body = server.post("/v3/async/txt2img", json=asked).json()

    assert body == {"code": 0, "msg": "", "task_id": body["task_id"], "data": body["data"]}
    assert body["data"] == {"task_id": body["task_id"]}
    told = server.get(f"/v3/async/task-result?task_id={body['task_id']}").json()
    assert told["task"]["reason"] == ""
    assert isinstance(told["extra"], dict)


def test_what_is_not_done_is_named_with_the_pictures(server: TestClient) -> None:
    told = drawn(
        server,
        hires_fix={"target_width": 1024, "target_height": 768, "strength": 0.5},
        refiner={"switch_at": 0.5},
        embeddings=[{"model_name": "badhandv4"}],
        sampler_name="DPM adaptive",
        mood="bright",
        loras=[{"model_name": "", "weight": 1}],
    )

    assert set(told["extra"]["ignored_options"]) == {
        "request.hires_fix",
        "request.refiner",
        "request.embeddings",
        "request.sampler_name",
        "request.mood",
        "request.loras[0].weight",
    }


def test_what_pictures_cannot_be_made_with_is_named(server: TestClient) -> None:
    asked = {
        "model_name": "no-such-model",
        "prompt": "a photo",
        "loras": [{"model_name": "model_1_0000000000.safetensors"}],
        "sampler_name": "DPM slow",
        "sd_vae": "no-such-vae",
    }
    refused = server.post("/v3/async/txt2img", json={"request": asked})

    assert refused.status_code == 400
    assert set(refused.json()["metadata"]) == {
        "request.model_name",
        "request.loras[0].model_name",
        "request.sampler_name",
        "request.sd_vae",
    }


def test_a_model_without_a_place_is_refused_with_its_note(server: TestClient) -> None:
    asked = {"model_name": "chilloutmix_NiPrunedFp32Fix", "prompt": "a photo"}
    refused = server.post("/v3/async/txt2img", json={"request": asked})

    assert "ChilloutMix" in refused.json()["metadata"]["request.model_name"]


def test_models_that_were_trained_can_be_listed_and_fetched(server: TestClient) -> None:
    name = over(server, train(server))["models"][0]["model_name"]

    (trained,) = server.get("/v3/model?filter.source=training").json()["models"]
    public = server.get("/v3/model?filter.visibility=public&pagination.limit=100").json()

    assert (trained["sd_name"], trained["visibility"]) == (name, "private")
    assert server.get(trained["download_url"]).content == b"kohya"
    names = {model["sd_name"] for model in public["models"]}
    assert "v1-5-pruned-emaonly.safetensors" in names
    assert name not in names


def test_every_sampler_of_the_client_is_known_to_diffusers() -> None:
    # Class names of novita_client's `Samplers`; diffusers' own list is in its `schedulers`.
    client = pytest.importorskip("novita_client.proto").Samplers
    names = {value for key, value in vars(client).items() if key.isupper()}

    assert names <= set(pictures.sampler_names())


def test_what_the_job_finds_is_told_in_the_request_s_words(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ("model_url", "revision", "scheduler", "num_images", "width", "trained", "prompt")
    problems = [{"field": field, "message": "is wrong", "hint": ""} for field in found]
    failed = {"status": "failed", "error_kind": "input", "error": "no", "problems": problems}
    aside = {"scheduler": "does not fit", "request.mood": f"{pictures.SERVICE} has no such field"}
    monkeypatch.setenv("FAKE_RESULT", json.dumps({**failed, "ignored_options": aside}))

    told = drawn(server, mood="bright", sampler_name="DDIM")

    fields = re.findall(r"`(.*?)`: is wrong", told["task"]["reason"])
    assert fields == [
        "request.model_name",
        "request.model_name",
        "request.sampler_name",
        "request.image_num",
        "request.width",
        "request.loras",
        "request.prompt",
    ]
    assert told["extra"]["ignored_options"].keys() == {"request.sampler_name", "request.mood"}


def test_too_many_requests_have_the_service_s_word(make_server: Any) -> None:
    server = make_server(requests_per_second=0.01)

    answers = [server.post("/v3/assets/training_dataset", json={}) for _ in range(60)]

    refused = next(answer for answer in answers if answer.status_code != 200)
    assert (refused.status_code, refused.json()["reason"]) == (429, "RATE_LIMIT_EXCEEDED")


def test_lists_say_where_each_training_stands(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    over(server, train(server))
    monkeypatch.setenv("FAKE_FAIL", "input")
    over(server, train(server))
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.setenv("FAKE_SECONDS", "30")
    running, _ = train(server), train(server)
    while server.get(f"/v3/training/subject?task_id={running}").json()["task_status"] == "QUEUING":
        time.sleep(0.02)

    listed = server.get("/v3/training").json()["tasks"]

    assert [task["task_status"] for task in listed] == ["QUEUING", "TRAINING", "FAILED", "SUCCESS"]
    assert [len(task["models"]) for task in listed] == [0, 0, 0, 1]
