"""What is said of pictures before anything is done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from grid import encoded, grid_bytes, picture_set, prepared, write_folder
from PIL import Image

from trainer.config import FaceConfig
from trainer.data.report import inspect

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A wide picture of what the tests' detector takes for a face."""
    image = Image.new("RGB", (480, 200), "grey")
    image.paste("red", (150, 60, 200, 110))
    image.paste("blue", (150, 110, 200, 160))
    return write_folder(tmp_path / "set", {"a.png": encoded(image)})


def test_pictures_that_are_cut_to_a_face_get_the_size_of_a_square(
    wide: Path, tmp_path: Path
) -> None:
    face = FaceConfig(
        face_crop_region=1.4, face_detector_path=str(SAMPLES / "red_square_yunet.onnx")
    )
    wanted = picture_set(wide, width=96, height=96, enable_bucket=True, face=face)

    report = inspect(wanted)
    _, (example,) = prepared(wanted, tmp_path / "prepared")

    assert report.pictures[0].target == example.target == (96, 96)
    assert report.pictures[0].size == (200, 480)


def test_that_faces_are_not_looked_for_is_said_once_and_only_where_they_decide(
    wide: Path,
) -> None:
    write_folder(wide, {"b.png": grid_bytes(100, 200)})

    cut = inspect(picture_set(wide, face=FaceConfig(face_crop_region=1.4)))
    whole = inspect(picture_set(wide))

    assert [note.field for note in cut.notes].count("face_crop_region") == 1
    # How large a cut will be is not known, nor how much of it a window keeps.
    assert not any("window keeps" in picture.problem for picture in cut.pictures)
    assert "face_crop_region" not in [note.field for note in whole.notes]


def test_what_the_advice_says_is_no_note_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.png": grid_bytes(), "b.png": grid_bytes()})

    report = inspect(picture_set(folder))

    act = [line.topic for line in report.advice[0].lines if line.level == "act"]
    assert {"count", "copies"} <= set(act)
    assert not any("only 2" in note.message or "same file" in note.message for note in report.notes)


def test_pictures_of_a_class_get_no_advice_but_a_word_on_copies(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.png": grid_bytes(), "b.png": grid_bytes()})

    report = inspect(picture_set(folder, of_class=True))

    assert report.advice == ()
    (note,) = (note for note in report.notes if "same file" in note.message)
    assert note.field == "class_images_url"
