"""BFL's routes, with jobs that train nothing: what its guide and its users' programs expect."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from starlette.testclient import TestClient

from trainer import network
from trainer.known_models import VARIABLE
from trainer.server.bfl import pictures
from trainer.server.protocols import bfl
from trainer.server.queue import Job
from trainer.server.workshop import Workshop

ULTRA = "flux-pro-1.1-ultra-finetuned"


def picture(width: int = 8, height: int = 8) -> str:
    """A picture in base64."""
    content = BytesIO()
    Image.effect_noise((width, height), 90).convert("RGB").save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def archive() -> str:
    """A zip archive in base64."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("0.png", base64.b64decode(picture(64, 64)))
    return base64.b64encode(content.getvalue()).decode()


def wanted(**more: Any) -> dict[str, Any]:
    """A request as the guide's script sends it."""
    return {
        "finetune_comment": "my first finetune",
        "trigger_word": "TOK",
        "file_data": archive(),
        "iterations": 100,
        "mode": "character",
        "learning_rate": 1e-5,
        "captioning": True,
        "priority": "quality",
        "lora_rank": 32,
        "finetune_type": "full",
        **more,
    }


def post(server: TestClient, path: str, body: Any, **headers: str) -> dict[str, Any]:
    answer = server.post(f"/v1/{path}", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def over(server: TestClient, id: str) -> dict[str, Any]:
    """What the first answer says that is not about an unfinished task."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told: dict[str, Any] = server.get(f"/v1/get_result?id={id}").json()
        if told["status"] != "Pending":
            return told
        time.sleep(0.02)
    raise AssertionError("it does not end")


def finetuned(server: TestClient, **more: Any) -> str:
    """The id of a finetune that is ready."""
    id = str(post(server, "finetune", wanted(**more))["finetune_id"])
    assert over(server, id)["status"] == "Ready"
    return id


def job_of(server: TestClient, id: str) -> Job:
    workshop: Workshop = server.app.state.workshop
    job = workshop.queue.find(id)
    assert job is not None
    return job


def work_of(server: TestClient, id: str) -> dict[str, Any]:
    """What a job is to do."""
    content: dict[str, Any] = yaml.safe_load(job_of(server, id).work)
    return content


@pytest.fixture
def guided_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base models for all guides on the owner's list."""
    names = [way.base for way in pictures.WAYS.values() if way.base]
    listed = {name: {"model_url": f"someone/{name}"} for name in names}
    (tmp_path / "bases.yaml").write_text(yaml.safe_dump(listed))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))


def test_a_finetune_has_one_id_under_both_names(server: TestClient) -> None:
    told = post(server, "finetune", wanted())

    assert told["id"] == told["finetune_id"]
    assert told["polling_url"] == f"http://127.0.0.1:8700/v1/get_result?id={told['id']}"
    assert server.get(told["polling_url"]).status_code == 200


def test_a_task_is_pending_then_ready_with_its_files(server: TestClient) -> None:
    id = post(server, "finetune", wanted())["id"]
    first = server.get(f"/v1/get_result?id={id}").json()

    ready = over(server, id)

    assert {"id", "status", "result", "progress", "details"} <= first.keys()
    assert (ready["id"], ready["status"], ready["progress"]) == (id, "Ready", None)
    assert server.get(ready["result"]["kohya_lora_file"]["url"]).content == b"kohya"


def test_while_it_runs_its_share_is_told(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "1")
    id = post(server, "finetune", wanted())["id"]
    shares = set()
    while (told := server.get(f"/v1/get_result?id={id}").json())["status"] == "Pending":
        shares.add(told["progress"])
        time.sleep(0.05)

    # The fake job says each of its four steps.
    assert {0.25, 0.5, 0.75} & shares
    assert all(share is None or 0 <= share <= 1 for share in shares)


def test_an_unknown_task_is_told_by_status_and_body(server: TestClient) -> None:
    answer = server.get("/v1/get_result?id=nothing")

    assert answer.status_code == 404
    assert (answer.json()["status"], answer.json()["result"]) == ("Task not found", None)


def test_a_failed_finetune_says_which_field_of_the_request_is_at_fault(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "input")
    told = over(server, post(server, "finetune", wanted())["id"])

    assert told["status"] == "Error"
    # The fake job complains of `rank`.
    assert told["details"]["problems"][0]["field"] == "lora_rank"
    assert "got 0" in told["details"]["error"]


def test_wrong_fields_are_named_and_the_archive_is_not_sent_back(server: TestClient) -> None:
    body = wanted(mode="portrait", iterations=99, priority=None)
    body["file_data"] = [body["file_data"]] * 50

    answer = server.post("/v1/finetune", json=body)

    assert answer.status_code == 422
    places = [detail["loc"] for detail in answer.json()["detail"]]
    assert sorted(places) == [["body", "file_data"], ["body", "iterations"], ["body", "mode"]]
    kinds = {detail["loc"][1]: detail["type"] for detail in answer.json()["detail"]}
    assert set(kinds.values()) == {"value_error"}
    assert all({"loc", "msg", "type"} == detail.keys() for detail in answer.json()["detail"])
    assert len(answer.text) < 2000


def test_what_is_no_json_is_refused_as_pydantic_does(server: TestClient) -> None:
    answer = server.post("/v1/finetune", content=b"{", headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body"])


def test_a_request_without_a_key_is_forbidden_as_the_service_says_it(make_server: Any) -> None:
    server = make_server(keys=("right-key",))

    assert server.get("/v1/my_finetunes").status_code == 403
    assert server.get("/v1/my_finetunes", headers={"x-key": "right-key"}).status_code == 200


def test_fewer_iterations_than_the_service_takes_are_for_the_owner_to_allow(
    make_server: Any,
) -> None:
    server = make_server(min_finetune_iterations=2)

    id = post(server, "finetune", wanted(iterations=3))["id"]

    assert work_of(server, id)["run"]["max_train_steps"] == 3
    assert (
        server.get(f"/v1/finetune_details?finetune_id={id}").json()["finetune_details"][
            "iterations"
        ]
        == 3
    )
    assert server.post("/v1/finetune", json=wanted(iterations=1)).status_code == 422


def test_finetunes_are_listed_newest_first_with_their_details(server: TestClient) -> None:
    first = post(server, "finetune", wanted(finetune_comment="first"))["id"]
    body = wanted(finetune_comment="second", webhook_secret="hush")
    del body["trigger_word"]
    second = post(server, "finetune", body)["id"]

    listed = server.get("/v1/my_finetunes").json()
    answer = server.get(f"/v1/finetune_details?finetune_id={second}")

    assert listed == {"finetunes": [second, first]}
    details = answer.json()["finetune_details"]
    assert (details["finetune_comment"], details["trigger_word"]) == ("second", "TOK")
    assert details["status"] in ("Pending", "Ready")
    assert "file_data" not in details
    assert "hush" not in answer.text
    assert "hush" not in job_of(server, second).webhook.__repr__() + str(
        job_of(server, second).request
    )


def test_a_deleted_finetune_is_gone_with_its_files(server: TestClient) -> None:
    id = finetuned(server)
    workshop: Workshop = server.app.state.workshop
    folder = workshop.folders.of(id).root
    assert folder.exists()

    told = post(server, "delete_finetune", {"finetune_id": id})

    assert told.keys() == {"status", "message", "deleted_finetune_id", "timestamp"}
    assert told["deleted_finetune_id"] == id
    assert not folder.exists()
    assert server.get(f"/v1/get_result?id={id}").status_code == 404
    assert server.get("/v1/my_finetunes").json() == {"finetunes": []}


def test_a_running_finetune_that_is_deleted_is_stopped_first(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "60")
    id = post(server, "finetune", wanted())["id"]
    workshop: Workshop = server.app.state.workshop
    folder = workshop.folders.of(id)
    while job_of(server, id).state != "running" or not folder.run.events.exists():
        time.sleep(0.02)

    # The test's client waits for what the server does after its answer.
    post(server, "delete_finetune", {"finetune_id": id})

    assert workshop.queue.find(id) is None
    assert not folder.root.exists()


@pytest.mark.parametrize("path", ["finetune_details?finetune_id=none", "delete_finetune"])
def test_an_unknown_finetune_is_not_found(server: TestClient, path: str) -> None:
    if "?" in path:
        answer = server.get(f"/v1/{path}")
    else:
        answer = server.post(f"/v1/{path}", json={"finetune_id": "none"})

    assert answer.status_code == 404
    assert answer.json() == {"detail": "Finetune not found or access denied"}


@pytest.mark.parametrize("way", pictures.WAYS)
def test_pictures_with_an_unknown_finetune_are_refused(server: TestClient, way: str) -> None:
    body = {"finetune_id": "none", "prompt": "a TOK", "image": picture()}
    answer = server.post(f"/v1/{way}", json=body)

    assert answer.status_code == 400
    assert answer.json() == {"detail": "Finetune not found or not ready"}


def test_an_ultra_picture_is_made_with_the_finetune_s_own_base(server: TestClient) -> None:
    id = finetuned(server)

    made = post(server, ULTRA, {"finetune_id": id, "prompt": "image of a TOK", "seed": 42})
    ready = over(server, made["id"])

    assert ready["status"] == "Ready"
    assert server.get(ready["result"]["sample"]).headers["content-type"] == "image/jpeg"
    assert (ready["result"]["prompt"], ready["result"]["seed"]) == ("image of a TOK", 42)
    assert ready["result"]["duration"] == pytest.approx(
        ready["result"]["end_time"] - ready["result"]["start_time"]
    )
    work = work_of(server, made["id"])
    assert work["model"] == {}
    assert work["trained"][0]["strength"] == 1.2
    assert id in work["trained"][0]["run"]
    # 1024 * 1024 pixels of 16:9 are 1365 x 768; multiples of 32 next to it.
    assert (work["width"], work["height"]) == (1376, 768)


def test_a_pro_picture_has_the_service_s_defaults(server: TestClient) -> None:
    made = post(server, "flux-pro-finetuned", {"finetune_id": finetuned(server)})

    work = work_of(server, made["id"])
    assert (work["width"], work["height"]) == (1024, 768)
    assert (work["num_inference_steps"], work["guidance_scale"]) == (40, 2.5)
    assert work["trained"][0]["strength"] == 1.1


@pytest.mark.parametrize(
    ("field", "value"),
    [("finetune_strength", 2.1), ("width", 1000), ("steps", 51), ("output_format", "gif")],
)
def test_values_out_of_range_are_named(server: TestClient, field: str, value: Any) -> None:
    answer = server.post("/v1/flux-pro-finetuned", json={"finetune_id": "x", field: value})

    assert answer.status_code == 422
    assert [detail["loc"] for detail in answer.json()["detail"]] == [["body", field]]


def test_the_area_of_an_aspect_ratio_is_the_trained_one(tmp_path: Path, make_server: Any) -> None:
    (tmp_path / "over.yaml").write_text("resolution_width: 128\nresolution_height: 128\n")
    server = make_server(overrides=tmp_path / "over.yaml")
    body = {"finetune_id": finetuned(server, priority=None), "aspect_ratio": "4:1"}

    refused = server.post(f"/v1/{ULTRA}", json=body)
    made = post(server, ULTRA, {**body, "aspect_ratio": "2:1"})

    assert refused.json()["detail"][0]["loc"] == ["body", "aspect_ratio"]
    work = work_of(server, made["id"])
    # 128 * sqrt(2) = 181, 128 / sqrt(2) = 90.5.
    assert (work["width"], work["height"]) == (192, 96)


def test_what_is_not_done_is_named(server: TestClient) -> None:
    body = {
        "finetune_id": finetuned(server),
        "raw": True,
        "prompt_upsampling": False,
        "safety_tolerance": 6,
        "image_prompt": "x" * 5000,
        "mood": "bright",
    }
    told = over(server, post(server, ULTRA, body)["id"])

    ignored = told["ignored_options"]
    assert set(ignored) == {"raw", "safety_tolerance", "image_prompt", "mood"}


@pytest.mark.parametrize(("way", "base"), [(n, w.base) for n, w in pictures.WAYS.items() if w.base])
def test_a_guide_without_a_base_model_is_refused_by_the_entry_s_name(
    server: TestClient, way: str, base: str
) -> None:
    body = {"finetune_id": finetuned(server), "prompt": "a TOK", "image": picture()}
    answer = server.post(f"/v1/{way}", json=body)

    assert answer.status_code == 400
    assert f"`{base}`" in answer.json()["detail"]


def test_guides_are_kept_as_files_with_what_is_to_be_done_with_them(
    server: TestClient, guided_bases: None
) -> None:
    id, shown = finetuned(server), picture(64, 64)
    common = {"finetune_id": id, "prompt": "a TOK"}
    canny = {**common, "control_image": shown, "canny_low_threshold": 10}

    works = {
        way: work_of(server, post(server, f"flux-pro-1.0-{way}-finetuned", body)["id"])
        for way, body in {
            "canny": canny,
            "depth": {**common, "preprocessed_image": f"data:image/png;base64,{shown}"},
            "fill": {"finetune_id": id, "image": shown, "mask": picture(64, 64)},
        }.items()
    }

    assert works["canny"]["canny_thresholds"] == [10, 200]
    assert works["depth"]["canny_thresholds"] is None
    for way, work in works.items():
        assert work["guide"] == way
        assert Path(work["guide_image"]).read_bytes() == base64.b64decode(shown)
        assert work["model"] == {"model_url": f"someone/flux-pro-1.0-{way}"}
        assert work["width"] is None
    assert works["fill"]["guide_mask"] != works["fill"]["guide_image"]


@pytest.mark.parametrize(
    ("way", "body", "field"),
    [
        ("depth", {"control_image": picture()}, "control_image"),
        ("depth", {}, "control_image"),
        ("canny", {}, "control_image"),
        ("fill", {"image": base64.b64encode(b"text" * 50).decode()}, "image"),
        ("fill", {"image": "/etc/hostname"}, "image"),
        ("fill", {"image": picture(), "mask": "http://127.0.0.1:1/secret"}, "mask"),
    ],
)
def test_a_guide_that_cannot_be_used_is_named(
    server: TestClient, guided_bases: None, way: str, body: dict[str, Any], field: str
) -> None:
    asked = {"finetune_id": finetuned(server), "prompt": "a TOK", **body}
    answer = server.post(f"/v1/flux-pro-1.0-{way}-finetuned", json=asked)

    assert answer.status_code == 422
    assert [detail["loc"] for detail in answer.json()["detail"]] == [["body", field]]


def test_a_webhook_is_told_of_the_end_under_a_signature(server: TestClient) -> None:
    hook = {"webhook_url": "https://example.com/hook", "webhook_secret": "hush"}
    told = post(server, "finetune", wanted(**hook))
    over(server, told["id"])
    job = job_of(server, told["id"])
    workshop: Workshop = server.app.state.workshop

    announced = bfl.announced(job, workshop)
    body = json.dumps(announced).encode()

    assert (told["status"], told["webhook_url"]) == ("Pending", "https://example.com/hook")
    assert announced.keys() == {"id", "status", "result", "message", "timestamp"}
    assert announced["result"]["kohya_lora_file"]["url"].startswith("http://127.0.0.1:8700/files/")
    expected = hmac.new(b"hush", body, hashlib.sha256).hexdigest()
    assert bfl.signed(job, body, workshop) == {"X-BFL-Signature": f"sha256={expected}"}


def test_a_private_webhook_is_refused(server: TestClient) -> None:
    answer = server.post("/v1/finetune", json=wanted(webhook_url="http://127.0.0.1:1/"))

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "webhook_url"]


def test_the_same_idempotency_key_is_the_same_finetune(server: TestClient) -> None:
    body, key = wanted(), {"Idempotency-Key": "once"}

    first, second = (post(server, "finetune", body, **key)["id"] for _ in range(2))
    other = server.post("/v1/finetune", json=wanted(mode="style"), headers=key)

    assert first == second
    assert other.status_code == 422


def test_nothing_is_charged(server: TestClient) -> None:
    assert server.get("/v1/credits").json()["credits"] > 0


def test_a_missing_field_is_told_as_missing(server: TestClient) -> None:
    training = server.post("/v1/finetune", json={**wanted(), "mode": None}).json()["detail"]
    made = server.post("/v1/flux-pro-finetuned", json={"steps": 99}).json()["detail"]

    told = [(detail["loc"][1], detail["type"]) for detail in (*training, *made)]
    assert told == [("mode", "missing"), ("finetune_id", "missing"), ("steps", "value_error")]


def test_a_picture_at_an_address_is_left_for_the_job_to_fetch(
    server: TestClient, guided_bases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    monkeypatch.setattr(network, "resolve", lambda host, port: reached.append(host))
    body = {
        "finetune_id": finetuned(server),
        "image": "https://photos.example/a.png",
        "mask": "https://photos.example/b.png",
    }

    work = work_of(server, post(server, "flux-pro-1.0-fill-finetuned", body)["id"])

    assert (work["guide_image"], work["guide_mask"]) == (body["image"], body["mask"])
    assert reached == []


def test_depth_is_measured_where_the_owner_has_a_model_for_it(
    server: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"flux-pro-1.0-depth": "someone/depth", pictures.DEPTH_ESTIMATOR: "someone/measures"}
    listed = {name: {"model_url": place} for name, place in places.items()}
    (tmp_path / "bases.yaml").write_text(yaml.safe_dump(listed))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "bases.yaml"))
    common = {"finetune_id": finetuned(server), "prompt": "a TOK", "control_image": picture()}

    route = "flux-pro-1.0-depth-finetuned"
    measured = work_of(server, post(server, route, common)["id"])
    given = post(server, route, {**common, "preprocessed_image": picture(64, 64)})["id"]

    assert measured["depth_estimator"] == "someone/measures"
    assert work_of(server, given)["depth_estimator"] is None
    assert set(over(server, given)["ignored_options"]) == {"control_image"}


FOUND = {
    ULTRA: {"width": "aspect_ratio", "model_url": "finetune_id", "trained": "finetune_id"},
    "flux-pro-finetuned": {"width": "width", "num_inference_steps": "steps"},
    "flux-pro-1.0-fill-finetuned": {"guide_image": "image", "height": "image"},
    "flux-pro-1.0-canny-finetuned": {"guide_image": "preprocessed_image"},
}


def test_a_failed_picture_says_what_was_at_fault_and_what_was_left_aside(
    server: TestClient, guided_bases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = finetuned(server)
    failed = {"status": "failed", "error_kind": "input", "error": "no"}
    for way, fields in FOUND.items():
        problems = [{"field": field, "message": "is wrong", "hint": ""} for field in fields]
        # The process that makes pictures leaves with each, so that it takes the variables anew.
        monkeypatch.setenv("FAKE_RESULT", json.dumps({**failed, "problems": problems}))
        monkeypatch.setenv("FAKE_ONCE", "1")
        body = {"finetune_id": id, "prompt": "x", "image": picture(), "mood": "bright"}
        guide = {"preprocessed_image": picture()} if "canny" in way else {}

        told = over(server, post(server, way, {**body, **guide})["id"])

        assert told["status"] == "Error"
        assert [p["field"] for p in told["details"]["problems"]] == [*fields.values()]
        assert "mood" in told["ignored_options"]


def test_a_finetune_goes_only_when_no_picture_needs_it(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = finetuned(server)
    monkeypatch.setenv("FAKE_SECONDS", "1")
    # Keeps the only slot for a while.
    post(server, "finetune", wanted(finetune_comment="another"))
    waiting = post(server, "flux-pro-finetuned", {"finetune_id": used})["id"]
    removed: list[str] = []

    def noted(*given: Any, **named: Any) -> None:
        removed.append(job_of(server, waiting).state)

    monkeypatch.setattr(bfl.shutil, "rmtree", noted)
    assert job_of(server, waiting).state == "queued"

    # The test's client waits for what the server does after its answer.
    post(server, "delete_finetune", {"finetune_id": used})

    assert removed == ["done"]
    assert server.post("/v1/flux-pro-finetuned", json={"finetune_id": used}).status_code == 400


def damaged() -> dict[str, bytes]:
    """Archives whose lists of files are not as they should be."""
    whole = base64.b64decode(archive())
    entry = whole.index(b"PK\x01\x02")
    version = bytearray(whole)
    version[entry + 6] = 99
    # The name is said to be UTF-8, and is not.
    name = bytearray(whole)
    name[entry + 9] |= 8
    name[entry + 46] = 0xFF
    offset = bytearray(whole)
    end = whole.rindex(b"PK\x05\x06")
    offset[end + 16 : end + 20] = b"\xff\xff\xff\x7f"
    return {"version": bytes(version), "name": bytes(name), "offset": bytes(offset)}


def packed(names: Iterable[str]) -> bytes:
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return content.getvalue()


@pytest.mark.parametrize("kind", ["version", "name", "offset", "dot"])
def test_an_archive_with_a_damaged_list_is_left_to_the_job(server: TestClient, kind: str) -> None:
    content = packed([".", "a.png"]) if kind == "dot" else damaged()[kind]

    post(server, "finetune", wanted(file_data=base64.b64encode(content).decode()))


def test_an_archive_of_very_many_files_is_refused_before_it_is_read(server: TestClient) -> None:
    content = bytearray(packed(map(str, range(5001))))
    # What it says of their number does not count.
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = b"\x01\x00\x01\x00"

    answer = server.post("/v1/finetune", json=wanted(file_data=base64.b64encode(content).decode()))

    assert answer.json()["detail"][0]["loc"] == ["body", "file_data"]
    assert "more than 5000 files" in answer.text
