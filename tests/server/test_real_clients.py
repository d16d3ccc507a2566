"""The services' own clients, unmodified, train tiny models here and use what they trained."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import httpx2
import numpy as np
import pytest
import yaml
from PIL import Image
from running import RunningServer, free_port, running_server, wait_for, warm_jobs
from safetensors.numpy import load_file
from skimage import data as photographs_of_skimage

HERE = Path(__file__).parent
CLIENTS = HERE / "clients"
JAVASCRIPT = HERE / "js"
# Small, and without what needs weights from elsewhere.
SMALL = {
    "resolution_width": 64,
    "resolution_height": 64,
    "max_train_steps": 3,
    "batch_size": 2,
    "rank": 4,
    "skip_caption_generation": True,
    "clip_seg_mask_prompt": None,
    "with_prior_preservation": False,
    "face_aware_cropping": False,
    "num_new_tokens_per_abstraction": 1,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three cuts of a photograph."""
    folder = tmp_path_factory.mktemp("photographs")
    portrait = Image.fromarray(photographs_of_skimage.astronaut())
    paths = [folder / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        portrait.crop((100 + 10 * number, 0, 400, 300)).save(path)
    return paths


@pytest.fixture(scope="module")
def archive(photographs: list[Path]) -> Path:
    """The photographs in a zip."""
    path = photographs[0].parent / "photographs.zip"
    with ZipFile(path, "w") as zipped:
        for photograph in photographs:
            zipped.write(photograph, photograph.name)
    return path


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    sdxl_folder: Path,
    sd15_folder: Path,
    flux_folder: Path,
) -> Iterator[RunningServer]:
    """A server with https whose base models are tiny ones, two trainings at a time."""
    root = tmp_path_factory.mktemp("server")
    models = {
        "stabilityai/stable-diffusion-xl-base-1.0": {
            "model_url": str(sdxl_folder),
            "vae_url": None,
        },
        "v1-5-pruned-emaonly": {"model_url": str(sd15_folder)},
        "black-forest-labs/FLUX.1-dev": {"model_url": str(flux_folder)},
    }
    (root / "base_models.yaml").write_text(yaml.safe_dump(models))
    ports = ["--tls-port", str(free_port()), "--proxy-port", str(free_port())]
    with (
        warm_jobs(root) as environment,
        running_server(
            root / "data",
            *("--gpus", "0", "--gpus", "1", "--tls", *ports),
            *("--min-finetune-iterations", "3", "--inference-idle-seconds", "20"),
            environment={"TRAINER_BASE_MODELS": str(root / "base_models.yaml"), **environment},
        ) as running,
    ):
        running.proxy = f"http://127.0.0.1:{ports[-1]}"
        yield running


def through_the_proxy(server: RunningServer) -> dict[str, str]:
    """The only environment that an unmodified Python client needs."""
    bundle = str(server.data / "tls" / "ca-bundle.pem")
    return {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HTTPS_PROXY": server.proxy,
        "SSL_CERT_FILE": bundle,
        # requests has a list of its own.
        "REQUESTS_CA_BUNDLE": bundle,
        "FAL_KEY": "any:key",
        "BFL_API_KEY": "any-key",
    }


def said(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a program prints."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        cwd=CLIENTS,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def is_picture(content: bytes, size: tuple[int, int]) -> bool:
    """Whether content is a picture of a size, and not of one colour."""
    picture = Image.open(BytesIO(content))
    return picture.size == size and float(np.asarray(picture).std()) > 1


def test_the_unpatched_fal_client_uploads_trains_and_downloads_with_two_variables_set(
    server: RunningServer, archive: Path, tmp_path: Path
) -> None:
    program = [sys.executable, str(CLIENTS / "fal_training.py"), str(archive), str(tmp_path)]

    answer = json.loads(said([*program, json.dumps(SMALL)], through_the_proxy(server)))

    assert answer["patched"] is False
    assert answer["states"][-1] == "Completed"
    assert any(line.startswith("step 3 of 3") for line in answer["lines"])
    files = {name: file for name, file in answer["result"].items() if isinstance(file, dict)}
    assert {"diffusers_lora_file", "kohya_lora_file", "config_file"} <= files.keys()
    for file in files.values():
        if "url" in file:
            assert (tmp_path / file["file_name"]).stat().st_size == file["file_size"]
    lora = load_file(tmp_path / files["diffusers_lora_file"]["file_name"])
    assert any(name.endswith(".lora_A.weight") for name in lora)
    assert any("magnitude" in name for name in lora), f"DoRA is the default: {list(lora)[:4]}"


def test_the_javascript_client_uploads_a_blob_trains_and_downloads(
    server: RunningServer, archive: Path
) -> None:
    node = shutil.which("node")
    assert node, "the tests need Node.js, see scripts/environment"
    fields = {"photo_class": "Man", **SMALL, "max_train_steps": 2, "use_dora": False}
    command = [node, str(JAVASCRIPT / "subscribe.mjs"), server.url, "fal-ai/personalization"]

    answer = json.loads(said([*command, json.dumps(fields), f"images_data_url={archive}"]))

    assert answer["statuses"][-1] == "COMPLETED"
    assert answer["requestId"] == answer["enqueued"]
    assert len(answer["logs"]) > 3
    file = answer["data"]["kohya_lora_file"]
    assert len(httpx2.get(file["url"]).content) == file["file_size"]


def test_the_novita_client_trains_a_subject_and_generates_with_it(
    server: RunningServer, photographs: list[Path], tmp_path: Path
) -> None:
    program = [sys.executable, str(CLIENTS / "novita_training.py"), server.url, str(tmp_path)]

    answer = json.loads(said([*program, *map(str, photographs)]))

    assert answer["states"][-1] == "SUCCESS"
    assert answer["model"]["status"] == "SERVING"
    assert len(answer["pictures"]) == 2
    for url in answer["pictures"]:
        assert is_picture(httpx2.get(url).content, (128, 128))


def test_bfls_script_finetunes_and_generates_with_the_finetune(
    server: RunningServer, archive: Path
) -> None:
    environment = {**os.environ, "BFL_API_KEY": "any-key", "BFL_API_URL": server.url}
    script = [sys.executable, str(HERE / "bfl_finetune.py")]

    def ask(*words: str) -> dict[str, object]:
        printed = said([*script, *words], environment)
        pairs = [line.partition(":") for line in printed.splitlines() if ":" in line]
        return {name.strip(): value.strip() for name, _, value in pairs}

    def until_ready(command: str, id: str) -> dict[str, object]:
        deadline = time.monotonic() + 200
        while (found := ask(command, id))["status"] != "Ready":
            assert found["status"] == "Pending", found
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return found

    asked = ask(
        *("request_finetuning", str(archive), "myfirstfinetune", "--mode=character"),
        *("--iterations=3", "--captioning=False", "--priority=speed", "--lora_rank=16"),
    )
    finetune = str(asked["finetune_id"])
    until_ready("finetune_progress", finetune)
    inference = ask(
        *(
            "finetune_inference",
            finetune,
            "--endpoint=flux-pro-finetuned",
            "--prompt=a photo of TOK",
        ),
        *("--width=256", "--height=256", "--steps=2", "--seed=3", "--finetune_strength=1.1"),
    )
    ready = until_ready("get_inference", str(inference["id"]))

    result = ast.literal_eval(str(ready["result"]))
    assert is_picture(httpx2.get(result["sample"]).content, (256, 256))
    assert finetune in said([*script, "finetune_list"], environment)
    assert "myfirstfinetune" in said([*script, "finetune_details", finetune], environment)
    assert "deleted_finetune_id" in said([*script, "finetune_delete", finetune], environment)


@pytest.mark.thorough
def test_two_trainings_outlive_a_server_that_is_killed(
    tmp_path: Path, sd15_folder: Path, photographs: list[Path]
) -> None:
    (tmp_path / "models.yaml").write_text(
        yaml.safe_dump({"v1-5-pruned-emaonly": {"model_url": str(sd15_folder)}})
    )
    environment = {"TRAINER_BASE_MODELS": str(tmp_path / "models.yaml"), "OMP_NUM_THREADS": "1"}
    options = ("--gpus", "0", "--gpus", "1")
    body = {
        "name": "a subject",
        "base_model": "v1-5-pruned-emaonly",
        "width": 64,
        "height": 64,
    }

    def training(url: str, seed: int) -> str:
        ids = []
        for photograph in photographs:
            place = httpx2.post(
                f"{url}/v3/assets/training_dataset", json={"file_extension": "jpeg"}
            ).json()
            httpx2.put(place["upload_url"], content=photograph.read_bytes())
            ids.append({"assets_id": place["assets_id"]})
        expert = {"instance_prompt": "a TOK", "max_train_steps": 40, "seed": seed}
        asked = {**body, "image_dataset_items": ids, "expert_setting": expert, "components": []}
        task: str = httpx2.post(f"{url}/v3/training/subject", json=asked).json()["task_id"]
        return task

    with running_server(
        tmp_path / "data", *options, environment=environment, graceful=False
    ) as server:
        tasks = [training(server.url, seed) for seed in (1, 2)]
        logs = [tmp_path / "data" / "jobs" / task / "run" / "events.jsonl" for task in tasks]
        wait_for(lambda: all(log.exists() and '"step"' in log.read_text() for log in logs))
        server.process.kill()

    with running_server(tmp_path / "data", *options, environment=environment) as server:

        def states() -> set[str]:
            query = f"{server.url}/v3/training/subject?task_id="
            return {httpx2.get(f"{query}{task}").json()["task_status"] for task in tasks}

        wait_for(lambda: states() == {"SUCCESS"}, seconds=120)

    for log in logs:
        events = [json.loads(line) for line in log.read_text().splitlines()]
        assert [event["start_step"] for event in events if event["event"] == "run"] == [0]
        steps = [event["step"] for event in events if event["event"] == "step"]
        assert steps == list(range(1, 41))
