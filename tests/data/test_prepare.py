"""From whatever the user has to `prepared/`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from grid import (
    encoded,
    grid_bytes,
    grid_image,
    picture_set,
    prepared,
    write_folder,
    zip_bytes,
)
from PIL import Image

from trainer.data.prepared import Example
from trainer.data.report import inspect
from trainer.errors import DiskError, InputError
from trainer.events import Event, NoteEvent, StageEvent


def run(location: Path, folder: Path, **options: object) -> tuple[list[Event], tuple[Example, ...]]:
    return prepared(picture_set(location, **options), folder)


def messages(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, NoteEvent)]


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """What a real archive may hold: nested folders, helpers, a sideways and a damaged picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "b/1.png": encoded(photograph(80, 120, 1)),
        "a/1.jpg": encoded(photograph(80, 120, 2), "JPEG", exif=exif),
        "a/1.txt": b"a caption",
        "cut.jpg": encoded(photograph(200, 200, 3), "JPEG")[:1000],
        "clear.png": encoded(Image.new("RGBA", (70, 70), (255, 0, 0, 128))),
        "__MACOSX/._1.jpg": b"junk",
        "clip.mp4": b"film",
        "captions.jsonl": b"{}",
    }
    path = tmp_path / "set.zip"
    path.write_bytes(zip_bytes(files))
    return path


def test_a_messy_archive_gives_exactly_its_usable_pictures_upright(
    messy: Path, tmp_path: Path
) -> None:
    events, examples = run(messy, tmp_path / "prepared")

    assert [(e.number, e.name, e.original_size, e.size) for e in examples] == [
        (0, "a/1.jpg", (120, 80), (96, 64)),
        (1, "b/1.png", (80, 120), (64, 96)),
        (2, "clear.png", (70, 70), (64, 64)),
    ]
    assert [(e.caption, e.caption_origin) for e in examples] == [
        ("a caption", "txt"),
        ("A photograph of a TOK", "instance_prompt"),
        ("A photograph of a TOK", "instance_prompt"),
    ]
    for example in examples:
        with Image.open(example.path) as image:
            assert (image.mode, image.height, image.width) == ("RGB", *example.size)
    said = " | ".join(messages(events))
    for name in ("`cut.jpg` is left out", "`clip.mp4`", "`captions.jsonl`", "only 3 pictures"):
        assert name in said
    assert "_MACOSX" not in said


def test_progress_counts_every_candidate(messy: Path, tmp_path: Path) -> None:
    events, _ = run(messy, tmp_path / "prepared")

    stages = [event for event in events if isinstance(event, StageEvent)]

    assert [(s.stage, s.done, s.total) for s in stages] == [("prepare", n, 4) for n in (1, 2, 3, 4)]


def test_a_single_sideways_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photograph(80, 64)
    stored = upright.rotate(90, expand=True)
    folder = write_folder(tmp_path / "set", {"a.png": encoded(stored, exif=exif)})

    _, (example,) = run(folder, tmp_path / "prepared")

    with Image.open(example.path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize(("width", "height"), [(128, 64), (64, 128), (96, 96)])
def test_resolution_width_and_height_decide_the_prepared_size(
    tmp_path: Path, width: int, height: int
) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": encoded(photograph(150, 200))})

    _, (example,) = run(folder, tmp_path / "prepared", width=width, height=height)

    # 150 x 200 is as wide as 4 / 3 of its height: by hand for each target.
    assert (
        example.size
        == {(128, 64): (96, 128), (64, 128): (128, 171), (96, 96): (96, 128)}[width, height]
    )


def test_a_picture_that_has_the_size_already_keeps_its_pixels(tmp_path: Path) -> None:
    picture = photograph(64, 100)
    folder = write_folder(tmp_path / "set", {"a.png": encoded(picture)})

    _, (example,) = run(folder, tmp_path / "prepared")

    with Image.open(example.path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


def test_the_index_says_what_each_file_is_and_is_the_same_each_time(
    messy: Path, tmp_path: Path
) -> None:
    run(messy, tmp_path / "one")
    run(messy, tmp_path / "two")

    contents = [(tmp_path / name / "prepared.json").read_bytes() for name in ("one", "two")]
    first = json.loads(contents[0])["pictures"][0]

    assert contents[0] == contents[1]
    assert (first["name"], first["file"], first["caption"]) == ("a/1.jpg", "000.png", "a caption")
    assert first["view"]["picture_size"] == [120, 80]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_a_second_call_writes_nothing_and_says_the_same(messy: Path, tmp_path: Path) -> None:
    first = run(messy, tmp_path / "prepared")
    before = state(tmp_path / "prepared")

    second = run(messy, tmp_path / "prepared")

    assert second == first
    assert state(tmp_path / "prepared") == before


def test_only_what_changed_is_prepared_again(tmp_path: Path) -> None:
    files = {f"{n}.png": encoded(photograph(80, 80, n)) for n in range(3)}
    folder = write_folder(tmp_path / "set", files)
    run(folder, tmp_path / "prepared")
    before = state(tmp_path / "prepared")
    (folder / "1.png").write_bytes(encoded(photograph(80, 80, 9)))
    (tmp_path / "prepared" / "002.png").write_bytes(b"damaged")

    _, examples = run(folder, tmp_path / "prepared")

    after = state(tmp_path / "prepared")
    changed = {name for name in after if after[name] != before[name]}
    looked_at = {"001.source.jpg", "002.source.jpg", "contact_sheet_1.jpg", "report.json"}
    assert changed == {"001.png", "002.png", "prepared.json"} | looked_at
    Image.open(examples[2].path).load()


def test_another_size_prepares_everything_again(messy: Path, tmp_path: Path) -> None:
    run(messy, tmp_path / "prepared")

    _, examples = run(messy, tmp_path / "prepared", width=96, height=96)

    assert [min(example.size) for example in examples] == [96, 96, 96]


def test_files_of_pictures_that_are_gone_are_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {f"{n}.png": grid_bytes(blue=n) for n in range(3)})
    run(folder, tmp_path / "prepared")
    (tmp_path / "prepared" / "mine.png").write_bytes(b"x")
    (folder / "1.png").unlink()

    run(folder, tmp_path / "prepared")

    names = {path.name for path in (tmp_path / "prepared").iterdir()}
    looked_at = {"000.source.jpg", "001.source.jpg", "contact_sheet_1.jpg", "report.json"}
    assert names == {"000.png", "001.png", "prepared.json", "mine.png"} | looked_at


def test_an_index_that_cannot_be_read_is_made_again(messy: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "prepared", {"prepared.json": '{"pictures": "nonsense"}'})

    _, examples = run(messy, tmp_path / "prepared")

    assert len(examples) == 3


def test_the_users_folder_stays_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": grid_bytes(), "bad.jpg": b"bad"})
    before = {path: path.read_bytes() for path in folder.iterdir()}

    run(folder, tmp_path / "prepared")

    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_small_picture_and_a_copy_deserve_a_warning(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "set", {"a.png": grid_bytes(30, 40), "b.png": grid_bytes(30, 40)}
    )

    events, _ = run(folder, tmp_path / "prepared", width=96, height=96)

    said = " | ".join(messages(events))
    assert "`a.png` (40x30) is enlarged 3.2 times" in said
    assert "`b.png` is the same file as `a.png`" in said


@pytest.mark.parametrize(("count", "warned"), [(9, 1), (10, 0)])
def test_fewer_than_ten_pictures_deserve_one_warning(
    tmp_path: Path, count: int, warned: int
) -> None:
    files = {f"{n}.png": grid_bytes(blue=n) for n in range(count)}
    folder = write_folder(tmp_path / "set", files)

    events, _ = run(folder, tmp_path / "prepared")

    assert sum("at least 10" in message for message in messages(events)) == warned


def test_no_usable_picture_at_all_is_refused_with_the_reasons(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.jpg": "text", "b.png": b""})

    with pytest.raises(InputError, match="no picture can be used") as error:
        run(folder, tmp_path / "prepared")

    assert "`a.jpg`: it is not a picture" in str(error.value)
    assert "`b.png`: the file is empty" in str(error.value)


def test_a_source_without_pictures_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.txt": "text"})

    with pytest.raises(InputError, match="holds 1 files but no picture"):
        run(folder, tmp_path / "prepared")

    assert not (tmp_path / "prepared").exists()


def test_captions_are_checked_before_any_picture_is_decoded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": grid_bytes()})
    (tmp_path / "captions.jsonl").write_text("nonsense")

    with pytest.raises(InputError, match="not valid JSON"):
        run(folder, tmp_path / "prepared", captions_file_url=str(tmp_path / "captions.jsonl"))

    assert not (tmp_path / "prepared").exists()


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": grid_bytes()})
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DiskError):
        run(folder, tmp_path / "file" / "prepared")


def test_inspect_tells_what_prepare_would_find_without_writing(messy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    report = inspect(picture_set(messy))

    assert sorted(tmp_path.rglob("*")) == before
    assert report.num_usable == 3
    assert {p.name: p.size for p in report.pictures} == {
        "a/1.jpg": (120, 80),
        "b/1.png": (80, 120),
        "clear.png": (70, 70),
        "cut.jpg": None,
    }
    assert "cut off or damaged" in report.pictures[3].problem
    assert [line.found for line in report.advice[0].lines if line.level == "act"][0] == (
        "only 3 pictures"
    )
    assert not any("at least 10" in note.message for note in report.notes)
    assert json.loads(json.dumps(report.as_dict()))["num_usable"] == 3


def test_inspect_refuses_what_prepare_refuses(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.jpg": "text"})

    with pytest.raises(InputError, match="no picture can be used"):
        inspect(picture_set(folder))


def test_resizing_a_grid_keeps_its_directions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": encoded(grid_image(128, 256))})

    _, (example,) = run(folder, tmp_path / "prepared")

    with Image.open(example.path) as image:
        red, green, _ = image.getpixel((100, 10))
    # Halved: column 100 shows columns 200 and 201, row 10 rows 20 and 21.
    assert abs(red - 200.5) <= 1
    assert abs(green - 20.5) <= 1
