"""Steps that are recorded once and played: the same weights as steps computed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from PIL import Image
from snapshots import Learnt, watched
from tape import HostRead, TapeRecorder, nothing_read
from tiny import compose, configuration, never

from trainer.errors import InputError
from trainer.events import CheckpointEvent, NoteEvent
from trainer.job import RunFolder
from trainer.recording import PlainRecorder, Recorder
from trainer.training import Training

LAYERS = {"target_unet_modules": ["attn1.to_q", "conv1"], "rank": 2}
COURSE = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "learning_rate": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "dora, accumulated": {"use_dora": True, "gradient_accumulation_steps": 2, **COURSE},
    "lora": COURSE,
    "lokr, several pictures": {"lora_type": "lokr", "batch_size": 2},
    "loha, bf16": {"lora_type": "loha", "mixed_precision": "bf16"},
    "prodigy": {"optimizer": "prodigy"},
    "recomputed": {"gradient_checkpointing": True},
    "all weights": {"use_lora": False},
}
FIRST, *OTHERS = CASES


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshots.write_pictures(tmp_path_factory.mktemp("recording") / "subject", 4)


def trained(
    model: Path, photos: Path, folder: Path, recorder: Recorder | None, **leaves: Any
) -> tuple[list[Learnt], Training]:
    """What is learnt after each of 8 steps, by steps that a recorder records."""
    given = {"max_train_steps": 8, **LAYERS, **leaves}
    training, _ = compose(configuration(model, photos, **given), folder)
    if recorder is not None:
        training.record(recorder)
    return watched(training, folder)[0], training


@pytest.mark.parametrize(
    "case", [FIRST, *(pytest.param(c, marks=pytest.mark.thorough) for c in OTHERS)]
)
def test_a_step_that_is_played_learns_what_a_computed_one_learns(
    case: str, sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    recorder = TapeRecorder()
    computed, _ = trained(sd15_folder, subject, tmp_path / "1", PlainRecorder(), **CASES[case])
    played, _ = trained(sd15_folder, subject, tmp_path / "2", recorder, **CASES[case])

    assert (len(recorder.tapes), recorder.played) == (1, 5)
    assert len(played) == 9
    for one, other in zip(computed, played, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(played[-2][name], played[-1][name]) for name in played[-1])


@pytest.mark.thorough
def test_steps_that_can_be_recorded_learn_what_others_learn_but_for_rounding(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    recordable, _ = trained(sd15_folder, subject, tmp_path / "1", PlainRecorder(), **COURSE)
    others, _ = trained(sd15_folder, subject, tmp_path / "2", None, **COURSE)
    for one, other in zip(recordable, others, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_each_size_has_a_recording_of_its_own(sd15_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, size in enumerate([(64, 64), (96, 48), (48, 96)]):
        Image.new("RGB", size, (80 * number, 100, 200)).save(photos / f"{number}.png")
    leaves = {"enable_bucket": True, "max_train_steps": 18}
    recorder = TapeRecorder()
    computed, _ = trained(sd15_folder, photos, tmp_path / "1", PlainRecorder(), **leaves)
    played, training = trained(sd15_folder, photos, tmp_path / "2", recorder, **leaves)

    sizes = {example.target for example in training.dataset.examples}
    assert len(sizes) == len(recorder.tapes) == 3
    assert recorder.played == 18 - 3 * 3
    assert all(torch.equal(computed[-1][name], played[-1][name]) for name in computed[-1])


def test_what_learns_before_the_pivot_is_computed_and_what_learns_after_it_recorded(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    leaves = {"train_text_encoder_ti": True, "train_text_encoder_ti_frac": 0.5}
    recorder = TapeRecorder()
    computed, _ = trained(sd15_folder, subject, tmp_path / "1", PlainRecorder(), **leaves)
    played, _ = trained(sd15_folder, subject, tmp_path / "2", recorder, **leaves)
    assert recorder.played == 1
    for one, other in zip(computed, played, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recorded_training_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    whole, _ = trained(sd15_folder, subject, tmp_path / "1", TapeRecorder(), **COURSE)
    config = configuration(
        sd15_folder, subject, **{"max_train_steps": 8, "checkpointing_steps": 5, **LAYERS, **COURSE}
    )
    first, _ = compose(config, tmp_path / "2")
    first.record(TapeRecorder())
    for event in first.steps(RunFolder(tmp_path / "2"), never):
        if isinstance(event, CheckpointEvent):
            break
    second, _ = compose(config, tmp_path / "2")
    second.record(TapeRecorder())
    list(second.resume(RunFolder(tmp_path / "2")))
    assert second.step == 5
    states, _ = watched(second, tmp_path / "2")
    assert all(torch.equal(whole[-1][name], states[-1][name]) for name in whole[-1])


@pytest.mark.parametrize(
    ("model", "leaves"),
    [
        ("sd15_folder", {"optimizer": "prodigy", "use_dora": True}),
        ("sdxl_folder", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("flux_folder", {"target_unet_modules": ["to_q"]}),
        ("flux2_folder", {"target_unet_modules": ["to_q"], "use_dora": True}),
    ],
)
def test_nothing_is_read_from_the_device_in_a_step(
    model: str,
    leaves: dict[str, Any],
    subject: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    given = {"max_train_steps": 4, **LAYERS, **leaves}
    config = configuration(request.getfixturevalue(model), subject, **given)
    training, _ = compose(config, tmp_path)
    list(training._enter_phase(training.schedule.parts_at(0)))
    with nothing_read():
        for step in range(2):
            training._one_step(training.dataset[step])
    assert training.step == 2
    with pytest.raises(HostRead), nothing_read():
        training.losses.append(training.readings.healthy.item())


def test_a_device_that_cannot_record_is_told_of_and_steps_are_computed(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    training, _ = compose(
        configuration(sd15_folder, subject, max_train_steps=6, **LAYERS), tmp_path / "1"
    )
    training.record(TapeRecorder(refuses=True))
    states, events = watched(training, tmp_path / "1")
    computed, _ = trained(sd15_folder, subject, tmp_path / "2", PlainRecorder(), max_train_steps=6)
    (warning,) = (event for event in events if isinstance(event, NoteEvent))
    assert warning.field == "cuda_graph"
    assert "not permitted" in warning.message
    assert all(torch.equal(computed[-1][name], states[-1][name]) for name in states[-1])


def test_whoever_asked_for_a_recording_gets_an_error_where_there_can_be_none(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    training, _ = compose(configuration(sd15_folder, subject, **LAYERS), tmp_path)
    training.record(TapeRecorder(refuses=True))
    training.stepper._must_record = True
    with pytest.raises(InputError, match="cannot record a step"):
        list(training.steps(RunFolder(tmp_path), never))
