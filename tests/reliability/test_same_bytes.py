"""The same seed gives the same bytes whatever else is different, and nothing else is in them."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk
from short_runs import checkpoints, command, photographs, results

from trainer.determinism import deterministic
from trainer.errors import InputError

ROOT = Path(__file__).parent.parent.parent

# Everything that makes files of its own: new tokens, masks, class pictures, archives.
RICH = {
    "train_text_encoder_ti": True,
    "clip_seg_mask_prompt": "head",
    "segmenter": "luminance",
    "with_prior_preservation": True,
    "photo_class": "Man",
    "num_class_images": 2,
    "class_inference_steps": 1,
    "debug_dataset": True,
    "debug_loss_masks": True,
    "cache_latents": False,
    "random_flip": True,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    return photographs(tmp_path_factory.mktemp("subject") / "photos", photo_folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, photos: Path) -> Path:
    """A run folder; the hash seed is a random one."""
    root = tmp_path_factory.mktemp("one")
    with FaultyDisk(root) as disk:
        outcome = disk.run(command(sd15_folder, photos, root / "run", **RICH))
    assert outcome.returncode == 0, outcome.stderr
    return root / "run"


def test_folder_hash_seed_workers_language_time_zone_and_user_leave_every_byte_as_it_is(
    one: Path,
    sd15_folder: Path,
    photos: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    other = tmp_path / "another place" / "übung 2"
    arguments = command(sd15_folder, photos, other, **RICH, num_workers=2)
    surroundings = {
        "PYTHONHASHSEED": "1",
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "LOGNAME": "somebody",
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        env=os.environ | surroundings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = results(one), results(other)
    assert len(ours) >= 9
    assert ours == theirs
    kept = checkpoints(one)
    assert len(kept) == 8
    assert kept == checkpoints(other)
    figure(f"{len(ours)} result files and {len(kept)} of checkpoints, all bytes equal")


@pytest.mark.thorough
def test_another_seed_gives_other_weights_and_the_same_files(
    one: Path, sd15_folder: Path, photos: Path, figure: Callable[[str], None]
) -> None:
    run = one.parent / "another seed"
    with FaultyDisk(one.parent) as disk:
        outcome = disk.run(command(sd15_folder, photos, run, **RICH, seed=7))
    assert outcome.returncode == 0, outcome.stderr
    ours, theirs = results(one), results(run)
    assert ours.keys() == theirs.keys()
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert weights
    assert all(ours[name] != theirs[name] for name in weights)
    figure(f"{len(weights)} of {len(weights)} files of weights differ")


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """What a file holds, with everything in it that is compressed."""
    content = path.read_bytes()
    yield path.name, content
    if path.suffix == ".safetensors":
        yield f"{path.name} header", content[8 : 8 + int.from_bytes(content[:8], "little")]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                assert entry.date_time == (1980, 1, 1, 0, 0, 0)
                yield f"{path.name}/{entry.filename}", archive.read(entry)
    for place in re.finditer(rb"(?:zTXt|iCCP|iTXt)[^\0]{1,79}\0+", content):
        try:
            yield f"{path.name} chunk", zlib.decompressobj().decompress(content[place.end() :])
        except zlib.error:
            continue


def is_text(content: bytes) -> bool:
    """Whether it can be read as UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def strangers(started: float) -> dict[str, re.Pattern[bytes]]:
    """What must be in no file, by what it would be."""
    days = {time.strftime("%Y-%m-%d", time.gmtime(started + d)) for d in (-86400, 0, 86400)}
    return {
        "host name": re.compile(rb"\b" + re.escape(socket.gethostname().encode()) + rb"\b"),
        "user name": re.compile(rb"[/\\]" + re.escape(getpass.getuser().encode()) + rb"[/\\]"),
        "day": re.compile("|".join(days).encode()),
        "time": re.compile(rb"\b[0-2]\d:[0-5]\d:[0-5]\d\b"),
        "random id": re.compile(rb"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"),
        "date of a picture": re.compile(rb"tIME.{7}|date:(?:create|modify)", re.DOTALL),
    }


def test_no_result_file_tells_the_place_the_machine_the_user_or_the_time(
    one: Path, figure: Callable[[str], None]
) -> None:
    sought = strangers(one.stat().st_mtime)
    sought["run folder"] = re.compile(re.escape(str(one).encode()))
    sought["temporary folder"] = re.compile(rb"/tmp/|/var/|/home/")
    searched = 0
    for path in sorted((one / "outputs").rglob("*")):
        for name, content in contents(path) if path.is_file() else ():
            searched += 1
            # A host's name may be a few letters, which numbers happen to spell.
            long = len(socket.gethostname()) > 5
            short = set() if long or is_text(content) else {"host name"}
            found = {what for what in sought.keys() - short if sought[what].search(content)}
            assert not found, (name, found)
    assert searched > 12
    figure(f"{searched} files and entries of archives searched for {len(sought)} kinds of traces")


def test_the_search_for_traces_finds_what_is_there(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    path = tmp_path / "traces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a", (1980, 1, 1, 0, 0, 0)), "at 12:30:59")
    ((_, _), (_, inner)) = contents(path)
    assert strangers(0)["time"].search(inner)
    figure("a time within an archive")


def switches() -> tuple[bool, bool, bool, bool]:
    """Everything of torch that `deterministic` sets."""
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )


def test_deterministic_sets_what_torch_needs_and_puts_it_back(
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = switches()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(True):
        assert switches() == (True, False, True, False)
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.benchmark
    assert switches()[:3] == before[:3]
    with deterministic(False):
        assert switches()[:3] == before[:3]
    figure(f"{len(before)} of {len(before)} switches and the workspace of cuBLAS")


def test_an_operation_without_a_deterministic_form_is_told_by_the_name_of_the_option(
    figure: Callable[[str], None],
) -> None:
    # Torch has none for this one on any device.
    with pytest.raises(InputError) as refused, deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    (problem,) = refused.value.problems
    assert problem.field == "deterministic"
    assert "put_" in problem.message
    assert "deterministic: false" in problem.hint
    assert not torch.are_deterministic_algorithms_enabled()
    figure("`put_`, exit 2")


def test_another_error_of_torch_stays_what_it_is(figure: Callable[[str], None]) -> None:
    with pytest.raises(RuntimeError, match="size"), deterministic(True):
        torch.zeros(2) + torch.zeros(3)
    figure("RuntimeError")


def test_a_workspace_of_cublas_that_adds_in_any_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(InputError, match=":0:0"), deterministic(True):
        pass
    figure("exit 2")
