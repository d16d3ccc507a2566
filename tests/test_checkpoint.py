"""Checkpoints are whole or not there; damage is found, named and passed over."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damages import DAMAGES, Damage, empty, flip_a_bit

from trainer import checkpoint, durable
from trainer.checkpoint import Checkpoint
from trainer.errors import CheckpointError, DiskError, NonFiniteError, OutOfMemoryError

CONFIG: dict[str, Any] = {"rank": 4, "learning_rate": 1e-4, "snr_gamma": None, "names": ("a", "b")}
FILES = ["weights.safetensors", "optimizer.pt", "state.json", "manifest.json"]

# Publishes step 2 in another process, which the limit or the signal then meets in the middle.
PUBLISH = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from trainer import checkpoint, durable
from trainer.errors import TrainerError
folder, how = Path(sys.argv[1]), sys.argv[2]
if how.isdecimal():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), int(how)))
else:
    real = durable.write_with
    def write(path, content):
        if path.name == how:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, content)
    durable.write_with = write
try:
    checkpoint.publish(
        folder,
        checkpoint.Checkpoint(2, {}, {"moments": torch.ones(5000)}, {}),
        config_values={}, keep=1,
    )
except TrainerError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def make(step: int) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.full((3,), float(step)))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return Checkpoint(
        step=step,
        tensors={"layer.lora_A.weight": torch.full((2, 3), float(step))},
        optimizer=optimizer.state_dict(),
        state={"lr_scheduler": {"last_epoch": step}, "scaler": None},
    )


def publish(folder: Path, step: int, *, keep: int = 2) -> Path:
    return checkpoint.publish(folder, make(step), config_values=CONFIG, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_published_comes_back(tmp_path: Path) -> None:
    path = publish(tmp_path / "checkpoints", 7)
    loaded = checkpoint.load_newest(tmp_path / "checkpoints", config_values=CONFIG)
    assert path == tmp_path / "checkpoints" / "step-7"
    assert loaded is not None
    assert loaded.warnings == ()
    saved, expected = loaded.checkpoint, make(7)
    assert saved.step == 7
    assert saved.state == expected.state
    assert saved.tensors.keys() == expected.tensors.keys()
    assert torch.equal(saved.tensors["layer.lora_A.weight"], torch.full((2, 3), 7.0))
    moments = saved.optimizer["state"][0]
    assert torch.equal(moments["exp_avg"], expected.optimizer["state"][0]["exp_avg"])
    assert saved.optimizer["param_groups"] == expected.optimizer["param_groups"]


def test_the_newest_is_taken_by_number_not_by_spelling(tmp_path: Path) -> None:
    for step in (9, 10):
        publish(tmp_path, step)
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 10


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_checkpoints_starts_from_nothing(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "checkpoints"
    assert checkpoint.load_newest(folder, config_values=CONFIG) is None


def test_equal_checkpoints_have_equal_tensor_bytes(tmp_path: Path) -> None:
    paths = [publish(tmp_path / name, 1) / "weights.safetensors" for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: Damage, file: str
) -> None:
    for step in (1, 2):
        publish(tmp_path, step)
    damage(tmp_path / "step-2" / file)
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 1
    assert len(loaded.warnings) == 1
    assert "`step-2` is damaged" in loaded.warnings[0]
    assert f"`{file}`" in loaded.warnings[0]


def test_an_empty_folder_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 1
    assert "`manifest.json` is missing" in loaded.warnings[0]


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9")
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 1
    assert "`manifest.json` is of step 1" in loaded.warnings[0]


def test_nothing_usable_is_an_error_and_never_a_start_from_zero(tmp_path: Path) -> None:
    for step in (1, 2):
        empty(publish(tmp_path, step) / "weights.safetensors")
    with pytest.raises(CheckpointError, match="is usable") as caught:
        checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert caught.value.exit_code == 6
    assert "step-1" in caught.value.message
    assert "step-2" in caught.value.message
    assert "--output" in caught.value.hint


def refusing(path: Path, number: int) -> Callable[[Path], dict[str, Any]]:
    """Reads files as the system does that gives this error for all below a folder."""
    real = checkpoint._describe

    def describe(file: Path) -> dict[str, Any]:
        if file.is_relative_to(path):
            raise OSError(number, os.strerror(number), str(file))
        return real(file)

    return describe


MOMENTARY = ["EACCES", "EPERM", "ESTALE", "EMFILE", "ENFILE", "ETIMEDOUT", "ENOMEM"]


@pytest.mark.parametrize("name", MOMENTARY)
def test_a_checkpoint_that_cannot_be_read_at_this_moment_ends_the_run_and_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        publish(tmp_path, step)
    number = getattr(errno, name)
    monkeypatch.setattr(checkpoint, "_describe", refusing(tmp_path / "step-2", number))

    with pytest.raises(OutOfMemoryError if name == "ENOMEM" else DiskError) as caught:
        checkpoint.load_newest(tmp_path, config_values=CONFIG)

    assert f"`{tmp_path / 'step-2'}` could not be read: {os.strerror(number)}" in str(caught.value)
    assert "nothing was removed" in caught.value.message
    assert "same command" in caught.value.hint
    assert "remove" not in caught.value.hint
    # Nor does a run that is further back, by whatever way, remove it.
    publish(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["step-1", "step-2"]


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_too_many_open_files_are_no_run_without_checkpoints(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    for read in (checkpoint.load_newest, checkpoint.refuse_other):
        with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(DiskError, match="Too many open"):
            read(tmp_path, config_values=CONFIG)


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_too_little_memory_to_map_a_checkpoint_is_no_damage(part: str, tmp_path: Path) -> None:
    large = {part: torch.zeros(1 << 23)}
    saved = Checkpoint(2, large if part == "weights" else {}, large, {})
    checkpoint.publish(tmp_path, saved, config_values=CONFIG, keep=1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = 1 << 24

    with (
        limited(resource.RLIMIT_AS, pages * resource.getpagesize() + room),
        pytest.raises(OutOfMemoryError, match="Cannot allocate memory .*; nothing was removed"),
    ):
        checkpoint.load_newest(tmp_path, config_values=CONFIG)

    assert checkpoint.load_newest(tmp_path, config_values=CONFIG) is not None


def test_a_newer_checkpoint_that_can_be_read_after_all_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 3):
        publish(tmp_path, step)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "_describe", refusing(tmp_path / "step-3", errno.EIO))
        loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert (loaded.checkpoint.step, len(loaded.warnings)) == (1, 1)

    publish(tmp_path, 2, keep=1)

    assert names(tmp_path) == ["step-2", "step-3"]


def test_where_the_disk_gives_nothing_back_nobody_is_told_to_remove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        publish(tmp_path, step)
    empty(tmp_path / "step-1" / "weights.safetensors")
    monkeypatch.setattr(checkpoint, "_describe", refusing(tmp_path / "step-2", errno.EIO))

    with pytest.raises(CheckpointError, match="is usable") as caught:
        checkpoint.load_newest(tmp_path, config_values=CONFIG)

    assert "remove" not in caught.value.hint
    assert "mend the disk" in caught.value.hint


def test_a_checkpoint_of_another_configuration_is_refused_with_every_difference(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    other = {**CONFIG, "rank": 8, "snr_gamma": 5.0, "new": True}
    with pytest.raises(CheckpointError, match="belongs to another configuration") as caught:
        checkpoint.load_newest(tmp_path, config_values=other)
    assert caught.value.exit_code == 6
    for difference in ("`rank`: 4 → 8", "`snr_gamma`: null → 5.0", "`new`: null → true"):
        assert difference in caught.value.message
    assert "learning_rate" not in caught.value.message


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    folder, witness = tmp_path / "checkpoints", tmp_path / "executed"
    publish(folder, 1)
    path = publish(folder, 2) / "optimizer.pt"
    torch.save({"state": Trap(witness)}, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    # Sizes and digests are made to fit, as an attacker would.
    manifest["content"]["files"]["optimizer.pt"] = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    content = json.dumps(manifest["content"], sort_keys=True).encode()
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    loaded = checkpoint.load_newest(folder, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 1
    assert not witness.exists()
    # The trap itself works.
    pickle.loads(pickle.dumps(Trap(witness)))
    assert witness.exists()


def test_old_checkpoints_go_beyond_the_limit(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        publish(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-3", "step-4"]


def test_old_checkpoints_go_only_after_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1, keep=1)
    seen: list[list[str]] = []
    real = durable.remove_folder

    def remove_folder(path: Path) -> None:
        seen.append(names(tmp_path))
        assert checkpoint.load_newest(tmp_path, config_values=CONFIG) is not None
        real(path)

    monkeypatch.setattr(durable, "remove_folder", remove_folder)
    publish(tmp_path, 2, keep=1)
    assert seen == [["step-1", "step-2"]]
    assert names(tmp_path) == ["step-2"]


def test_leftovers_of_a_kill_are_ignored_and_then_cleaned_up(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / ".tmp-2").mkdir()
    (tmp_path / ".tmp-2" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-old-step-0").mkdir()
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert (loaded.checkpoint.step, loaded.warnings) == (1, ())
    publish(tmp_path, 3)
    assert names(tmp_path) == ["step-1", "step-3"]


def test_a_resumed_run_that_comes_by_a_whole_checkpoint_leaves_it(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    before = (path / "manifest.json").stat().st_ino
    publish(tmp_path, 1)
    assert (path / "manifest.json").stat().st_ino == before
    assert names(tmp_path) == ["step-1"]


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, step, keep=3)
    for step in (2, 3):
        flip_a_bit(tmp_path / f"step-{step}" / "optimizer.pt")
    publish(tmp_path, 2, keep=3)
    # Step 3 was made from a future that this run has not reached again.
    assert names(tmp_path) == ["step-1", "step-2"]
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert (loaded.checkpoint.step, loaded.warnings) == (2, ())


def publish_in_a_process(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PUBLISH, str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", ["50", "5000"])
def test_a_full_disk_is_a_disk_error_and_the_old_checkpoint_stays(
    tmp_path: Path, limit: str
) -> None:
    publish(tmp_path, 1, keep=1)
    done = publish_in_a_process(tmp_path, limit)
    assert done.returncode == DiskError.exit_code == 5, done.stderr
    assert "could not be written" in done.stdout
    assert names(tmp_path) == ["step-1"]
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert loaded.checkpoint.step == 1


@pytest.mark.parametrize("file", ["optimizer.pt", "manifest.json"])
def test_a_kill_in_the_middle_leaves_the_old_checkpoint(tmp_path: Path, file: str) -> None:
    publish(tmp_path, 1, keep=1)
    done = publish_in_a_process(tmp_path, file)
    assert done.returncode == -signal.SIGKILL, done.stderr
    loaded = checkpoint.load_newest(tmp_path, config_values=CONFIG)
    assert loaded is not None
    assert (loaded.checkpoint.step, loaded.warnings) == (1, ())
    publish(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-2"]


def test_an_optimizers_state_is_saved_as_torch_saves_it_a_tensor_at_a_time(tmp_path: Path) -> None:
    state = {"state": {n: {"exp_avg": torch.full((1 << 16,), float(n))} for n in range(40)}}
    largest = []

    def write(content: Any) -> int:
        largest.append(len(content))
        return len(content)

    buffer = io.BytesIO()
    torch.save(state, buffer)
    file = tmp_path / "optimizer.pt"
    durable.write_with(file, lambda target: checkpoint._save(state, target))
    assert file.read_bytes() == buffer.getvalue()
    checkpoint._save(state, SimpleNamespace(write=write))  # type: ignore[arg-type]
    assert sum(largest) == file.stat().st_size
    assert max(largest) <= 4 * (1 << 16)


def test_weights_that_are_not_finite_leave_the_old_checkpoint_and_nothing_else(
    tmp_path: Path,
) -> None:
    publish(tmp_path, 1)
    spoilt = Checkpoint(2, {"weight": torch.tensor([1.0, math.nan])}, {}, {})

    with pytest.raises(NonFiniteError):
        checkpoint.publish(tmp_path, spoilt, config_values=CONFIG, keep=1)

    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
