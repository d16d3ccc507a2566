"""The whole chain on a deliberately messy zip: prepared once, looked at, gone on from, trained."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import messy
import numpy as np
import pytest
from grid import encoded, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from tiny import digests
from tiny_vision import tiny_clipseg, tiny_llava

from trainer import base_model
from trainer import cli as commands
from trainer.config_files import parse_yaml
from trainer.data import masking, prepare, prepared, views
from trainer.data.prepared import Index, Prepared
from trainer.images import captioner, pretrained
from trainer.images.segmenters import SegmenterKind
from trainer.job import RunFolder
from trainer.sources import download

SIDE = 192
SAID = "an astronaut in orange stands before two flags."
GENERATED = f"TOK {SAID.removesuffix('.')}"
SAMPLES = Path(__file__).parent / "samples"
# Options that each say what they switch on.
WHOLE_CHAIN = (
    *("--face-aware-cropping", "true", "--clip-seg-mask-prompt", "head"),
    *("--skip-caption-generation", "false"),
)


@dataclass(frozen=True)
class World:
    """What the chain works on.

    Args:
        root: for the test's own folders.
        pictures: the messy zip.
        few: a folder of four small pictures, two of them of a face.
    """

    root: Path
    pictures: Path
    few: Path

    def flags(self, pictures: Path, **options: object) -> list[str]:
        """The whole chain with tiny models, and these options over it."""
        given: dict[str, object] = {
            "images-data-url": pictures,
            "resolution-width": SIDE,
            "resolution-height": SIDE,
            "clipseg-url": self.root / "clipseg",
            "captioner": self.root / "llava",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*WHOLE_CHAIN, *words]

    def prepare(self, pictures: Path, output: Path, **options: object) -> int:
        """Runs `trainer prepare`."""
        flags = self.flags(pictures, **options)
        return commands.run(["prepare", *flags, "--output", str(output)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The messy zip, few pictures, tiny models, and a cache folder of the module's own."""
    root = tmp_path_factory.mktemp("chain")
    tiny_clipseg(root / "clipseg")
    tiny_llava(root / "llava", says=SAID)
    woman = Image.fromarray(photographs.astronaut())
    few = {
        "a.jpg": encoded(woman.crop((100, 0, 400, 240)), "JPEG"),
        "b.png": encoded(woman.crop((0, 0, 320, 320))),
        "c/b.png": encoded(woman.crop((0, 300, 200, 500))),
        "c/mine.webp": encoded(woman.crop((300, 280, 510, 500)), "WEBP"),
        "c/mine.txt": b"TOK beside a space shuttle",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield World(root, messy.messy_zip(root / "messy.zip"), write_folder(root / "few", few))


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    """The folder of pictures that the first call of `trainer prepare` left."""
    run = RunFolder(world.root / "first")
    assert world.prepare(world.pictures, run.root) == 0
    return run.prepared


@pytest.fixture(scope="module")
def first_few(world: World) -> Path:
    """The same of the few pictures."""
    run = RunFolder(world.root / "first few")
    assert world.prepare(world.few, run.root) == 0
    return run.prepared


def idle(*_: object, **__: object) -> NoReturn:
    raise AssertionError("was asked for what is known already")


@pytest.fixture
def nobody_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no picture is decoded, segmented or put into words, and no model loaded.

    Of a damaged file nothing is known but that it is read in vain.
    """
    kind, decode = masking.SEGMENTERS["clipseg"], views.decode
    monkeypatch.setattr(masking, "SEGMENTERS", {"clipseg": SegmenterKind(idle, kind.identity)})
    monkeypatch.setattr(
        views,
        "decode",
        lambda content, name: (decode if name == messy.TRUNCATED else idle)(content, name),
    )
    monkeypatch.setattr(captioner, "load", idle)


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known of earlier trainings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tok-trainer" / "pictures"


def index_of(folder: Path) -> dict[str, Prepared]:
    index = Index.model_validate_json((folder / "prepared.json").read_text())
    return {picture.name: picture for picture in index.pictures}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def weights_at(folder: Path, picture: Prepared, place: tuple[float, float]) -> float:
    """The weight of the pixel at (x, y) of the whole picture."""
    assert picture.mask is not None
    mask = np.load(folder / picture.mask.file)
    scale = picture.view.size[1] / picture.view.picture_size[1]
    return float(mask[int(place[1] * scale), int(place[0] * scale)])


def centre(box: messy.Box) -> tuple[float, float]:
    left, top, width, height = box
    return left + width / 2, top + height / 2


# What is made of a messy zip


def test_every_usable_picture_is_prepared_upright_under_its_own_name(first: Path) -> None:
    pictures = index_of(first)

    assert set(pictures) == set(messy.USABLE)
    for name, picture in pictures.items():
        assert picture.view.picture_size == messy.SIZES[name]
        assert picture.view.target == (SIDE, SIDE)
        with Image.open(first / picture.file) as image:
            assert (image.mode, image.height, image.width) == ("RGB", *picture.view.size)


def test_what_is_trained_holds_the_whole_main_face(first: Path) -> None:
    report = json.loads((first / "report.json").read_text())
    boxes = {picture["name"]: picture["trained_box"] for picture in report["pictures"]}

    with_faces = {name: faces[0] for name, faces in messy.faces().items() if faces}

    assert len(with_faces) == 5
    for name, (left, top, width, height) in with_faces.items():
        x, y, across, down = boxes[name]
        assert x <= left + 1 and left + width <= x + across + 1, name
        assert y <= top + 1 and top + height <= y + down + 1, name


def test_other_peoples_faces_are_left_out_of_the_loss(first: Path) -> None:
    main, *others = messy.faces()[messy.THREE_FACES]
    picture = index_of(first)[messy.THREE_FACES]

    assert weights_at(first, picture, centre(main)) > 0
    assert [weights_at(first, picture, centre(face)) for face in others] == [0, 0]


def test_the_opacity_of_a_cut_out_goes_before_what_a_segmenter_would_find(first: Path) -> None:
    pictures = index_of(first)
    origins = {name: p.mask.origin.kind for name, p in pictures.items() if p.mask is not None}

    assert origins == {
        name: "alpha" if name == messy.CUT_OUT else "segmented" for name in messy.USABLE
    }
    # The ellipse that was cut out, from (120, 20) to (640, 760).
    assert weights_at(first, pictures[messy.CUT_OUT], (380, 390)) == 1
    assert weights_at(first, pictures[messy.CUT_OUT], (60, 60)) == 0


def test_every_picture_gets_a_caption_but_the_one_that_has_its_own(first: Path) -> None:
    captions = {name: (p.caption, p.caption_origin) for name, p in index_of(first).items()}

    own = {messy.SIDEWAYS: (messy.CAPTION, "txt")}
    assert captions == dict.fromkeys(messy.USABLE, (GENERATED, "generated")) | own


def test_a_damaged_file_is_left_out_by_name_and_helper_files_are_passed_over(
    first: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.prepare(world.pictures, tmp_path) == 0

    index = Index.model_validate_json((first / "prepared.json").read_text())
    said = "".join(capsys.readouterr())
    assert [picture.name for picture in index.left_out] == [messy.TRUNCATED]
    assert "cut off or damaged" in index.left_out[0].reason
    assert messy.TRUNCATED in said
    assert "__MACOSX" not in said
    assert ".DS_Store" not in said


def test_contact_sheet_and_report_lie_beside_the_pictures(first: Path) -> None:
    report = json.loads((first / "report.json").read_text())

    with Image.open(first / "contact_sheet_1.jpg") as sheet:
        assert sheet.format == "JPEG"
        sheet.load()
    assert {picture["name"] for picture in report["pictures"]} == set(messy.USABLE)
    assert [picture["name"] for picture in report["left_out"]] == [messy.TRUNCATED]


def test_the_written_captions_can_be_given_back_as_a_captions_file(
    first: Path, world: World, tmp_path: Path, nobody_works: None
) -> None:
    code = world.prepare(world.pictures, tmp_path, captions_file_url=first / "captions.jsonl")

    given = index_of(RunFolder(tmp_path).prepared)
    assert code == 0
    assert {name: p.caption for name, p in given.items()} == {
        name: p.caption for name, p in index_of(first).items()
    }
    assert {p.caption_origin for p in given.values()} == {"file"}


def test_nothing_in_the_users_folder_changes(world: World, first: Path, tmp_path: Path) -> None:
    folder = messy.messy_folder(tmp_path / "photos")
    before = digests(folder)

    assert world.prepare(folder, tmp_path / "run") == 0

    assert digests(folder) == before
    assert digests(RunFolder(tmp_path / "run").prepared) == digests(first)


# Again


def test_the_same_folder_again_is_left_as_it_is(
    world: World, first: Path, nobody_works: None
) -> None:
    before = state(first)

    assert world.prepare(world.pictures, first.parent) == 0

    assert state(first) == before


def test_another_folder_gets_the_same_bytes_without_any_work(
    world: World, first: Path, tmp_path: Path, nobody_works: None
) -> None:
    assert world.prepare(world.pictures, tmp_path) == 0

    assert digests(RunFolder(tmp_path).prepared) == digests(first)


def test_a_training_goes_on_from_what_was_prepared(
    world: World, first: Path, tmp_path: Path, sd15_folder: Path, nobody_works: None
) -> None:
    shutil.copytree(first.parent, tmp_path / "run")
    before = digests(RunFolder(tmp_path / "run").prepared)
    small = {"model_url": sd15_folder, "rank": 2, "max_train_steps": 2}
    flags = world.flags(world.pictures, **small)

    code = commands.run(["train", *flags, "--output", str(tmp_path / "run")])

    result = RunFolder(tmp_path / "run").read_result()
    assert code == 0
    assert result is not None and (result.status, result.step) == ("done", 2)
    assert digests(RunFolder(tmp_path / "run").prepared) == before


def test_a_prepared_folder_is_enough_where_the_store_is_empty(
    world: World, first_few: Path, empty_store: Path, nobody_works: None
) -> None:
    before = state(first_few)

    assert world.prepare(world.few, first_few.parent) == 0

    assert state(first_few) == before


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_no_byte(
    threads: int,
    world: World,
    first_few: Path,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "_MOST_THREADS", threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    assert world.prepare(world.few, tmp_path / "run") == 0

    assert digests(RunFolder(tmp_path / "run").prepared) == digests(first_few)


def test_a_killed_preparation_goes_on_where_it_stood(
    world: World,
    first_few: Path,
    tmp_path: Path,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    write, written = prepared.write_bytes, []

    def killed_at_the_third_picture(path: Path, content: bytes) -> None:
        if path.name == "002.png":
            raise Killed
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepared, "write_bytes", killed_at_the_third_picture)
        world.prepare(world.few, tmp_path / "run")
    assert written
    # All were rendered when the third was to be written.
    monkeypatch.setattr(views, "decode", idle)

    assert world.prepare(world.few, tmp_path / "run") == 0

    assert digests(RunFolder(tmp_path / "run").prepared) == digests(first_few)


def test_a_sheet_that_a_killed_preparation_left_behind_is_made_again(
    world: World, first_few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    assert world.prepare(world.few, tmp_path, skip_caption_generation="true") == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare.overview, "write", killed)
        world.prepare(world.few, tmp_path)

    assert world.prepare(world.few, tmp_path) == 0

    assert digests(RunFolder(tmp_path).prepared) == digests(first_few)


def test_a_cache_folder_that_cannot_be_written_changes_nothing(
    world: World, first_few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert world.prepare(world.few, tmp_path / "run") == 0

    assert digests(RunFolder(tmp_path / "run").prepared) == digests(first_few)


def test_a_damaged_entry_of_the_store_is_made_again(
    world: World, first_few: Path, tmp_path: Path, empty_store: Path
) -> None:
    assert world.prepare(world.few, tmp_path / "one") == 0
    whole = digests(empty_store)
    for number, entry in enumerate(sorted(path for path in empty_store.glob("*/*"))):
        content = entry.read_bytes()
        entry.write_bytes(content[:-1] if number % 2 else b"\xff" + content[1:])

    assert world.prepare(world.few, tmp_path / "two") == 0

    assert digests(RunFolder(tmp_path / "two").prepared) == digests(first_few)
    assert len(whole) > 4
    assert digests(empty_store) == whole


def test_a_caption_of_ones_own_is_never_taken_for_a_written_one(
    world: World, first_few: Path, tmp_path: Path
) -> None:
    shutil.copytree(world.few, tmp_path / "photos")
    shutil.copytree(first_few, tmp_path / "run" / "prepared")
    own = tmp_path / "photos" / "a.txt"
    own.write_text("TOK laughs")
    assert world.prepare(tmp_path / "photos", tmp_path / "run") == 0
    assert index_of(tmp_path / "run" / "prepared")["a.jpg"].caption == "TOK laughs"
    own.unlink()

    assert world.prepare(tmp_path / "photos", tmp_path / "run") == 0

    assert index_of(tmp_path / "run" / "prepared")["a.jpg"].caption == GENERATED


# What cannot be had


@dataclass(frozen=True)
class Refusal:
    """A command that ends in a message.

    Args:
        says: parts of the message, in their order.
    """

    options: dict[str, object]
    says: tuple[str, ...]


REFUSALS = {
    "a folder of CLIPSeg that is not there": Refusal(
        {"clipseg_url": "./no/such/folder"},
        ("error[input]", "`clipseg_url`", "there is no folder `./no/such/folder`", "hint: "),
    ),
    "CLIPSeg on the hub, which is out of reach": Refusal(
        {"clipseg_url": "CIDAS/clipseg-rd64-refined"},
        ("error[input]", "`clipseg_url`", "the hub is out of reach", "hint: give a local folder"),
    ),
    "another model in place of CLIPSeg": Refusal(
        {"clipseg_url": "llava"},
        ("error[input]", "`clipseg_url`", "`llava` model; allowed: `clipseg`"),
    ),
    "CLIPSeg without some of its weights": Refusal(
        {"clipseg_url": "torn"},
        ("error[input]", "`clipseg_url`", "not those of this model", "such as `"),
    ),
    "a named captioner, out of reach": Refusal(
        {"captioner": "blip"},
        ("error[input]", "`captioner`", "the hub is out of reach", "skip_caption_generation"),
    ),
    "another model in place of a captioner": Refusal(
        {"captioner": "clipseg"}, ("error[input]", "`captioner`", "`clipseg` model; allowed: ")
    ),
    "YuNet by name, out of reach": Refusal(
        {"face_detector": "yunet"},
        ("error[input]", "`face_detector`", "could not be downloaded", "face_detector_path"),
    ),
    "a file that is not YuNet's": Refusal(
        {"face_detector_path": "messy.zip"},
        ("error[input]", "`face_detector_path`", "is not YuNet's file", "hint: give "),
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_had_ends_in_the_message_that_helps(
    refusal: Refusal,
    world: World,
    first_few: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.root)
    monkeypatch.setattr(pretrained, "free_bytes", lambda: 10**12)
    shutil.copytree("clipseg", "torn", dirs_exist_ok=True)
    weights = load_file("torn/model.safetensors")
    save_file(dict(list(weights.items())[5:]), "torn/model.safetensors", {"format": "pt"})
    capsys.readouterr()

    code = world.prepare(world.few, tmp_path / "run", **refusal.options)

    said = " ".join(capsys.readouterr().err.split())
    places = [said.find(part) for part in refusal.says]
    assert code == 2, said
    assert -1 not in places and places == sorted(places), said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_restorer_that_is_not_installed_is_told_before_anything_is_fetched_or_read(
    world: World,
    sd15_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nobody_works: None,
) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    monkeypatch.setattr(base_model, "load", idle)
    monkeypatch.setattr(download, "download", idle)
    options = {"model_url": sd15_folder, "face_restore": "gfpgan_1.4"}
    flags = world.flags(Path("https://example.com/photos.zip"), **options)
    flags = ["https://example.com/photos.zip" if "example.com" in word else word for word in flags]

    code = commands.run(["train", *flags, "--output", str(tmp_path / "run")])

    said = capsys.readouterr().err
    assert code == 2
    assert "error[input]: `face_restore`" in said
    assert "pip install 'tok-trainer[restore]'" in said


def test_a_heic_photo_without_its_reader_is_left_out_and_the_extra_named(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    shutil.copytree(world.few, tmp_path / "photos")
    shutil.copy(SAMPLES / "photo.heic", tmp_path / "photos" / "IMG_1.HEIC")

    code = world.prepare(tmp_path / "photos", tmp_path / "run")

    assert code == 0
    assert "IMG_1.HEIC" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "prepared" / "report.json").read_text())
    (left_out,) = [picture for picture in report["left_out"] if picture["name"] == "IMG_1.HEIC"]
    assert "tok-trainer[heic]" in left_out["reason"]
    assert len(index_of(tmp_path / "run" / "prepared")) == 4


def test_where_no_captioner_can_be_had_the_instance_prompt_goes_and_the_run_records_it(
    world: World,
    sd15_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrained, "free_bytes", lambda: 10**12)
    small = {"model_url": sd15_folder, "rank": 2, "max_train_steps": 1, "captioner": "auto"}
    flags = world.flags(world.few, **small, instance_prompt="a portrait of TOK")
    run = RunFolder(tmp_path / "run")

    code = commands.run(["train", *flags, "--output", str(run.root)])

    said = " ".join(capsys.readouterr().err.split())
    captions = {name: p.caption for name, p in index_of(run.prepared).items()}
    yielded = {
        name: [note["message"] for note in notes_in(path) if note["kind"] == "yielded"]
        for name, path in {"run": run.config, "result": run.outputs / "config.yaml"}.items()
    }
    assert code == 0, said
    assert "the captioner cannot be had" in said
    assert captions.pop("c/mine.webp") == "TOK beside a space shuttle"
    assert set(captions.values()) == {"a portrait of TOK"}
    for messages in yielded.values():
        assert any("the captioner cannot be had" in message for message in messages)
    assert not (run.prepared / "captions.jsonl").exists()


def notes_in(path: Path) -> list[dict[str, Any]]:
    """The notes of a written configuration."""
    written = parse_yaml(path.read_text(), path.name)
    notes: list[dict[str, Any]] = written["resolved"]["notes"]
    return notes
