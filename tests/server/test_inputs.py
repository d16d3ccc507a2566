"""What requests may name: uploads, addresses and content, but no file of the machine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from trainer.config import LEAVES
from trainer.picture_lists import ListedPicture, listed_pictures, picture_list
from trainer.resolve import Layer
from trainer.server.database import Database
from trainer.server.files import SCHEMA, FileStore, StoredFile
from trainer.server.inputs import DATA, MODELS, PATHS, Inputs

CONTENT = b"PK" + bytes(2000)
BASE64 = base64.b64encode(CONTENT).decode()


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(Database(tmp_path / "db", SCHEMA), tmp_path / "files")


@pytest.fixture
def inputs(store: FileStore, tmp_path: Path) -> Inputs:
    (tmp_path / "open").mkdir()
    return Inputs(store, [tmp_path / "open"], {"localhost", "queue.fal.run"})


async def content() -> AsyncIterator[bytes]:
    yield b"x"


def uploaded(store: FileStore, name: str) -> StoredFile:
    file, token = store.expect(name, "application/octet-stream")
    return asyncio.run(store.take(file.id, token, content(), limit=1))


def admitted(inputs: Inputs, **values: object) -> tuple[dict[str, object], list[str]]:
    """Values after judgement, and the fields at fault."""
    (layer,) = inputs.admitted([Layer("request", values, explicit=True)])
    return dict(layer.values), [problem.field for problem in layer.problems]


def test_every_option_that_is_a_location_is_judged() -> None:
    located = {name for name in LEAVES if name.endswith(("_url", "_urls", "_path"))}

    assert located <= {*DATA, *MODELS, *PATHS}


def test_a_web_address_stays_for_the_job_to_fetch(inputs: Inputs) -> None:
    url = "https://photos.example/a.zip"

    assert admitted(inputs, images_data_url=url) == ({"images_data_url": url}, [])


@pytest.mark.parametrize("host", ["localhost:8700", "queue.fal.run"])
def test_the_address_of_an_upload_becomes_its_file(
    inputs: Inputs, store: FileStore, host: str
) -> None:
    file = uploaded(store, "a.zip")

    values, problems = admitted(inputs, images_data_url=f"http://{host}{file.address}")

    assert (values, problems) == ({"images_data_url": str(file.path)}, [])


def test_an_upload_that_is_not_there_is_told(inputs: Inputs, store: FileStore) -> None:
    expected, _ = store.expect("a.zip", "application/zip")
    addresses = [expected.address, f"/files/{'0' * 32}/a.zip"]

    problems = [
        admitted(inputs, images_data_url=f"http://localhost{address}")[1] for address in addresses
    ]

    assert problems == [["images_data_url"]] * 2


def test_another_hosts_address_of_the_same_form_is_fetched(
    inputs: Inputs, store: FileStore
) -> None:
    url = f"https://elsewhere.example/files/{'0' * 32}/a.zip"

    assert admitted(inputs, images_data_url=url)[0] == {"images_data_url": url}


@pytest.mark.parametrize("location", [BASE64, f"data:application/zip;base64,{BASE64}"])
def test_content_in_a_request_becomes_a_file(inputs: Inputs, location: str) -> None:
    values, problems = admitted(inputs, images_data_url=location)

    assert problems == []
    assert Path(str(values["images_data_url"])).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secrets",
        "photos",
        "file:///etc/passwd",
        "ftp://a.example/x",
        "~/.ssh/id_rsa",
        "",
        "\0",
    ],
)
def test_no_file_of_the_machine_can_be_named(inputs: Inputs, location: str) -> None:
    values, problems = admitted(inputs, images_data_url=location)

    assert (values, problems) == ({}, ["images_data_url"])


def test_a_folder_that_the_owner_opened_can_be_named(inputs: Inputs, tmp_path: Path) -> None:
    place = str(tmp_path / "open" / "photos")

    assert admitted(inputs, images_data_url=place) == ({"images_data_url": place}, [])


def test_no_way_leads_out_of_an_open_folder(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "open" / "link").symlink_to("/etc")

    for place in ("open/../secret", "open/link/passwd"):
        assert admitted(inputs, images_data_url=str(tmp_path / place))[1] == ["images_data_url"]


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-xl-base-1.0", "gpt2", "a/b.c-d_e"])
def test_a_hub_id_names_a_model(inputs: Inputs, name: str) -> None:
    assert admitted(inputs, model_url=name) == ({"model_url": name}, [])


@pytest.mark.parametrize(
    "name",
    [
        "/models/x",
        "../x",
        "./x",
        "a/../b",
        "a/b/c",
        "a/b#c",
        "a/b?c",
        "https://a.example/x.safetensors",
        "a b",
        "-x",
        "a/b\n",
    ],
)
def test_no_other_text_names_a_model(inputs: Inputs, name: str) -> None:
    assert admitted(inputs, model_url=name)[1] == ["model_url"]


def test_a_place_on_the_owners_list_names_a_model(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = tmp_path / "base_models.yaml"
    owners.write_text("mine:\n  model_url: /models/mine\n")
    monkeypatch.setenv("TRAINER_BASE_MODELS", str(owners))

    assert admitted(inputs, model_url="/models/mine")[1] == []
    assert admitted(inputs, model_url="/models/other")[1] == ["model_url"]


def test_each_picture_of_a_list_is_judged(inputs: Inputs, store: FileStore) -> None:
    file = uploaded(store, "a.png")
    url = f"http://localhost{file.address}"
    good = picture_list([ListedPicture(url, "a caption"), ListedPicture("https://a.example/b.png")])
    bad = picture_list([ListedPicture(url), ListedPicture("/etc/passwd")])

    values, problems = admitted(inputs, images_data_url=good)

    assert problems == []
    assert listed_pictures(str(values["images_data_url"])) == (
        ListedPicture(str(file.path), "a caption"),
        ListedPicture("https://a.example/b.png"),
    )
    assert admitted(inputs, images_data_url=bad)[1] == ["images_data_url"]


def test_a_damaged_content_is_told_without_being_repeated(inputs: Inputs) -> None:
    (layer,) = inputs.admitted(
        [Layer("request", {"images_data_url": BASE64 + "!!!" + BASE64}, explicit=True)]
    )

    (problem,) = layer.problems
    assert len(problem.message) < 300
