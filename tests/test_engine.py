"""Whole trainings: determinism, resume, refusal, and verified files for every form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TWO_LAYERS, compose, configuration, digests, losses, train

from trainer import engine
from trainer.errors import CheckpointError, InputError, Interrupted, NonFiniteError
from trainer.events import CheckpointEvent, FileEvent, NoteEvent, StepEvent, VerifyEvent
from trainer.job import RunFolder

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with alpha": {"alpha": 2.0},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "all weights": {"use_lora": False, "learning_rate": 1e-5},
}


@pytest.fixture(scope="module")
def finished(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a training that is done, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(configuration(sd15_folder, photo_folder, **TWO_LAYERS), folder)
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("sd15", form) for form in FORMS),
        ("sdxl", "dora"),
        *(
            pytest.param("sdxl", form, marks=pytest.mark.thorough)
            for form in FORMS
            if form != "dora"
        ),
    ],
)
def test_every_form_trains_and_its_files_give_back_the_trained_model(
    family: str, form: str, photo_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{family}_folder")
    events = train(configuration(model, photo_folder, **FORMS[form]), tmp_path)
    checks = [event for event in events if isinstance(event, VerifyEvent)]
    passed = {check.path for check in checks if check.status == "passed"}
    written = {e.path for e in events if isinstance(e, FileEvent) and ".safetensors" in e.path}
    assert len(losses(events)) == 4
    assert not [check for check in checks if check.status == "failed"]
    assert passed == written
    assert len(written) == {"dora": 3, "lokr": 3, "loha": 3, "all weights": 1}.get(form, 2)


def test_the_same_seed_gives_the_same_bytes(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves: dict[str, Any] = {"use_dora": True, "random_flip": True, **TWO_LAYERS}
    config = configuration(sdxl_folder, photo_folder, **leaves)
    for run in ("one", "two"):
        train(config, tmp_path / run)
    one, two = digests(tmp_path / "one" / "outputs"), digests(tmp_path / "two" / "outputs")
    assert len(one) >= 6
    assert one == two


def test_another_seed_gives_another_adapter(
    finished: Path, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    train(configuration(sd15_folder, photo_folder, seed=1, **TWO_LAYERS), tmp_path)
    one, other = (
        load_file(folder / "outputs" / "pytorch_lora_weights.safetensors")
        for folder in (finished, tmp_path)
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_processor_keeps_its_memory_while_steps_are_taken(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    @contextmanager
    def kept(wanted: bool) -> Iterator[None]:
        happened.append("kept" if wanted else "not kept")
        yield
        happened.append("given back")

    monkeypatch.setattr(engine.heap, "kept", kept)
    config = configuration(sd15_folder, photo_folder, **TWO_LAYERS)
    for event in engine.run(config, RunFolder(tmp_path), lambda: False):
        if isinstance(event, StepEvent | VerifyEvent):
            happened.append("step" if isinstance(event, StepEvent) else "verified")
    order = list(dict.fromkeys(happened))
    assert order == ["kept", "step", "given back", "verified"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    optimizer: str, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves: dict[str, Any] = {
        "optimizer": optimizer,
        "learning_rate": 1.0 if optimizer == "prodigy" else 1e-3,
        "lr_scheduler": "cosine",
        "max_train_steps": 6,
        "random_flip": True,
        "batch_size": 2,
        **TWO_LAYERS,
    }
    config = configuration(sd15_folder, photo_folder, **leaves)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        collect_until(config, tmp_path / "parts", step=3)
    second = train(config, tmp_path / "parts")
    assert losses(second) == losses(whole)[3:]
    assert digests(tmp_path / "parts" / "outputs") == digests(tmp_path / "whole" / "outputs")


def collect_until(config: Any, folder: Path, *, step: int) -> list[Any]:
    """Trains and wishes to stop once this step is done."""
    events: list[Any] = []

    def wished() -> bool:
        return any(isinstance(event, StepEvent) and event.step >= step for event in events)

    for event in engine.run(config, RunFolder(folder), wished):
        events.append(event)
    return events


def test_a_run_of_another_configuration_is_not_gone_on_with(
    done: Path, sd15_folder: Path, photo_folder: Path
) -> None:
    before = digests(done)
    leaves: dict[str, Any] = {"noise_offset": 0.1, "resolution_width": 128, **TWO_LAYERS}
    with pytest.raises(CheckpointError, match="noise_offset"):
        train(configuration(sd15_folder, photo_folder, **leaves), done)
    assert digests(done) == before


def test_a_run_on_other_pictures_is_not_gone_on_with(
    done: Path, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(photo_folder, tmp_path / "photos"))
    (photos / "photo_4.jpg").unlink()
    with pytest.raises(CheckpointError, match="training pictures"):
        train(configuration(sd15_folder, photos, **TWO_LAYERS), done)


def test_checkpoints_are_published_and_pruned_on_the_way(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, **TWO_LAYERS}
    config = configuration(sd15_folder, photo_folder, **leaves)
    events = train(config, tmp_path)
    published = [event.step for event in events if isinstance(event, CheckpointEvent)]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert published == [1, 2, 3, 4]
    assert kept == ["step-3", "step-4"]


def test_the_base_model_is_untouched_by_an_adapter_and_changed_without_one(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    base = load_file(sd15_folder / "unet" / "diffusion_pytorch_model.safetensors")
    config = configuration(sd15_folder, photo_folder, use_lora=False, learning_rate=1e-4)
    events = train(config, tmp_path)
    roles = {event.role for event in events if isinstance(event, FileEvent)}
    trained = load_file(tmp_path / "outputs" / "unet" / "diffusion_pytorch_model.safetensors")
    assert "denoiser_weights" in roles
    assert "diffusers_lora" not in roles
    assert trained.keys() == base.keys()
    assert sum(not torch.equal(trained[name], base[name]) for name in base) > len(base) * 0.9


def test_a_learning_rate_beyond_reason_ends_without_result_files(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, learning_rate=1e30, max_train_steps=8)
    with pytest.raises(NonFiniteError, match="at timestep"):
        train(config, tmp_path)
    assert not (tmp_path / "outputs").exists()


def test_verify_json_names_every_reader_and_its_largest_difference(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    train(configuration(sdxl_folder, photo_folder, use_dora=True, **TWO_LAYERS), tmp_path)
    report = json.loads((tmp_path / "outputs" / "verify.json").read_text())
    text = json.dumps(report)
    assert '"diffusers"' in text
    assert '"lycoris"' in text


def test_a_wrong_target_is_refused_with_known_endings(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, target_unet_modules=["to_q", "to_kk"])
    with pytest.raises(InputError, match="to_kk"):
        train(config, tmp_path)


def test_a_moved_folder_of_the_same_pictures_is_gone_on_with(
    done: Path, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(photo_folder, tmp_path / "moved"))
    again = train(configuration(sd15_folder, moved, **TWO_LAYERS), done)
    assert losses(again) == []


def test_a_run_on_other_base_weights_is_not_gone_on_with(
    done: Path, photo_folder: Path, tmp_path: Path
) -> None:
    model = make_tiny_models.make_sd15(tmp_path / "model", seed=1)
    with pytest.raises(CheckpointError, match="base model's contents"):
        train(configuration(model, photo_folder, **TWO_LAYERS), done)


def test_a_wrong_target_or_timestep_is_refused_before_any_picture_is_read(
    sd15_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, tmp_path / "no-photos", target_unet_modules=["to_kk"])
    with pytest.raises(InputError, match="to_kk"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_delivered_again_in_another_format_without_training(
    done: Path, sd15_folder: Path, photo_folder: Path
) -> None:
    leaves = {"save_dtype": "bf16", **TWO_LAYERS}
    again = train(configuration(sd15_folder, photo_folder, **leaves), done)
    written = load_file(done / "outputs" / "pytorch_lora_weights.safetensors")
    assert losses(again) == []
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_a_corrected_noise_schedule_makes_another_run(
    done: Path, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(sd15_folder, tmp_path / "model"))
    training, _ = compose(configuration(model, photo_folder, **TWO_LAYERS), done)
    assert list(training.resume(RunFolder(done))) == []
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(CheckpointError, match="base model's contents"):
        train(configuration(model, photo_folder, **TWO_LAYERS), done)


def test_an_option_without_effect_does_not_make_another_run(
    done: Path, sd15_folder: Path, photo_folder: Path
) -> None:
    leaves: dict[str, Any] = {"lokr_factor": 4, "model_family": "sd15", **TWO_LAYERS}
    again = configuration(sd15_folder, photo_folder, **leaves)
    assert losses(train(again, done)) == []


def test_a_wish_to_stop_while_files_are_written_is_granted_and_the_next_run_delivers(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, **TWO_LAYERS)
    events: list[Any] = []

    def wished() -> bool:
        return any(isinstance(event, FileEvent) for event in events)

    with pytest.raises(Interrupted, match="before all files"):
        for event in engine.run(config, RunFolder(tmp_path), wished):
            events.append(event)
    again = train(config, tmp_path)
    assert losses(again) == []
    assert any(isinstance(event, VerifyEvent) for event in again)


def test_pictures_of_which_the_masks_leave_nothing_to_see_are_told(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(photo_folder / "photo_4.jpg", photos)
    # The picture is tall: the middle window does not reach its uppermost rows.
    mask = Image.new("L", (300, 512))
    mask.paste(255, (0, 0, 300, 20))
    mask.save(photos / "photo_4_mask.png")
    config = configuration(sd15_folder, photos, enable_bucket=False)
    with pytest.raises(InputError, match="the masks keep nothing of what is seen of any picture"):
        compose(config, tmp_path / "alone")

    shutil.copy(photo_folder / "photo_1.jpg", photos)
    _, events = compose(config, tmp_path / "two")
    notes = [event.message for event in events if isinstance(event, NoteEvent)]
    assert any("`photo_4.jpg`: they teach nothing" in note for note in notes)


def test_an_offset_without_room_is_reported_as_without_effect(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(photo_folder / "photo_1.jpg", photos)
    leaves = {"random_crop_offset_x": 4, "cache_latents": False}
    _, events = compose(configuration(sd15_folder, photos, **leaves), tmp_path / "run")
    ignored = [e.field for e in events if isinstance(e, NoteEvent) and e.note == "ignored"]
    assert "random_crop_offset_x" in ignored
