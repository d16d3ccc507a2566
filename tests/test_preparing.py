"""`prepare`: what a training begins with, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid_bytes, write_folder
from tiny import TWO_LAYERS, configuration, digests, never, train

from trainer import cli as commands
from trainer.config import TrainingConfig
from trainer.data import masking
from trainer.errors import InputError, Interrupted, OutOfMemoryError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.images.segmenters import SegmenterKind
from trainer.job import RunFolder
from trainer.preparing import prepare, report


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", {f"{n}.png": grid_bytes(80, 120, 50 * n) for n in (1, 2)})


def small(model: Path, pictures: Path, **leaves: Any) -> TrainingConfig:
    size = {"resolution_width": 64, "resolution_height": 64}
    return configuration(model, pictures, **{**TWO_LAYERS, **size, **leaves})


def run(config: TrainingConfig, folder: Path) -> list[Event]:
    return list(prepare(config, RunFolder(folder), never))


def test_only_prepared_files_are_left_in_the_run_folder(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    run(small(sd15_folder, pictures), tmp_path / "run")

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["prepared"]


def test_no_base_model_is_needed_where_the_size_is_given(pictures: Path, tmp_path: Path) -> None:
    config = small(tmp_path / "no such model", pictures)

    events = run(config, tmp_path / "run")

    assert any(isinstance(event, StageEvent) for event in events)


def test_without_a_size_it_is_the_base_models_own(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, pictures, enable_bucket=False)

    run(config, tmp_path / "run")

    (described,) = report(config, RunFolder(tmp_path / "run"))["sets"]
    # The tiny model's latents are 8 x 8, of 8 pixels each.
    assert {tuple(picture["trained_size"]) for picture in described["pictures"]} == {(64, 64)}


def test_a_training_prepares_the_same_files(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = small(sd15_folder, pictures, max_train_steps=1)
    run(config, tmp_path / "run")
    before = digests(RunFolder(tmp_path / "run").prepared)

    train(config, tmp_path / "run")
    train(config, tmp_path / "another")

    assert digests(RunFolder(tmp_path / "run").prepared) == before
    assert digests(RunFolder(tmp_path / "another").prepared) == before


def test_the_folder_of_a_training_is_refused(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = small(sd15_folder, pictures, max_train_steps=1)
    train(config, tmp_path)
    before = digests(tmp_path)

    with pytest.raises(InputError, match="holds a training already"):
        run(config, tmp_path)

    assert digests(tmp_path) == before


def test_a_wish_to_stop_ends_it_and_the_same_command_goes_on(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config, folder = small(sd15_folder, pictures), RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted) as caught:
        list(prepare(config, folder, lambda: True))
    assert caught.value.hint == "run the same command to go on"

    run(config, folder.root)
    run(config, tmp_path / "at once")

    assert digests(folder.prepared) == digests(RunFolder(tmp_path / "at once").prepared)


def test_each_concept_and_each_class_has_a_set_of_its_own(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    of_class = write_folder(tmp_path / "class", {"man.png": grid_bytes(90, 90, 200)})
    concepts = [
        {"images_data_url": str(pictures)},
        {
            "images_data_url": str(pictures),
            "with_prior_preservation": True,
            "class_images_url": str(of_class),
            "photo_class": "Man",
        },
    ]
    config = small(sd15_folder, pictures, images_data_url=None, concepts=concepts)

    run(config, tmp_path / "run")

    described = report(config, RunFolder(tmp_path / "run"))["sets"]
    assert [Path(each["folder"]).name for each in described] == [
        *("concept_1", "concept_2", "class_1"),
    ]
    assert [len(each["pictures"]) for each in described] == [2, 2, 1]
    for each in described:
        assert [Path(page).is_file() for page in each["contact_sheets"]] == [True]


def test_sets_are_in_the_order_of_concepts_and_classes_however_many_there_are(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    of_class = write_folder(tmp_path / "class", {"man.png": grid_bytes(90, 90, 200)})
    concepts = [
        {
            "images_data_url": str(pictures),
            "with_prior_preservation": True,
            "class_images_url": str(of_class),
            "class_prompt": f"man number {number}",
        }
        for number in range(11)
    ]
    config = small(sd15_folder, pictures, images_data_url=None, concepts=concepts)

    run(config, tmp_path / "run")

    described = report(config, RunFolder(tmp_path / "run"))["sets"]
    assert [Path(each["folder"]).name for each in described] == [
        *(f"concept_{number}" for number in range(1, 12)),
        *(f"class_{number}" for number in range(1, 12)),
    ]
    assert described[11]["advice"]["lines"] == []


def test_what_is_said_of_pictures_stands_in_their_report_alone(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    write_folder(pictures, {"broken.jpg": "text", "1.txt": "TOK on a grid"})
    config = small(sd15_folder, pictures)

    events = run(config, tmp_path / "run")
    run(config, tmp_path / "run")

    (described,) = report(config, RunFolder(tmp_path / "run"))["sets"]
    notes = [event.message for event in events if isinstance(event, NoteEvent)]
    assert not any("broken.jpg" in message or "only 2" in message for message in notes)
    assert [note["message"].split(" and ")[0] for note in described["notes"]] == [
        "2 of 3 pictures have no caption of their own"
    ]


def test_what_is_said_of_pictures_is_not_lost_where_they_are_refused(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    write_folder(pictures, {"movie.mp4": b"x", "1.png": b"", "2.png": b""})
    events: list[Event] = []

    with pytest.raises(InputError, match="no picture can be used"):
        for event in prepare(small(sd15_folder, pictures), RunFolder(tmp_path / "run"), never):
            events.append(event)

    assert any(isinstance(event, NoteEvent) and "movie.mp4" in event.message for event in events)


def test_class_pictures_that_a_base_model_would_make_are_not_made(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = small(
        sd15_folder, pictures, with_prior_preservation=True, photo_class="Man", num_class_images=2
    )

    run(config, tmp_path / "run")

    folder = RunFolder(tmp_path / "run")
    assert len(report(config, folder)["sets"]) == 1
    assert not folder.class_images.exists()


def test_what_was_settled_in_the_configuration_is_told(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, pictures, resolution_width=64)

    events = run(config, tmp_path / "run")

    notes = [event for event in events if isinstance(event, NoteEvent)]
    assert ("yielded", "resolution_height") in [(note.note, note.field) for note in notes]


def test_a_model_that_does_not_fit_into_memory_is_an_error_of_memory(
    sd15_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More text")

    kind = SegmenterKind(ready, lambda _: "large")
    monkeypatch.setattr(masking, "SEGMENTERS", {"clipseg": kind})
    config = small(sd15_folder, pictures, clip_seg_mask_prompt="head")

    with pytest.raises(OutOfMemoryError) as caught:
        run(config, tmp_path / "run")

    assert caught.value.message == "CUDA out of memory"
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


# The command


def words(model: Path, pictures: Path, output: Path) -> list[str]:
    given = {"model-url": model, "images-data-url": pictures, "output": output}
    size = {"resolution-width": 64, "resolution-height": 64}
    return [word for name, value in (given | size).items() for word in (f"--{name}", str(value))]


def test_the_command_prints_the_report_as_json(
    sd15_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = commands.run(["prepare", *words(sd15_folder, pictures, tmp_path / "run"), "--json"])

    said = json.loads(capsys.readouterr().out)
    (described,) = said["sets"]
    assert code == 0
    assert said["folder"] == str((tmp_path / "run").resolve())
    assert [picture["name"] for picture in described["pictures"]] == ["1.png", "2.png"]
    assert [line["topic"] for line in described["advice"]["lines"]][0] == "count"
    (page,) = described["contact_sheets"]
    assert Path(page).is_file()


def test_the_command_says_which_sheet_to_open(
    sd15_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = commands.run(["prepare", *words(sd15_folder, pictures, tmp_path / "run")])

    said = capsys.readouterr()
    assert code == 0
    assert "Open this contact sheet: " in said.out
    assert "contact_sheet_1.jpg" in said.out
    assert "prepare: 2 of 2" in said.err


def test_pictures_that_are_missing_leave_no_folder(
    sd15_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = commands.run(["prepare", *words(sd15_folder, tmp_path / "no", tmp_path / "run")])

    assert code == 2
    assert capsys.readouterr().err.count("error[input]: `images_data_url`") == 1
    assert not (tmp_path / "run").exists()


def test_with_result_it_says_at_its_end_how_it_went(
    sd15_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model-url", str(sd15_folder), "--with-result", "--output"]
    whole = commands.run(
        ["prepare", *given, str(tmp_path / "run"), "--images-data-url", str(pictures)]
    )
    missing = commands.run(
        ["prepare", *given, str(tmp_path / "bad"), "--images-data-url", str(tmp_path / "none")]
    )
    capsys.readouterr()

    done = RunFolder(tmp_path / "run").read_result()
    failed = RunFolder(tmp_path / "bad").read_result()
    assert done is not None and failed is not None
    assert (whole, done.status) == (0, "done")
    assert RunFolder(tmp_path / "run").read_events()[-1]["event"] == "stage"
    assert (missing, failed.status) == (2, "failed")
    assert [problem.field for problem in failed.problems] == ["images_data_url"]
