"""fal's own request, at fal's defaults but for size: every stage runs, and resumes to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from skimage import data as pictures
from snapshots import stopped_after
from tiny import compose, digests, train
from tiny_vision import tiny_clipseg, tiny_llava

from trainer import cli as commands
from trainer.config import TrainingConfig
from trainer.data.prepared import Index
from trainer.dialects.fal_personalization import Input
from trainer.flags import configuration
from trainer.job import RunFolder

PAYLOADS = Path(__file__).parent.parent / "configs" / "payloads"
REQUEST = PAYLOADS / "fal_personalization.json"
SMALLER = PAYLOADS / "fal_personalization_tiny.yaml"
STEPS, PIVOT = 8, 4
# Left, top, right and lower edge of what is cut out of a portrait whose face is at (177, 66) and
# 96 x 110 large: it is never in the middle.
CUTS = (
    (0, 0, 460, 300),
    (150, 0, 512, 250),
    (60, 20, 300, 512),
    (100, 0, 420, 400),
    (30, 0, 330, 220),
)
SAID = "one person smiles before two flags."


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the request and its trial need: the archive, and models that look at pictures."""
    root = tmp_path_factory.mktemp("fal")
    portrait = Image.fromarray(pictures.astronaut())
    with ZipFile(root / "photographs.zip", "w") as archive:
        for number, cut in enumerate(CUTS):
            portrait.crop(cut).save(root / f"{number}.png")
            archive.write(root / f"{number}.png", f"holiday/{number}.png")
    tiny_clipseg(root / "clipseg")
    tiny_llava(root / "llava", says=SAID)
    return root / "photographs.zip"


def given(model: Path, photographs: Path) -> list[str]:
    """The command line's arguments beside the request."""
    places = {
        "images-data-url": photographs,
        "model-url": model,
        "clipseg-url": photographs.parent / "clipseg",
        "captioner": photographs.parent / "llava",
    }
    return [word for name, place in places.items() for word in (f"--{name}", str(place))]


def requested(model: Path, photographs: Path, *flags: str) -> TrainingConfig:
    """The configuration that the command line makes of the request."""
    arguments = [*given(model, photographs), *flags]
    context = commands.train.make_context("train", arguments)
    with context:
        return configuration(REQUEST, None, "fal", [SMALLER])


@pytest.fixture(scope="module")
def whole(
    sdxl_folder: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """The request, trained by the command line."""
    folder = RunFolder(tmp_path_factory.mktemp("fal") / "run")
    arguments = ["train", str(REQUEST), str(SMALLER), "--dialect", "fal"]
    code = commands.run(
        [*arguments, *given(sdxl_folder, photographs), "--output", str(folder.root)]
    )
    assert code == 0
    return folder


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_field_but_those_of_the_small_trial_has_fals_default(
    family: str, photographs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(f"{family}_folder")
    config = requested(model, photographs)
    training, _ = compose(config, tmp_path)

    others = set(yaml.safe_load(SMALLER.read_text())) | set(json.loads(REQUEST.read_text()))
    expected = {
        name: info.default for name, info in Input.model_fields.items() if name not in others
    }
    # A container that is not named is a zip; a list of words is written with commas.
    expected |= {"data_archive_format": "zip", "token_abstraction": ("TOK",)}
    expected |= {"model_url": str(model)}
    found = {name: config.leaf(name) for name in expected}
    assert len(expected) > 50
    for name, value in expected.items():
        assert found[name] == (tuple(value) if isinstance(value, list) else value), name
    # And the service's methods are all at work.
    (batch,) = training.dataset[0]
    assert training.trainables.new_tokens.keys() == set(training.family.text_encoder_names)
    assert batch.is_class.tolist() == [False, False, True, True]
    assert batch.masks is not None
    assert any(batch.angles)
    assert any("magnitude" in name for name in training.trainables.weights()["unet"])
    assert training.schedule.pivot == PIVOT


def test_each_picture_is_cropped_to_its_face_masked_and_captioned(whole: RunFolder) -> None:
    index = Index.model_validate_json((whole.prepared / "prepared.json").read_text())
    assert len(index.pictures) == len(CUTS)
    for picture, cut in zip(index.pictures, CUTS, strict=True):
        x, y, scale = 177 + 48 - cut[0], 66 + 55 - cut[1], picture.view.size[1] / (cut[2] - cut[0])
        assert picture.window is not None
        top, left = picture.window
        assert left < x * scale < left + 64, picture.name
        assert top < y * scale < top + 64, picture.name
        assert picture.mask is not None
        assert (picture.mask.origin.kind, picture.mask.origin.prompt) == ("segmented", "head")
        assert 0 < picture.mask.mean < 1
        assert picture.caption_origin == "generated"
        assert picture.caption == f"TOK {SAID.removesuffix('.')}"
    # The service's mask lies on class pictures too.
    of_class = (whole.prepared / "class_1" / "prepared.json").read_text()
    masks = [picture.mask for picture in Index.model_validate_json(of_class).pictures]
    assert [mask.origin.prompt for mask in masks if mask is not None] == ["head"] * 4


def test_every_stage_of_the_request_is_told_in_its_order(whole: RunFolder) -> None:
    events = whole.read_events()
    stages = list(dict.fromkeys(e["stage"] for e in events if e["event"] == "stage"))
    assert stages[:5] == [
        *("prepare", "caption", "class images", "prepare class images", "encode captions"),
    ]
    assert "verify" in stages
    kinds = [e["event"] for e in events if e["event"] in ("run", "phase", "checkpoint", "step")]
    before, after = ["phase", *["step"] * PIVOT], ["phase", *["step"] * (STEPS - PIVOT)]
    assert kinds == ["run", *before, *after, "checkpoint"]
    phases = [(e["step"], e["learning"], e["frozen"]) for e in events if e["event"] == "phase"]
    assert phases == [
        (0, ["denoiser", "tokens"], []),
        (PIVOT, ["denoiser"], ["tokens"]),
    ]
    # Captions are encoded for good when the tokens have learnt.
    encoding = [i for i, e in enumerate(events) if e.get("stage") == "encode captions"]
    steps = [i for i, e in enumerate(events) if e["event"] == "step"]
    assert steps[PIVOT - 1] < min(encoding) <= max(encoding) < steps[PIVOT]
    roles = {e["role"] for e in events if e["event"] == "file"}
    assert roles == {
        *("diffusers_lora", "kohya_lora", "kohya_lora_comfyui", "embeddings", "token_embedding"),
        *("config", "loss_plot", "verification", "model_card"),
    }


def test_every_weight_file_of_the_request_is_verified(whole: RunFolder) -> None:
    checks = [e for e in whole.read_events() if e["event"] == "verify"]
    passed = {check["path"] for check in checks if check["status"] == "passed"}
    written = {f"outputs/{path.name}" for path in whole.outputs.glob("*.safetensors")}
    assert len(written) == 5
    assert passed == written
    assert {check["status"] for check in checks} <= {"passed", "not checked"}


def test_the_answer_has_the_services_files(whole: RunFolder) -> None:
    answer = json.loads(whole.answer("fal").read_text())
    assert list(answer) == [
        *("diffusers_lora_file", "kohya_lora_file", "text_embeddings_file", "config_file"),
    ]
    names = {field: file["file_name"] for field, file in answer.items()}
    assert names == {
        "diffusers_lora_file": "pytorch_lora_weights.safetensors",
        "kohya_lora_file": "lora.safetensors",
        "text_embeddings_file": "lora_emb.safetensors",
        "config_file": "config.yaml",
    }
    for file in answer.values():
        path = Path(file["url"].removeprefix("file://"))
        assert path.stat().st_size == file["file_size"]


def test_the_adapter_and_the_tokens_have_fals_shapes(whole: RunFolder) -> None:
    adapter = load_file(whole.outputs / "pytorch_lora_weights.safetensors")
    tokens = load_file(whole.outputs / "lora_emb.safetensors")
    layers = {name.rsplit(".lora_", 1)[0] for name in adapter}
    ends = ("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2")
    assert {next(end for end in ends if layer.endswith(end)) for layer in layers} == set(ends)
    assert {t.shape[0] for name, t in adapter.items() if "lora_A" in name} == {32}
    assert sum("lora_magnitude_vector" in name for name in adapter) == len(layers)
    assert {key: len(rows) for key, rows in tokens.items()} == {"clip_l": 2, "clip_g": 2}


@pytest.mark.thorough
def test_a_request_stopped_after_every_step_in_turn_ends_in_the_same_bytes(
    sdxl_folder: Path, photographs: Path, whole: RunFolder, tmp_path: Path
) -> None:
    config = requested(sdxl_folder, photographs)
    told: list[dict[str, Any]] = []
    for step in range(1, STEPS):
        told += [event.as_dict() for event in stopped_after(step, config, tmp_path)]
        assert RunFolder(tmp_path).checkpoints.joinpath(f"step-{step}").is_dir()
    told += [event.as_dict() for event in train(config, tmp_path)]

    def losses(events: list[dict[str, Any]]) -> list[float]:
        return [event["loss"] for event in events if event["event"] == "step"]

    assert losses(told) == losses(whole.read_events())
    expected = digests(whole.outputs)
    assert len(expected) == 9
    assert digests(RunFolder(tmp_path).outputs) == expected
    weights = [f"step-{STEPS}/weights.safetensors", f"step-{STEPS}/state.json"]
    for name in weights:
        one, two = whole.checkpoints / name, RunFolder(tmp_path).checkpoints / name
        assert one.read_bytes() == two.read_bytes()
