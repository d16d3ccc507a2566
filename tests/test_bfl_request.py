"""The request of BFL's own example script: from its payload to a verified finetune and its answer.

The payload has all ten fields as the script of the FLUX Finetuning Beta Guide builds it
(`request_finetuning`), with its default arguments but for what a test says.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from tiny_vision import tiny_llava

from trainer import cli as commands
from trainer.data.prepared import Index
from trainer.dialects.bfl import Input
from trainer.job import RunFolder

STEPS = 3
SAID = "a photo of the woman with red table."
CAPTION = "TOK, an astronaut before a flag"
# Left, top, right and lower edge of what is cut out of a portrait: across, upright and square.
CUTS = {"a.jpg": (60, 0, 460, 300), "b.PNG": (100, 20, 340, 500), "c.webp": (80, 0, 400, 320)}


@cache
def zipped() -> bytes:
    """Three real photographs in the formats that the service takes, one with a caption."""
    portrait = Image.fromarray(photographs.astronaut())
    content = BytesIO()
    with ZipFile(content, "w") as archive:
        for name, cut in CUTS.items():
            file = BytesIO()
            kind = {"jpg": "JPEG", "PNG": "PNG", "webp": "WEBP"}[name.partition(".")[2]]
            portrait.crop(cut).save(file, format=kind)
            archive.writestr(f"finetuning/{name}", file.getvalue())
        archive.writestr("finetuning/a.txt", CAPTION)
        archive.writestr("README.md", "Three photographs.")
    return content.getvalue()


def payload(**fields: Any) -> dict[str, Any]:
    """What the script sends."""
    return {
        "finetune_comment": "my first finetune",
        "trigger_word": "TOK",
        "file_data": base64.b64encode(zipped()).decode("utf-8"),
        "iterations": 300,
        "mode": "general",
        "learning_rate": 0.00001,
        "captioning": True,
        "priority": "quality",
        "lora_rank": 32,
        "finetune_type": "full",
        **fields,
    }


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes captions."""
    return tiny_llava(tmp_path_factory.mktemp("bfl") / "llava", says=SAID)


def trained(request: dict[str, Any], root: Path, model: Path, captioner: Path) -> RunFolder:
    """The request, trained by the command line over a trial file."""
    assert set(request) == set(Input.model_fields)
    root.mkdir(exist_ok=True)
    trial = {"max_train_steps": STEPS, "model_url": str(model), "captioner": str(captioner)}
    (root / "request.json").write_text(json.dumps(request))
    (root / "trial.yaml").write_text(yaml.safe_dump(trial))
    folder = RunFolder(root / "run")
    files = [str(root / "request.json"), str(root / "trial.yaml")]
    assert commands.run(["train", *files, "--dialect", "bfl", "--output", str(folder.root)]) == 0
    return folder


@pytest.fixture(scope="module")
def full(flux_folder: Path, captioner: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The script's default: all weights, and a LoRA taken from their change."""
    return trained(payload(), tmp_path_factory.mktemp("full"), flux_folder, captioner)


@pytest.fixture(scope="module")
def lora(flux_folder: Path, captioner: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The script with `--finetune_type=lora` and a small rank."""
    request = payload(finetune_type="lora", lora_rank=16, learning_rate=0.0001)
    return trained(request, tmp_path_factory.mktemp("lora"), flux_folder, captioner)


@pytest.fixture(params=["full", "lora"])
def done(request: pytest.FixtureRequest) -> RunFolder:
    """Either training."""
    folder: RunFolder = request.getfixturevalue(request.param)
    return folder


def test_each_photograph_is_trained_at_three_sizes_with_its_caption_or_one_that_is_written(
    full: RunFolder,
) -> None:
    index = Index.model_validate_json((full.prepared / "prepared.json").read_text())
    events = full.read_events()
    (begin,) = (event for event in events if event["event"] == "run")

    assert [(p.caption_origin, p.caption) for p in index.pictures] == [
        ("txt", CAPTION),
        *[("generated", f"TOK, {SAID.removesuffix('.')}")] * 2,
    ]
    # The tiny model's own side is 64.
    areas = [[h * w for h, w in (s.target for s in p.view.scales)] for p in index.pictures]
    for own in areas:
        assert own == sorted(own, reverse=True)
        assert [round((area / 64**2) ** 0.5, 1) for area in own] == pytest.approx(
            [1, 0.75, 0.5], abs=0.15
        )
    assert (begin["num_pictures"], begin["num_sizes"], begin["num_examples"]) == (3, 3, 9)
    assert Counter(event["event"] for event in events)["step"] == STEPS
    assert any("`README.md`" in event.get("message", "") for event in events)


def test_what_learns_is_what_was_asked_for(full: RunFolder, lora: RunFolder) -> None:
    (all_weights,) = (e["details"] for e in full.read_events() if e["event"] == "run")
    (some,) = (e["details"] for e in lora.read_events() if e["event"] == "run")

    assert (all_weights["method"], some["method"]) == ("all weights", "lora")
    for folder, rank in ((full, 32), (lora, 16)):
        (file,) = folder.outputs.glob("pytorch_lora_weights.safetensors")
        down = {t.shape[0] for name, t in load_file(file).items() if "lora_A" in name}
        assert max(down) == rank


def test_every_weight_file_is_read_back(done: RunFolder) -> None:
    checks = json.loads((done.outputs / "verify.json").read_text())["checks"]
    found = {path.name for path in done.outputs.rglob("*.safetensors")}

    assert {check["status"] for check in checks} <= {"passed", "not checked"}
    assert {Path(c["path"]).name for c in checks if c["status"] == "passed"} == found
    assert {"pytorch_lora_weights.safetensors", "my first finetune.safetensors"} <= found


def test_the_answer_is_ready_with_the_lora_and_the_configuration(done: RunFolder) -> None:
    answer = json.loads(done.answer("bfl").read_text())

    assert answer["status"] == "Ready"
    names = {field: file["file_name"] for field, file in answer["result"].items()}
    assert names == {
        "diffusers_lora_file": "pytorch_lora_weights.safetensors",
        "kohya_lora_file": "my first finetune.safetensors",
        "config_file": "config.yaml",
    }
    for file in answer["result"].values():
        path = Path(file["url"].removeprefix("file://").replace("%20", " "))
        assert path.stat().st_size == file["file_size"]


def test_the_photographs_stay_with_their_owner(done: RunFolder) -> None:
    sent = base64.b64encode(zipped()).decode()

    assert sent in done.config.read_text()
    assert all(
        sent.encode() not in path.read_bytes() for path in done.outputs.rglob("*") if path.is_file()
    )
