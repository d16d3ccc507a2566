"""Class pictures: made by the base model, kept by all that decides them, shared by processes."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer import base_model, class_images
from trainer.base_model import Precision
from trainer.class_images import ClassImages
from trainer.config import ModelConfig
from trainer.errors import DiskError
from trainer.events import StageEvent
from trainer.families.base import Family
from trainer.sampling import Sampler, sample

FULL = Precision(*[torch.float32] * 4)
# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLER = Sampler(width=64, height=64, steps=2, guidance_scale=3.0)
WANTED = ClassImages(
    prompt="a photo of a man", count=3, sampler=SAMPLER, seed=0, base_contents="some model"
)


def load(folder: Path) -> Family:
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)


@pytest.fixture(scope="module")
def family(sd15_folder: Path) -> Family:
    return load(sd15_folder)


def make(
    family: Family,
    wanted: ClassImages,
    cache: Path,
    destination: Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
) -> list[tuple[int, int]]:
    """Makes the pictures and returns the progress as it was told."""
    making = class_images.class_images(
        family,
        wanted,
        cache,
        destination,
        process_index=process_index,
        num_processes=num_processes,
        device=torch.device("cpu"),
    )
    told = []
    for event in making:
        assert isinstance(event, StageEvent)
        assert event.stage == "class images"
        told.append((event.done, event.total))
    return told


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cached_file(cache: Path, name: str) -> Path:
    (path,) = cache.rglob(name)
    return path


@pytest.fixture(scope="module")
def finished(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the three wanted pictures."""
    cache = tmp_path_factory.mktemp("finished")
    make(family, WANTED, cache, cache / "run")
    shutil.rmtree(cache / "run")
    return cache


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def test_every_picture_is_made_and_counted(family: Family, tmp_path: Path) -> None:
    told = make(family, WANTED, tmp_path / "cache", tmp_path / "run")
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(contents(tmp_path / "run")) == ["000.png", "001.png", "002.png"]
    assert contents(tmp_path / "run") == contents(tmp_path / "cache")
    assert len(set(contents(tmp_path / "run").values())) == 3


def test_a_picture_is_a_plain_sample_of_its_number(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    make(family, WANTED, cache, tmp_path / "run")
    expected = sample(
        family, WANTED.prompt, SAMPLER, seed=WANTED.seed, purpose="class image", number=2
    )
    with Image.open(tmp_path / "run" / "002.png") as image:
        assert image.tobytes() == expected.tobytes()
        # No times: nothing beside the pixels but the key of what decided them.
        assert image.info == {"key": WANTED.key(family)}


def test_both_families_make_them(sdxl_folder: Path, tmp_path: Path) -> None:
    wanted = replace(WANTED, count=1)
    told = make(load(sdxl_folder), wanted, tmp_path / "cache", tmp_path / "run")
    assert told == [(0, 1), (1, 1)]


def test_what_is_in_the_cache_is_not_made_again(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    files = {path: path.stat() for path in cache.rglob("*.png")}
    assert make(family, WANTED, cache, tmp_path / "run") == [(3, 3)]
    for path, before in files.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_more_pictures_leave_the_first_as_they_are(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    files = {path: path.stat() for path in cache.rglob("*.png")}
    assert make(family, replace(WANTED, count=5), cache, tmp_path / "run") == [
        (3, 5),
        (4, 5),
        (5, 5),
    ]
    assert len(contents(tmp_path / "run")) == 5
    for path, before in files.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_gets_no_more_pictures_than_it_wants(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    make(family, WANTED, cache, tmp_path / "run")
    make(family, replace(WANTED, count=1), cache, tmp_path / "run")
    assert list(contents(tmp_path / "run")) == ["000.png"]
    assert len(list(cache.rglob("*.png"))) == 3


def test_a_run_folder_with_other_pictures_gets_the_wanted_ones(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "001.png").write_bytes(b"another picture")
    make(family, WANTED, cache, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(cache)


def test_a_run_that_goes_on_without_the_cache_keeps_its_pictures(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    make(family, WANTED, cache, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    told = make(family, WANTED, tmp_path / "another cache", tmp_path / "run")
    assert told == [(3, 3)]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_pictures_of_another_prompt_in_the_run_folder_are_replaced(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    other = replace(WANTED, prompt="a photo of a baby")
    make(family, other, cache, tmp_path / "run")
    make(family, WANTED, cache, tmp_path / "run")
    ours = cache / "class_images" / WANTED.key(family)
    assert contents(tmp_path / "run") == contents(ours)


def test_a_file_that_another_process_is_writing_is_left_alone(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / "run" / ".tmp-001.png"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half a picture")
    make(family, WANTED, cache, tmp_path / "run", process_index=0, num_processes=2)
    assert unfinished.read_bytes() == b"half a picture"


def test_a_copy_in_the_run_folder_is_not_the_file_in_the_cache(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    make(family, WANTED, cache, tmp_path / "run")
    assert not os.path.samefile(tmp_path / "run" / "000.png", cached_file(cache, "000.png"))


def test_processes_together_make_what_one_makes(
    family: Family, finished: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    second = make(family, WANTED, cache, run, process_index=1, num_processes=2)
    assert list(contents(run)) == ["001.png"]
    first = make(family, WANTED, cache, run, process_index=0, num_processes=2)
    assert second == [(0, 3), (1, 3)]
    assert first == [(1, 3), (2, 3), (3, 3)]
    assert contents(run) == contents(cache) == contents(finished)


def test_a_process_without_pictures_of_its_own_makes_none(family: Family, tmp_path: Path) -> None:
    wanted = replace(WANTED, count=1)
    told = make(
        family, wanted, tmp_path / "cache", tmp_path / "run", process_index=1, num_processes=2
    )
    assert told == [(0, 1)]
    assert not (tmp_path / "cache").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resize(path: Path) -> None:
    with Image.open(path) as image:
        image.resize((32, 32)).save(path)


def write_something_else(path: Path) -> None:
    path.write_text("no picture")


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, resize, write_something_else])
def test_a_damaged_picture_is_made_again(
    family: Family, cache: Path, finished: Path, tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    damage(cached_file(cache, "001.png"))
    assert make(family, WANTED, cache, tmp_path / "run") == [(2, 3), (3, 3)]
    assert contents(cache) == contents(finished)


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    facts = PngInfo()
    facts.add_text("key", "a key")
    Image.effect_noise((8, 8), 50).convert("RGB").save(path, pnginfo=facts)
    content = path.read_bytes()
    assert class_images._is_intact(path, (8, 8), "a key")
    # The last twelve bytes are the mark of the end, which holds nothing.
    for place in range(len(content) - 12):
        path.write_bytes(content[:place])
        assert not class_images._is_intact(path, (8, 8), "a key"), f"cut at {place}"
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        assert not class_images._is_intact(path, (8, 8), "a key"), f"changed at {place}"


def test_stopping_keeps_what_is_made(family: Family, finished: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    making = class_images.class_images(
        family, WANTED, cache, run, process_index=0, num_processes=1, device=torch.device("cpu")
    )
    next(making)
    next(making)
    making.close()
    assert list(contents(cache)) == ["000.png"]
    assert make(family, WANTED, cache, run) == [(1, 3), (2, 3), (3, 3)]
    assert contents(run) == contents(finished)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_parts_go_to_the_device_and_back(sd15_folder: Path, tmp_path: Path) -> None:
    family = load(sd15_folder)
    modules = [p for p in family.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    making = class_images.class_images(
        family,
        WANTED,
        tmp_path / "cache",
        tmp_path / "run",
        process_index=0,
        num_processes=1,
        device=torch.device("cuda"),
    )
    next(making)
    next(making)
    assert {module.device.type for module in modules} == {"cuda"}
    assert len(list(making)) == 2
    assert {module.device.type for module in modules} == {"cpu"}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a photo of a woman"},
        {"seed": 1},
        {"base_contents": "another model"},
        {"sampler": replace(SAMPLER, width=128)},
        {"sampler": replace(SAMPLER, height=128)},
        {"sampler": replace(SAMPLER, steps=3)},
        {"sampler": replace(SAMPLER, guidance_scale=1.0)},
    ],
)
def test_whatever_decides_a_picture_changes_the_key(
    family: Family, change: dict[str, object]
) -> None:
    assert replace(WANTED, **change).key(family) != WANTED.key(family)  # type: ignore[arg-type]


def test_the_length_of_prompts_changes_the_key_where_one_is_told(
    flux_folder: Path, sd15_folder: Path
) -> None:
    for folder, changes in ((flux_folder, True), (sd15_folder, False)):
        base = base_model.locate(ModelConfig(model_url=str(folder)))
        family = base_model.load(base, FULL)
        before = WANTED.key(family)
        family.max_sequence_length = 64
        assert (WANTED.key(family) != before) is changes


def test_the_number_of_pictures_does_not_change_the_key(family: Family) -> None:
    assert replace(WANTED, count=9).key(family) == WANTED.key(family)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_number_formats_change_the_key(sd15_folder: Path, part: str) -> None:
    family = load(sd15_folder)
    before = WANTED.key(family)
    family.pipeline.components[part].to(torch.bfloat16)
    assert WANTED.key(family) != before


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    family: Family, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    wanted, run = replace(WANTED, count=2), tmp_path / "run"

    told = make(family, wanted, tmp_path / "cache", run)

    assert told == [(0, 2), (1, 2), (2, 2)]
    expected = contents(finished)
    assert contents(run) == {name: expected[name] for name in ("000.png", "001.png")}
    # Nor are they made again when the run goes on.
    assert make(family, wanted, tmp_path / "cache", run) == [(2, 2)]


def test_a_picture_that_the_run_folder_does_not_take_ends_the_run_and_is_kept(
    family: Family, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")

    with pytest.raises(DiskError, match="run"):
        make(family, WANTED, tmp_path / "cache", tmp_path / "run")

    assert contents(tmp_path / "cache") == {"000.png": contents(finished)["000.png"]}
