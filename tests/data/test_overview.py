"""The report and the pages to look at, made from what lies in the prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import copies
import numpy as np
import pytest
from grid import encoded, grid_bytes, picture_set, prepared, write_folder
from PIL import Image

from trainer.config import DataConfig, FaceConfig, MaskConfig, Note
from trainer.data import overview, sheet
from trainer.data.prepared import Index, earlier_index

STILL = DataConfig()
SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages are what is looked at here: none is a copy."""
    monkeypatch.setattr(overview, "_write_sheets", copies.WRITE_SHEETS)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three pictures, the last with a mask file, and one that cannot be used."""
    files = {
        "a.png": grid_bytes(80, 160),
        "b.png": grid_bytes(90, 90, blue=60),
        "c.png": grid_bytes(100, 80, blue=120),
        "c_mask.png": encoded(Image.new("L", (80, 100), 64)),
        "broken.jpg": b"text",
        "b.txt": b"TOK on a grid",
    }
    prepared(picture_set(write_folder(tmp_path / "set", files)), tmp_path / "prepared")
    return tmp_path / "prepared"


def rows_of(place: Path) -> dict[str, dict[str, object]]:
    report = json.loads((place / overview.REPORT).read_text())
    return {picture["name"]: picture for picture in report["pictures"]}


def test_the_report_has_each_picture_with_what_was_found_and_decided(place: Path) -> None:
    rows = rows_of(place)

    assert list(rows) == ["a.png", "b.png", "c.png"]
    assert (rows["a.png"]["size"], rows["a.png"]["trained_size"]) == ([80, 160], [64, 64])
    assert (rows["b.png"]["caption"], rows["b.png"]["caption_origin"]) == ("TOK on a grid", "txt")
    assert [rows[name]["mask"] for name in rows] == [None, None, "given"]
    assert rows["a.png"]["mean_weight"] == 1
    assert rows["c.png"]["mean_weight"] == pytest.approx(64 / 255, abs=1e-3)


def test_the_trained_box_is_told_in_pixels_of_the_whole_picture(place: Path) -> None:
    # 80 rows become 64, so that the middle 64 columns of 128 are 80 of 160.
    assert rows_of(place)["a.png"]["trained_box"] == [40, 0, 80, 80]
    # 80 columns become 64, and the middle 64 rows of 80 are 80 of 100.
    assert rows_of(place)["c.png"]["trained_box"] == [0, 10, 80, 80]


def test_the_trained_box_of_a_picture_cut_to_its_face_lies_where_the_face_is(
    tmp_path: Path,
) -> None:
    image = Image.new("RGB", (240, 200), "grey")
    image.paste("red", (150, 60, 200, 110))
    image.paste("blue", (150, 110, 200, 160))
    folder = write_folder(tmp_path / "set", {"a.png": encoded(image)})
    face = FaceConfig(
        face_crop_region=1.2, face_detector_path=str(SAMPLES / "red_square_yunet.onnx")
    )

    prepared(picture_set(folder, face=face), tmp_path / "prepared")

    (row,) = rows_of(tmp_path / "prepared").values()
    left, top, width, height = row["trained_box"]
    (face_found,) = row["faces"]
    assert width == height == pytest.approx(1.2 * face_found["width"], abs=2)
    assert left + width / 2 == pytest.approx(face_found["left"] + face_found["width"] / 2, abs=2)
    assert top + height / 2 == pytest.approx(face_found["top"] + face_found["height"] / 2, abs=2)


def test_what_was_left_out_stands_in_the_report_with_its_reason(place: Path) -> None:
    report = json.loads((place / overview.REPORT).read_text())

    (left_out,) = report["left_out"]
    assert left_out["name"] == "broken.jpg"
    assert "not a picture" in left_out["reason"]


def test_the_sheet_is_a_jpeg_beside_the_pictures(place: Path) -> None:
    (page,) = overview.sheets(place)

    with Image.open(page) as image:
        assert (page.name, image.format) == ("contact_sheet_1.jpg", "JPEG")
    assert overview.is_there(place, STILL)


def test_more_pictures_than_a_page_holds_get_more_pages_and_fewer_take_them_away(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = earlier_index(place)
    monkeypatch.setattr(sheet, "ROWS_PER_PAGE", 1)
    overview.write(index, place, of_class=False, data=STILL)
    # Three pictures, and one that was left out.
    assert [page.name for page in overview.sheets(place)] == [
        f"contact_sheet_{number}.jpg" for number in (1, 2, 3, 4)
    ]
    monkeypatch.undo()

    overview.write(index, place, of_class=False, data=STILL)

    assert [page.name for page in overview.sheets(place)] == ["contact_sheet_1.jpg"]


def test_pages_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"contact_sheet_{number}.jpg" for number in (10, 2, 1)]
    write_folder(tmp_path, {**dict.fromkeys(names, b""), "contact_sheet_x.jpg": b"", "a.jpg": b""})

    found = [page.name for page in overview.sheets(tmp_path)]

    assert found == ["contact_sheet_1.jpg", "contact_sheet_2.jpg", "contact_sheet_10.jpg"]


def test_a_sheet_that_was_deleted_is_made_again(place: Path) -> None:
    before = (place / "contact_sheet_1.jpg").read_bytes()
    (place / "contact_sheet_1.jpg").unlink()

    prepared(picture_set(place.parent / "set"), place)

    assert (place / "contact_sheet_1.jpg").read_bytes() == before


def test_other_weights_make_another_sheet(place: Path) -> None:
    before = (place / "contact_sheet_1.jpg").read_bytes()
    mask = MaskConfig(clip_seg_mask_prompt="head", segmenter="luminance")

    prepared(picture_set(place.parent / "set", mask=mask), place)

    assert (place / "contact_sheet_1.jpg").read_bytes() != before
    assert [row["mask"] for row in rows_of(place).values()] == ["segmented", "segmented", "given"]


def test_of_no_pictures_at_all_there_is_still_a_report() -> None:
    report = overview.report(Index(), of_class=False, data=STILL)

    assert (report["pictures"], report["left_out"]) == ([], [])


# What is drawn anew each time


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"center_crop": False}, ["window drawn anew each time"]),
        # 128 columns are 64 more than the window's, and no row is.
        ({"random_crop_offset_x": 9, "random_crop_offset_y": 5}, ["moved by up to ±9, ±0 pixels"]),
        ({"random_crop_offset_x": 99}, ["moved by up to ±64, ±0 pixels"]),
        ({"random_crop_offset_y": 5}, []),
        ({"center_crop": False, "random_crop_offset_x": 9}, ["window drawn anew each time"]),
        ({"center_crop": False, "face_aware_cropping": True}, []),
        ({"random_rotation_start": -2, "random_rotation_end": 2}, ["turned by -2 to 2 degrees"]),
        ({"random_rotation_start": 1, "random_rotation_end": 1}, ["turned by 1 degree"]),
        ({"random_flip": True}, ["mirrored half of the time"]),
    ],
)
def test_what_changes_from_step_to_step_is_told_of_each_picture(
    place: Path, options: dict[str, object], said: list[str]
) -> None:
    index = earlier_index(place)
    a = index.pictures[0]
    if "face_aware_cropping" in options:
        a = a.model_copy(update={"window": (0, 3)})
    index = index.model_copy(update={"pictures": (a,)})
    data = DataConfig(**options)
    overview.write(index, place, of_class=False, data=STILL)
    drawn_still = (place / "contact_sheet_1.jpg").read_bytes()

    overview.write(index, place, of_class=False, data=data)

    assert rows_of(place)["a.png"]["each_time"] == said
    assert ((place / "contact_sheet_1.jpg").read_bytes() != drawn_still) == bool(said)


def test_report_and_sheet_are_not_there_where_they_tell_of_other_geometry(place: Path) -> None:
    assert overview.is_there(place, STILL)
    assert not overview.is_there(place, DataConfig(random_flip=True))


# Notes


def note(message: str) -> Note:
    return Note(kind="warning", field="captioner", message=message)


def messages_in(place: Path) -> list[str]:
    return [one["message"] for one in json.loads((place / overview.REPORT).read_text())["notes"]]


def test_what_was_said_while_preparing_stands_in_the_report(place: Path) -> None:
    overview.write(
        earlier_index(place), place, of_class=False, data=STILL, notes=[note("is not there")]
    )

    assert "is not there" in messages_in(place)


def test_what_the_report_tells_elsewhere_is_no_note(place: Path) -> None:
    index = earlier_index(place)
    warned = [
        "`broken.jpg` is left out: " + index.left_out[0].reason,
        "only 3 pictures; at least 10, better 20 to 30",
    ]

    notes = [*map(note, warned), note("other")]
    found = overview.report(index, of_class=False, data=STILL, notes=notes)

    assert [one["message"] for one in found["notes"]] == ["other"]
    # Of what a preparation itself says of these pictures, only the captions have no such place.
    assert [message.split(" and ")[0] for message in messages_in(place)] == [
        "3 of 4 pictures have no caption of their own"
    ]


def test_notes_stay_as_long_as_the_pictures_are_the_same(place: Path) -> None:
    index = earlier_index(place)
    (place / overview.REPORT).unlink()
    overview.write(index, place, of_class=False, data=STILL, notes=[note("once")])
    (place / "contact_sheet_1.jpg").unlink()

    overview.write(index, place, of_class=False, data=STILL, notes=[note("again")])
    assert messages_in(place) == ["once", "again"]
    fewer = index.model_copy(update={"left_out": ()})
    overview.write(fewer, place, of_class=False, data=STILL)

    assert messages_in(place) == []


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", None])
def test_a_damaged_report_is_not_there(place: Path, damage: bytes | None) -> None:
    (place / overview.REPORT).unlink()
    if damage is not None:
        (place / overview.REPORT).write_bytes(damage)

    assert not overview.is_there(place, STILL)
    overview.write(earlier_index(place), place, of_class=False, data=STILL)
    assert overview.is_there(place, STILL)


def test_pictures_of_a_class_get_no_advice_and_keep_their_notes(place: Path) -> None:
    index = earlier_index(place)
    notes = [note("`b.png` is the same file as `a.png`")]

    found = overview.report(index, of_class=True, data=STILL, notes=notes)

    assert found["advice"] == {"level": "ok", "lines": []}
    assert len(found["notes"]) == 1


def test_masks_are_held_no_larger_than_the_sheet_shows_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[sheet.Row] = []
    monkeypatch.setattr(sheet, "pages", lambda rows, count, **_: shown.extend(rows) or ())
    np.save(place / "002.mask.npy", np.ones((1024, 1024), np.float32))

    overview.write(earlier_index(place), place, of_class=False, data=STILL)

    weights = shown[2].weights
    assert weights is not None
    assert weights.shape == (shown[2].crop.height, shown[2].crop.width)
