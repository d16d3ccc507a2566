"""Masks from the user's source, or from a segmenter, to `prepared/`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from grid import encoded, grid_bytes, grid_image, picture_set, prepared, write_folder
from PIL import Image

from trainer.config import DataConfig, MaskConfig
from trainer.data import masking, views
from trainer.data.prepared import Example
from trainer.data.report import inspect
from trainer.errors import InputError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.images.masks import Segmenter
from trainer.images.segmenters import SegmenterKind, luminance
from trainer.sections.subjects import ClassSource, class_data_of

LUMINANCE = MaskConfig(clip_seg_mask_prompt="head", segmenter="luminance", clip_seg_mask_bias=0.0)


def run(
    source: Path,
    folder: Path,
    mask: MaskConfig,
    *,
    of_class: bool = False,
    side: int = 64,
    **options: object,
) -> tuple[list[Event], tuple[Example, ...]]:
    size = {"width": side, "height": side}
    return prepared(picture_set(source, mask=mask, of_class=of_class, **size, **options), folder)


def mask_in(example: Example) -> np.ndarray:
    assert example.mask_path is not None
    return np.load(example.mask_path)


def ramp(height: int, width: int, low: int = 0, high: int = 255) -> Image.Image:
    """Grey values that grow from left to right."""
    row = np.linspace(low, high, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, (height, width)).copy())


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "set", {f"{n}.png": grid_bytes(80, 100, blue=50 * n) for n in range(3)}
    )


def test_without_a_prompt_or_given_masks_the_whole_picture_counts(
    grids: Path, tmp_path: Path
) -> None:
    _, examples = run(grids, tmp_path / "prepared", MaskConfig())

    assert [example.mask_path for example in examples] == [None] * 3
    assert not list((tmp_path / "prepared").glob("*mask*"))


def test_the_segmenter_sees_the_whole_upright_picture_and_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def segment(image: Image.Image, prompt: str) -> np.ndarray:
        asked.append((image.mode, image.size, prompt))
        return np.zeros((5, 7), np.float32)

    kind = SegmenterKind(lambda _: segment, lambda _: "")
    monkeypatch.setattr(masking, "SEGMENTERS", {"clipseg": kind})
    exif = Image.Exif()
    exif[0x0112] = 6
    write_folder(tmp_path / "set", {"a.png": encoded(grid_image(80, 120), exif=exif)})

    run(tmp_path / "set", tmp_path / "prepared", MaskConfig(clip_seg_mask_prompt="a blue hat"))

    # At the trained scale: 64 pixels wide.
    assert asked == [("RGB", (64, 96), "a blue hat")]


def test_a_segmenter_is_made_ready_once_and_only_when_a_mask_is_needed(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(_: MaskConfig) -> Segmenter:
        made.append(1)
        return luminance

    kind = SegmenterKind(make, lambda _: "")
    monkeypatch.setattr(masking, "SEGMENTERS", {"luminance": kind})

    run(grids, tmp_path / "prepared", MaskConfig(segmenter="luminance"))
    assert len(made) == 0
    run(grids, tmp_path / "prepared", LUMINANCE)
    assert len(made) == 1
    run(grids, tmp_path / "prepared", LUMINANCE)
    assert len(made) == 1


def test_the_mask_lies_beside_its_picture_with_a_view_to_look_at(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"a.png": encoded(ramp(64, 128).convert("RGB"))})

    _, (example,) = run(tmp_path / "set", tmp_path / "prepared", LUMINANCE)

    mask = mask_in(example)
    assert example.mask_path == tmp_path / "prepared" / "000.mask.npy"
    assert mask.dtype == np.float32
    assert mask.shape == example.size
    # The ramp ends in white, so dividing by the largest luminance changes nothing.
    with Image.open(example.path) as image:
        np.testing.assert_allclose(mask, np.asarray(image)[..., 0] / 255, atol=1e-5)
    with Image.open(tmp_path / "prepared" / "000.mask.png") as view:
        assert view.mode == "L"
        np.testing.assert_array_equal(np.asarray(view), np.rint(mask * 255))


def test_the_whole_picture_counting_writes_no_mask(grids: Path, tmp_path: Path) -> None:
    mask = LUMINANCE.model_copy(update={"clip_seg_mask_bias": 1.0})

    _, examples = run(grids, tmp_path / "prepared", mask)

    assert [example.mask_path for example in examples] == [None] * 3
    before = state(tmp_path / "prepared")
    run(grids, tmp_path / "prepared", mask)
    assert state(tmp_path / "prepared") == before


def test_a_given_mask_goes_before_the_segmenter_and_gets_no_bias(tmp_path: Path) -> None:
    given = np.zeros((80, 100), np.uint8)
    given[:, 50:] = 200
    write_folder(
        tmp_path / "set",
        {
            "a.png": grid_bytes(80, 100),
            "b.png": grid_bytes(80, 100, blue=255),
            "masks/a.png": encoded(Image.fromarray(given)),
        },
    )
    mask = LUMINANCE.model_copy(update={"clip_seg_mask_bias": 0.5})

    _, (first, second) = run(tmp_path / "set", tmp_path / "prepared", mask, side=80)

    np.testing.assert_allclose(mask_in(first), given / 255, atol=1e-6)
    assert mask_in(second).min() > 0.4


def test_use_given_masks_off_leaves_the_whole_picture_but_trains_no_mask(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set", {"a.png": grid_bytes(80, 100), "a_mask.png": encoded(ramp(80, 100))}
    )
    given = MaskConfig(use_given_masks=True)
    ignored = MaskConfig(use_given_masks=False)

    _, (with_mask,) = run(tmp_path / "set", tmp_path / "one", given)
    _, (without,) = run(tmp_path / "set", tmp_path / "two", ignored)

    assert with_mask.mask_path is not None
    assert without.mask_path is None


def test_the_alpha_channel_is_a_mask(tmp_path: Path) -> None:
    pixels = np.dstack([np.asarray(grid_image(80, 80)), np.asarray(ramp(80, 80, 10))])
    write_folder(tmp_path / "set", {"a.png": encoded(Image.fromarray(pixels))})

    _, (example,) = run(tmp_path / "set", tmp_path / "prepared", LUMINANCE, side=80)

    np.testing.assert_allclose(mask_in(example), pixels[..., 3] / 255, atol=1e-6)


def test_every_mask_that_cannot_be_used_is_named_with_both_sizes(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set",
        {
            "a.png": grid_bytes(80, 100),
            "b.png": grid_bytes(80, 100),
            "c.png": grid_bytes(80, 100),
            "d.png": grid_bytes(80, 100),
            "a_mask.png": encoded(ramp(80, 80)),
            "masks/b.png": encoded(Image.new("L", (100, 80), 0)),
            "masks/c.png": b"nothing",
            "masks/d.png": encoded(ramp(40, 50)),
        },
    )
    with pytest.raises(InputError) as preparing:
        run(tmp_path / "set", tmp_path / "prepared", MaskConfig())
    with pytest.raises(InputError) as inspecting:
        inspect(picture_set(tmp_path / "set"))

    for error in (preparing, inspecting):
        problems = error.value.problems
        assert [problem.field for problem in problems] == ["images_data_url"] * 3
        assert "the mask `a_mask.png` is 80x80, its picture 100x80 upright" in problems[0].message
        assert "the mask `masks/b.png` is all black" in problems[1].message
        assert "the mask `masks/c.png` cannot be used" in problems[2].message
    unmasked = picture_set(tmp_path / "set", mask=MaskConfig(use_given_masks=False))
    assert inspect(unmasked).num_usable == 4


def test_another_temperature_makes_the_masks_again_and_leaves_the_pictures(
    grids: Path, tmp_path: Path
) -> None:
    _, before = run(grids, tmp_path / "prepared", LUMINANCE)
    files = state(tmp_path / "prepared")

    flatter = LUMINANCE.model_copy(update={"clip_seg_mask_temperature": 4.0})
    _, after = run(grids, tmp_path / "prepared", flatter)

    changed = {name for name, stat in state(tmp_path / "prepared").items() if stat != files[name]}
    kinds = ("npy", "png")
    masks = {f"{n:03d}.mask.{k}" for n in range(3) for k in kinds}
    assert changed == masks | {"prepared.json", "contact_sheet_1.jpg", "report.json"}
    assert [a.sha256 for a in after] == [b.sha256 for b in before]
    assert all(a.mask_sha256 != b.mask_sha256 for a, b in zip(after, before, strict=True))


def test_a_second_call_with_masks_decodes_and_writes_nothing_and_says_the_same(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (grids / "1_mask.png").write_bytes(encoded(ramp(80, 100)))
    first = run(grids, tmp_path / "prepared", LUMINANCE)
    before = state(tmp_path / "prepared")

    def refuse(_: bytes, __: str) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(views, "decode", refuse)
    second = run(grids, tmp_path / "prepared", LUMINANCE)

    assert second == first
    assert state(tmp_path / "prepared") == before


def test_only_the_mask_that_was_painted_anew_is_made_again(grids: Path, tmp_path: Path) -> None:
    for number in range(2):
        (grids / f"{number}_mask.png").write_bytes(encoded(ramp(80, 100)))
    run(grids, tmp_path / "prepared", MaskConfig())
    before = state(tmp_path / "prepared")

    (grids / "1_mask.png").write_bytes(encoded(ramp(80, 100, 50)))
    run(grids, tmp_path / "prepared", MaskConfig())

    after = state(tmp_path / "prepared")
    changed = {name for name in after if after[name] != before[name]}
    looked_at = {"contact_sheet_1.jpg", "report.json"}
    assert changed == {"001.mask.npy", "001.mask.png", "prepared.json"} | looked_at


def test_a_damaged_mask_file_is_made_again(grids: Path, tmp_path: Path) -> None:
    _, examples = run(grids, tmp_path / "prepared", LUMINANCE)
    wanted = mask_in(examples[1])
    (tmp_path / "prepared" / "001.mask.npy").write_bytes(b"damaged")

    _, again = run(grids, tmp_path / "prepared", LUMINANCE)

    np.testing.assert_array_equal(mask_in(again[1]), wanted)


def test_masks_that_are_wanted_no_more_are_removed(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path / "prepared", LUMINANCE)

    _, examples = run(grids, tmp_path / "prepared", MaskConfig())

    assert [example.mask_path for example in examples] == [None] * 3
    assert not list((tmp_path / "prepared").glob("*mask*"))


def test_the_index_says_what_each_mask_is_made_of(grids: Path, tmp_path: Path) -> None:
    run(grids, tmp_path / "prepared", LUMINANCE)

    mask = json.loads((tmp_path / "prepared" / "prepared.json").read_text())["pictures"][0]["mask"]

    assert mask["file"] == "000.mask.npy"
    assert mask["origin"]["kind"] == "segmented"
    assert (mask["origin"]["prompt"], mask["origin"]["temperature"]) == ("head", 1.0)


def test_a_picture_in_which_the_subject_is_not_found_deserves_a_warning(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set",
        {"black.png": encoded(Image.new("RGB", (80, 80), 3)), "grid.png": grid_bytes(80, 80, 255)},
    )

    events, examples = run(tmp_path / "set", tmp_path / "prepared", LUMINANCE)

    said = [e.message for e in events if isinstance(e, NoteEvent) and "`head`" in e.message]
    assert said == ["`black.png` shows nothing like `head`: the whole picture is learned"]
    assert [example.mask_path is None for example in examples] == [True, False]


@pytest.mark.parametrize(
    ("style", "expected"), [("none", None), ("normal", 0.25), ("invert", 0.75)]
)
def test_class_image_mask_style_decides_on_the_masks_of_class_pictures_only(
    tmp_path: Path, style: str, expected: float | None
) -> None:
    # A quarter everywhere, but for a white dot.
    given = np.full((80, 80), 64, np.uint8)
    given[0, 0] = 255
    write_folder(
        tmp_path / "set",
        {"a.png": grid_bytes(80, 80), "a_mask.png": encoded(Image.fromarray(given))},
    )
    mask = MaskConfig(class_image_mask_style=style)

    _, (of_class,) = run(tmp_path / "set", tmp_path / "class", mask, side=80, of_class=True)
    _, (instance,) = run(tmp_path / "set", tmp_path / "instance", mask, side=80)

    assert mask_in(instance)[40, 40] == pytest.approx(0.25, abs=0.002)
    if expected is None:
        assert of_class.mask_path is None
    else:
        assert mask_in(of_class)[40, 40] == pytest.approx(expected, abs=0.002)


def test_an_inverted_class_mask_of_a_segmenter_keeps_what_the_prompt_does_not_mean(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "set", {"a.png": encoded(ramp(64, 64).convert("RGB"))})
    mask = LUMINANCE.model_copy(update={"class_image_mask_style": "invert"})

    _, (example,) = run(tmp_path / "set", tmp_path / "prepared", mask, of_class=True)

    with Image.open(example.path) as image:
        np.testing.assert_allclose(mask_in(example), 1 - np.asarray(image)[..., 0] / 255, atol=1e-5)


def test_class_pictures_say_so_and_are_told_of_under_their_own_options(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set",
        {"a.png": grid_bytes(), "b.png": grid_bytes(), "c.jpg": "text", "captions.jsonl": "{}"},
    )

    events, examples = run(
        tmp_path / "set",
        tmp_path / "prepared",
        MaskConfig(),
        of_class=True,
        instance_prompt="a photo of a man",
    )

    notes = [event for event in events if isinstance(event, NoteEvent)]
    assert [example.is_class for example in examples] == [True, True]
    assert {example.caption for example in examples} == {"a photo of a man"}
    assert {event.stage for event in events if isinstance(event, StageEvent)} == {
        "prepare class images"
    }
    assert {note.field for note in notes} == {"class_images_url"}
    assert not any("recommended" in note.message for note in notes)


def test_class_pictures_take_the_class_prompt_whether_captions_are_to_be_made_or_not(
    tmp_path: Path,
) -> None:
    source = str(write_folder(tmp_path / "set", {"a.png": grid_bytes()}))
    data = DataConfig(skip_caption_generation=False, captions_file_url="captions.jsonl")
    of_class = class_data_of(ClassSource("a man", source, 0), source, data)

    wanted = replace(picture_set(source, of_class=True), data=of_class)
    report = inspect(wanted)

    assert [picture.caption for picture in report.pictures] == ["a man"]


def test_class_pictures_that_cannot_be_used_are_put_down_to_their_own_option(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError) as missing:
        run(tmp_path / "nowhere", tmp_path / "prepared", MaskConfig(), of_class=True)
    write_folder(tmp_path / "set", {"a.jpg": "text"})
    with pytest.raises(InputError) as unusable:
        run(tmp_path / "set", tmp_path / "prepared", MaskConfig(), of_class=True)

    for error in (missing, unusable):
        assert [problem.field for problem in error.value.problems] == ["class_images_url"]
