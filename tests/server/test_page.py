"""The page's routes: what it sends becomes jobs, what jobs leave comes back, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeServer
from fake_job import PIXEL
from running import wait_for
from starlette.testclient import TestClient

from trainer.config import LEAVES
from trainer.config_files import parse_yaml
from trainer.leaves import PLACES
from trainer.presets import list_presets
from trainer.server.inputs import DATA, MODELS, PATHS
from trainer.server.own.assets import assets
from trainer.server.own.form import REFUSED, SUBJECTS


def uploaded(server: TestClient, content: bytes = PIXEL, name: str = "a.png") -> str:
    """The address of an upload, as the page brings it."""
    answer = server.post("/files/upload", content=content, headers={"X-Fal-File-Name": name})
    address: str = answer.json()["access_url"]
    return address


def submission(server: TestClient, **more: Any) -> dict[str, Any]:
    """What the page sends for one picture."""
    return {"pictures": [{"address": uploaded(server)}], **more}


def begun(server: TestClient, what: str = "trainings", **more: Any) -> str:
    """The id of a job that was begun."""
    answer = server.post(f"/trainer/{what}", json=submission(server, **more))
    assert answer.status_code == 200, answer.text
    id: str = answer.json()["id"]
    return id


def ended(server: TestClient, id: str) -> dict[str, Any]:
    """What is told of a job once it is over."""

    def is_over() -> bool:
        return server.get(f"/trainer/jobs/{id}").json()["state"] not in ("queued", "running")

    wait_for(is_over, seconds=20)
    told: dict[str, Any] = server.get(f"/trainer/jobs/{id}").json()
    return told


def work_of(server: TestClient, id: str) -> dict[str, Any]:
    """The configuration of a job."""
    job = server.app.state.workshop.queue.find(id)
    return parse_yaml(job.work, "work")


def test_what_is_submitted_is_trained(server: TestClient) -> None:
    id = begun(server, presets=["person"], options={"rank": 7, "output_name": "me"})

    told = ended(server, id)
    assert (told["state"], told["name"], told["step"], told["total"]) == ("done", "me", 4, 4)
    assert told["options"] == {"rank": 7, "output_name": "me"}
    written = work_of(server, id)
    assert written["adapter"]["rank"] == 7
    assert written["run"]["max_train_steps"] == 1500


def test_pictures_are_prepared_to_be_looked_at(server: TestClient) -> None:
    id = begun(server, "preparations")

    assert ended(server, id)["state"] == "done"
    (found,) = server.get(f"/trainer/jobs/{id}/prepared").json()["sets"]
    assert found["level"] == "act"
    assert found["left_out"] == [{"name": "001-b.png", "reason": "is no picture"}]
    (picture,) = found["pictures"]
    assert picture["trained_box"] == [16, 0, 64, 64]
    shown = server.get(f"/trainer/jobs/{id}/pictures/{picture['thumbnail']}")
    assert shown.content == PIXEL
    assert shown.headers["content-type"] == "image/jpeg"


def test_pictures_are_prepared_while_a_training_runs(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    training = begun(server)
    monkeypatch.setenv("FAKE_SECONDS", "0")
    wait_for(lambda: server.get(f"/trainer/jobs/{training}").json()["state"] == "running")

    assert ended(server, begun(server, "preparations"))["state"] == "done"
    server.post(f"/trainer/jobs/{training}/cancel")


def test_no_page_elsewhere_starts_anything(make_server: MakeServer) -> None:
    server = make_server()
    body = submission(server)

    for path in ("trainings", "preparations", "checks"):
        headers = {"Origin": "https://elsewhere.example"}
        assert server.post(f"/trainer/{path}", json=body, headers=headers).status_code == 403


def run_of(server: TestClient, id: str) -> Path:
    """The run folder of a job."""
    root: Path = server.app.state.workshop.folders.of(id).run.root
    return root


# What is sent


def test_a_picture_brings_its_caption(server: TestClient) -> None:
    pictures = [{"address": uploaded(server), "caption": "a cup"}]
    answer = server.post("/trainer/trainings", json={"pictures": pictures})

    location = work_of(server, answer.json()["id"])["data"]["images_data_url"]
    assert "a%20cup" in location
    assert str(server.app.state.workshop.settings.data.resolve()) in location


def test_a_later_preset_goes_over_an_earlier_one_and_options_over_both(server: TestClient) -> None:
    id = begun(server, presets=["product", "low-memory"], options={"lr_warmup_steps": 3})

    written = work_of(server, id)
    assert written["adapter"]["rank"] == 16
    assert written["adapter"]["use_dora"] is True
    assert written["optim"]["lr_warmup_steps"] == 3


def test_an_option_that_is_null_is_set_to_null(server: TestClient) -> None:
    id = begun(server, presets=["low-memory"], options={"gradient_checkpointing": None})

    assert work_of(server, id)["run"]["gradient_checkpointing"] is None


def test_a_base_model_is_known_by_its_name(server: TestClient) -> None:
    id = begun(server, options={"model_url": "flux-dev"})

    assert work_of(server, id)["model"]["model_url"] == "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"options": {"rank": 0}}, "rank"),
        ({"options": {"rnk": 4}}, "rnk"),
        ({"options": {"wandb": True}}, "wandb"),
        ({"options": {"push_to_hub": True}}, "push_to_hub"),
        ({"options": {"hub_model_id": "anna/me"}}, "hub_model_id"),
        ({"options": {"hub_private": False}}, "hub_private"),
        ({"options": {"model_url": "/etc"}}, "model_url"),
        ({"options": {"face_detector_path": "/etc/passwd"}}, "face_detector_path"),
        ({"options": {"captions_file_url": "/etc/passwd"}}, "captions_file_url"),
        ({"options": {"images_data_url": "https://a.example/a.zip"}}, "images_data_url"),
        ({"presets": ["nobody"]}, "preset"),
        ({"picture": []}, "picture"),
        ({"presets": "person"}, "presets"),
    ],
)
def test_what_is_refused_is_told_by_field(
    server: TestClient, sent: dict[str, Any], field: str
) -> None:
    answer = server.post("/trainer/trainings", json=submission(server, **sent))

    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["problems"]] == [field]


def test_options_that_are_refused_may_stand_in_a_configuration_with_their_defaults(
    server: TestClient,
) -> None:
    options = {"push_to_hub": False, "hub_model_id": None, "hub_private": True, "wandb": False}

    answer = server.post("/trainer/trainings", json=submission(server, options=options))

    assert answer.status_code == 200, answer.text


def test_a_subject_among_several_names_no_file_of_the_machine(server: TestClient) -> None:
    concepts = [{"images_data_url": uploaded(server)}, {"images_data_url": "/etc"}]
    answer = server.post("/trainer/trainings", json={"options": {"concepts": concepts}})

    (problem,) = answer.json()["problems"]
    assert problem["field"] == "concepts[1].images_data_url"


def test_every_option_that_says_where_something_is_is_judged() -> None:
    assert {*DATA, *MODELS, *PATHS} >= PLACES
    places = {name for name in LEAVES if name.endswith(("_url", "_path", "_file", "_config"))}
    assert places <= {*DATA, *MODELS, *PATHS}


def test_without_pictures_nothing_begins(server: TestClient) -> None:
    answer = server.post("/trainer/trainings", json={"options": {}})

    assert answer.json()["problems"][0]["field"] == "images_data_url"


def test_a_submission_is_checked_without_pictures(server: TestClient) -> None:
    told = server.post("/trainer/checks", json={"presets": ["person"]}).json()
    wrong = server.post("/trainer/checks", json={"options": {"rank": 0}}).json()

    assert (told["values"]["rank"], told["problems"]) == (16, [])
    assert not {*DATA, "concepts"} & told["values"].keys()
    assert [problem["field"] for problem in wrong["problems"]] == ["rank"]


# The form


def test_the_form_has_every_option_that_may_be_set(server: TestClient) -> None:
    form = server.get("/trainer/form").json()

    options = {option["name"]: option for part in form["sections"] for option in part["options"]}
    assert LEAVES.keys() - options.keys() == {*DATA, "concepts", *REFUSED}
    rank = options["rank"]
    assert (rank["default"], rank["types"], rank["minimum"]) == (32, ["integer"], 1)
    assert rank["description"] and rank["allowed"] == "a whole number, at least 1"
    assert set(SUBJECTS) <= {preset.name for preset in list_presets()}
    assert [preset["name"] for preset in form["presets"]] == [p.name for p in list_presets()]
    assert "flux-dev" in [model["name"] for model in form["models"]]


# What is told


def test_events_are_told_from_a_place_on(server: TestClient) -> None:
    id = begun(server)
    ended(server, id)
    first = server.get(f"/trainer/jobs/{id}/events").json()
    again = server.get(f"/trainer/jobs/{id}/events?since={first['next']}").json()

    assert [event["event"] for event in first["events"]] == ["run", *["step"] * 4]
    assert (first["restarted"], again["restarted"], again["events"]) == (True, False, [])
    with open(run_of(server, id) / "events.jsonl", "a") as log:
        log.write(json.dumps({"event": "sample", "step": 4, "path": "samples/x.png"}) + "\n")
    more = server.get(f"/trainer/jobs/{id}/events?since={first['next']}").json()
    assert [event["event"] for event in more["events"]] == ["sample"]


def test_a_log_that_is_written_anew_is_told_from_its_beginning(server: TestClient) -> None:
    id = begun(server)
    ended(server, id)
    place = server.get(f"/trainer/jobs/{id}/events").json()["next"]
    log = run_of(server, id) / "events.jsonl"
    # The old one stays until the new one is there, so that they are two files.
    log.rename(log.with_suffix(".old"))
    run = {"event": "run", "total_steps": 9, "start_step": 0, "num_pictures": 1}
    log.write_text(json.dumps(run) + "\n")

    told = server.get(f"/trainer/jobs/{id}/events?since={place}").json()
    assert told["restarted"]
    assert [event["event"] for event in told["events"]] == ["run"]


def test_events_tell_no_paths_of_the_machine(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = {"event": "note", "note": "warning", "field": "x", "message": "see /home/me/a/b.png"}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([note]))
    id = begun(server)
    ended(server, id)

    assert "/home/me" not in server.get(f"/trainer/jobs/{id}/events").text


@pytest.mark.parametrize(
    ("options", "readers"),
    [({}, "ComfyUI, A1111 and the like"), ({"use_dora": True}, "LyCORIS and the like")],
)
def test_a_result_has_its_files_with_what_their_readers_said(
    options: dict[str, Any], readers: str, server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "outputs/lora.safetensors"
    verify = {"event": "verify", "path": path, "reader": "lycoris", "status": "passed"}
    monkeypatch.setenv("FAKE_EVENTS", json.dumps([verify]))
    told = ended(server, begun(server, options=options))

    (file,) = [file for file in told["files"] if file["role"] == "kohya_lora"]
    assert file["verdicts"] == [{"reader": "lycoris", "status": "passed"}]
    assert file["meaning"] == f"the adapter for {readers}"
    assert (file["size"], server.get(file["address"]).content) == (5, b"kohya")


def test_a_failure_is_told_with_its_fields(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "input")

    failure = ended(server, begun(server, "preparations"))["failure"]
    assert failure["message"] == "it went wrong"
    assert failure["problems"][0]["field"] == "rank"


def test_jobs_of_all_services_are_listed_newest_first(server: TestClient) -> None:
    app = "/fal-ai/flux-lora-fast-training"
    other = server.post(app, json={"images_data_url": "https://a.example/a.zip"}).json()
    own = begun(server)
    listed = server.get("/trainer/jobs").json()
    first = server.get("/trainer/jobs?limit=1").json()

    assert [job["id"] for job in listed["jobs"]] == [own, other["request_id"]]
    assert [job["protocol"] for job in listed["jobs"]] == ["page", "fal"]
    assert ([job["id"] for job in first["jobs"]], first["more"]) == ([own], True)
    assert server.get(f"/trainer/jobs/{other['request_id']}").json()["request"] is None
    assert server.get("/trainer/jobs?limit=none").status_code == 422


def test_a_job_of_any_service_is_cancelled(make_server: MakeServer) -> None:
    server = make_server(gpus=())
    app = "/fal-ai/flux-lora-fast-training"
    id = server.post(app, json={"images_data_url": "https://a.example/a.zip"}).json()["request_id"]

    assert server.post(f"/trainer/jobs/{id}/cancel").json()["state"] == "cancelled"
    assert server.post(f"/trainer/jobs/{id}/cancel").status_code == 400


def test_pictures_are_made_at_a_strength(server: TestClient) -> None:
    id = begun(server)
    ended(server, id)
    wanted = {"prompt": "a TOK", "strength": 0.5, "num_images": 2, "seed": 3}
    made = server.post(f"/trainer/jobs/{id}/generations", json=wanted).json()

    told = ended(server, made["id"])
    assert [file["role"] for file in told["files"]] == ["picture", "picture"]
    work = json.loads(server.app.state.workshop.queue.find(made["id"]).work)
    assert work["trained"] == [{"run": str(run_of(server, id).resolve()), "strength": 0.5}]
    assert (work["prompt"], work["seed"]) == ("a TOK", 3)
    (trial,) = server.get(f"/trainer/jobs/{id}").json()["trials"]
    assert (trial["id"], trial["wanted"]["strength"]) == (made["id"], 0.5)


def test_pictures_are_made_with_finished_trainings_alone(make_server: MakeServer) -> None:
    server = make_server(gpus=())
    id = begun(server)
    too_strong = {"prompt": "a TOK", "strength": 9}

    assert server.post(f"/trainer/jobs/{id}/generations", json={"prompt": "a"}).status_code == 422
    answer = server.post(f"/trainer/jobs/{id}/generations", json=too_strong)
    assert answer.json()["problems"][0]["field"] == "strength"


# Files of a run


@pytest.mark.parametrize(
    "path",
    [
        "config.yaml",
        "prepared/../config.yaml",
        "prepared/%2e%2e/config.png",
        "outputs/lora.safetensors",
        "prepared/report.json",
        "samples/none.png",
        "prepared/outside.png",
        "../../../server.png",
    ],
)
def test_only_pictures_inside_the_run_are_shown(
    server: TestClient, tmp_path: Path, path: str
) -> None:
    id = begun(server, "preparations")
    ended(server, id)
    (tmp_path / "outside.png").write_bytes(PIXEL)
    (run_of(server, id) / "prepared" / "outside.png").symlink_to(tmp_path / "outside.png")

    assert server.get(f"/trainer/jobs/{id}/pictures/{path}").status_code == 404


def test_a_damaged_preparation_shows_nothing(server: TestClient) -> None:
    id = begun(server, "preparations")
    ended(server, id)
    (run_of(server, id) / "prepared" / "report.json").write_text('{"advice": 3}')

    assert server.get(f"/trainer/jobs/{id}/prepared").json() == {"sets": []}


def test_a_report_is_shown_by_a_ticket_and_nothing_in_it_runs(make_server: MakeServer) -> None:
    server = make_server(keys=("secret",))
    key = {"Authorization": "Key secret"}
    server.headers.update(key)
    id = begun(server)
    ended(server, id)
    assert server.post(f"/trainer/jobs/{id}/report").status_code == 404
    (run_of(server, id) / "report.html").write_text("<p>the end</p>")
    address = server.post(f"/trainer/jobs/{id}/report").json()["address"]
    del server.headers["Authorization"]

    shown = server.get(address)
    assert (shown.status_code, shown.text) == (200, "<p>the end</p>")
    policy = shown.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "allow" not in policy and "script-src" not in policy
    assert server.get("/page/reports/" + "0" * 32).status_code == 404


# The page itself


def test_the_page_needs_no_key_and_its_routes_do(make_server: MakeServer) -> None:
    server = make_server(keys=("secret",))

    assert server.get("/").status_code == 200
    assert server.get("/page/page.js").status_code == 200
    for path in ("form", "jobs", "jobs/x", "jobs/x/events", "jobs/x/pictures/a.png"):
        assert server.get(f"/trainer/{path}").status_code == 401
    answer = server.post("/trainer/trainings", json={})
    assert (answer.status_code, answer.json()["problems"]) == (401, [])


def test_every_part_of_the_page_has_its_type_and_policy(server: TestClient) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

    assert {"index.html", "page.js", "page.css"} <= assets().keys()
    for name in assets().keys() - {"index.html"}:
        answer = server.get(f"/page/{name}")
        assert answer.headers["content-type"].startswith(types[Path(name).suffix])
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        again = server.get(f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert server.get("/").headers["content-type"] == "text/html; charset=utf-8"
    policy = server.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_the_page_names_no_other_place(server: TestClient) -> None:
    texts = {name: asset.content.decode() for name, asset in assets().items()}

    named = {name: text.replace("http://www.w3.org/", "") for name, text in texts.items()}
    assert [name for name, text in named.items() if "//" in text and "http" in text] == []
    index = texts["index.html"]
    assert "style=" not in index and "onclick" not in index and "<style" not in index
