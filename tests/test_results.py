"""The result files of a training: their number formats, DoRA's conventions, and mixed precision."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from safetensors.torch import load_file
from tiny import TWO_LAYERS, configuration, digests, train

from trainer import results
from trainer.engine import Composition
from trainer.events import Event, FileEvent, NoteEvent, VerifyEvent
from trainer.export.readers import metadata_of
from trainer.job import RunFolder

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "full": {"use_lora": False, "learning_rate": 1e-5},
}
TINY = {"target_unet_modules": ["to_q"], "rank": 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The first of ten warm-up steps has a learning rate of zero.
NO_RATE = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10, "max_train_steps": 1}
# What a file holds in 32 bits whatever its weights are in: few numbers, and all-important ones.
ALWAYS_32_BITS = (".alpha", ".dora_scale", ".lora_magnitude_vector.weight")


def statuses(events: list[Event]) -> dict[str, set[str]]:
    """Weight file to what its readers found."""
    found: dict[str, set[str]] = {}
    for event in events:
        if isinstance(event, FileEvent) and event.path.endswith(".safetensors"):
            found[event.path] = set()
        if isinstance(event, VerifyEvent):
            found[event.path].add(event.status)
    return found


def warnings(events: list[Event]) -> str:
    return " ".join(e.message for e in events if isinstance(e, NoteEvent) and e.note == "warning")


@pytest.fixture(scope="module", params=FORMS)
def trained(
    request: pytest.FixtureRequest,
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Composition:
    """A training of a form in mixed precision whose steps are done, without files."""
    leaves = {"mixed_precision": "bf16", "max_train_steps": 2, **TWO_LAYERS, **FORMS[request.param]}
    folder = tmp_path_factory.mktemp("trained")
    composed, _ = snapshots.composition(configuration(sd15_folder, photo_folder, **leaves), folder)
    snapshots.watched(composed.training, folder)
    return composed


@pytest.mark.parametrize("save_dtype", DTYPES)
def test_a_training_is_given_back_by_its_files_whatever_the_format_of_their_weights(
    save_dtype: str, trained: Composition, tmp_path: Path
) -> None:
    output = trained.config.output.model_copy(update={"save_dtype": save_dtype})
    config = trained.config.model_copy(update={"output": output})

    events = snapshots.deliver(replace(trained, config=config), tmp_path)

    found = statuses(events)
    assert found
    assert all(status - {"not checked"} == {"passed"} for status in found.values())
    assert "nothing was learnt" not in warnings(events)
    for path in found:
        tensors = load_file(tmp_path / path)
        fixed = {tensors.pop(k).dtype for k in list(tensors) if k.endswith(ALWAYS_32_BITS)}
        assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[save_dtype]}
        assert fixed <= {torch.float32}


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_files_of_an_earlier_run_stay_until_all_new_ones_are_there(
    trained: Composition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    told = [e.path for e in snapshots.deliver(trained, tmp_path) if isinstance(e, FileEvent)]
    earlier = digests(tmp_path)
    assert set(told) == set(earlier)

    again = results.deliver(
        trained.config, trained.base, trained.precision, trained.training, RunFolder(tmp_path)
    )
    during = []
    while len(during) < len(told):
        next(again)
        during.append(digests(tmp_path / "outputs"))
    again.close()

    assert during == [digests(tmp_path / "outputs")] * len(told)
    assert digests(tmp_path) == earlier


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_what_a_killed_delivery_leaves_is_gone_with_the_next_one(
    trained: Composition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    for name in (".tmp-delivery/outputs/half", ".tmp-old-outputs/lora.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("from a kill")

    snapshots.deliver(trained, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert not (tmp_path / "outputs" / "half").exists()


@pytest.mark.parametrize(
    ("kohya_dora", "conventions"),
    [
        ("paper", {"lora.safetensors": "paper"}),
        ("comfyui", {"lora_comfyui.safetensors": "comfyui"}),
        ("both", {"lora.safetensors": "paper", "lora_comfyui.safetensors": "comfyui"}),
    ],
)
def test_kohya_dora_is_which_files_there_are_and_what_their_headers_say(
    kohya_dora: str,
    conventions: dict[str, str],
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
) -> None:
    leaves = {"use_dora": True, "kohya_dora": kohya_dora, "max_train_steps": 1, **TWO_LAYERS}

    found = statuses(train(configuration(sd15_folder, photo_folder, **leaves), tmp_path))

    outputs = tmp_path / "outputs"
    kohya = {path.name for path in outputs.glob("*.safetensors")}
    kohya.remove("pytorch_lora_weights.safetensors")
    headers = {name: metadata_of(outputs / name) for name in kohya}
    assert {name: header["dora_convention"] for name, header in headers.items()} == conventions
    assert all("passed" in found[f"outputs/{name}"] for name in conventions)


@pytest.mark.parametrize("form", FORMS)
def test_a_training_that_learnt_nothing_says_so(
    form: str, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {**TWO_LAYERS, **FORMS[form], **NO_RATE}

    events = train(configuration(sd15_folder, photo_folder, **leaves), tmp_path)

    card = (tmp_path / "outputs" / "README.md").read_text()
    report = json.loads((tmp_path / "outputs" / "verify.json").read_text())
    assert "nothing was learnt" in warnings(events)
    assert "the masks" not in warnings(events)
    assert "**Nothing was learnt**" in card
    assert {c["largest_change"] for c in report["checks"] if c["status"] == "passed"} == {0.0}


def test_where_nothing_was_learnt_from_pictures_with_masks_the_masks_are_named(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"clip_seg_mask_prompt": "head", "segmenter": "luminance", **TINY, **NO_RATE}

    events = train(configuration(sd15_folder, photo_folder, **leaves), tmp_path)

    assert "nothing was learnt" in warnings(events)
    assert "the masks keep" in warnings(events)


def test_where_nothing_changed_no_lora_is_extracted_and_that_is_said(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"use_lora": False, "extract_rank": 2, **NO_RATE}

    events = train(configuration(sd15_folder, photo_folder, **leaves), tmp_path)

    notes = [e.message for e in events if isinstance(e, NoteEvent) and e.field == "extract_rank"]
    assert notes == ["nothing changed that a LoRA can hold, so no LoRA was written"]
    assert not list((tmp_path / "outputs").glob("*.safetensors"))
    report = json.loads((tmp_path / "outputs" / "extraction.json").read_text())
    assert report["layers"] == {}


def test_card_and_header_name_the_prompt_of_every_concept(
    sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    concepts = [
        {"images_data_url": str(snapshots.write_pictures(tmp_path / token, 1)), "token": token}
        for token in ("TOK1", "TOK2")
    ]
    leaves = {"concepts": concepts, "instance_prompt": "a drawing of TOK1", **TINY}
    config = configuration(
        sd15_folder,
        tmp_path,
        max_train_steps=2,
        debug_dataset=True,
        token_abstraction="TOK1,TOK2",
        train_text_encoder_ti=True,
        images_data_url=None,
        **leaves,
    )

    train(config, tmp_path / "run")

    outputs = tmp_path / "run" / "outputs"
    card = (outputs / "README.md").read_text()
    assert "- `a drawing of TOK1`\n- `a drawing of TOK2`" in card
    assert '"a drawing of <s0><s1>",\n    "a drawing of <s2><s3>",' in card
    header = metadata_of(outputs / "lora.safetensors")
    assert header["modelspec.trigger_phrase"] == "a drawing of TOK1, a drawing of TOK2"
    with zipfile.ZipFile(outputs / "debug_dataset.zip") as archive:
        lines = archive.read("examples.jsonl").decode().splitlines()
    rows = {(row["concept"], row["caption"], row["encoded"]) for row in map(json.loads, lines)}
    assert rows == {
        (1, "a drawing of TOK1", "a drawing of <s0><s1>"),
        (2, "a drawing of TOK2", "a drawing of <s2><s3>"),
    }
