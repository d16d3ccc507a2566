"""Damage of the newest checkpoint costs the steps since the one before it, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import DAMAGES, Damage, flip_a_bit
from faulty_disk import Fault
from interrupted import Course
from tiny import digests

Figure = Callable[[str], None]
Courses = Callable[..., Course]

FILES = ("weights.safetensors", "optimizer.pt", "state.json", "manifest.json")


def make_it_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def make_it_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"no folder")


def make_it_a_broken_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("elsewhere"))


def make_it_a_link_to_another(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("step-4"))


OF_THE_FOLDER: tuple[Damage, ...] = (
    make_it_empty,
    make_it_a_file,
    make_it_a_broken_link,
    make_it_a_link_to_another,
)


@pytest.fixture
def course(courses: Courses) -> Course:
    """Six steps with checkpoints at 2, 4 and 6."""
    return courses(checkpoints_total_limit=3)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_ends_with_the_same_bytes(
    course: Course, thorough: bool, figure: Figure
) -> None:
    cases = [(damage, file) for damage in DAMAGES for file in FILES]
    cases += [(damage, "") for damage in OF_THE_FOLDER]
    total = len(cases)
    if not thorough:
        # Of files and of folders.
        cases = [*random.Random(3).sample(cases[: -len(OF_THE_FOLDER)], 2), cases[-2]]
    for damage, file in cases:
        folder = course.copy_of_the_whole("damaged")
        damage(folder / "checkpoints" / "step-6" / file)
        outcome = course.ends_alike("damaged")
        assert "`step-6` is damaged and passed over" in outcome.stderr
        assert "goes on after step 4" in outcome.stderr
    figure(f"{len(cases)} of {total} damages, all bytes equal")


def test_a_checkpoint_that_cannot_be_read_is_passed_over(course: Course, figure: Figure) -> None:
    newest = course.copy_of_the_whole("unreadable") / "checkpoints" / "step-6"
    outcome = course.ends_alike("unreadable", Fault("unreadable", below=newest))
    assert "`step-6` is damaged and passed over: it cannot be read" in outcome.stderr
    figure("EIO at every read")


@pytest.mark.thorough
def test_a_checkpoint_whose_server_is_away_ends_the_run_and_is_gone_on_from_later(
    course: Course, figure: Figure
) -> None:
    checkpoints = course.copy_of_the_whole("away") / "checkpoints"
    before = digests(checkpoints)
    outcome = course.run("away", Fault("stale", below=checkpoints / "step-6"))
    assert outcome.returncode == 5, outcome.stderr
    assert "error[disk]" in outcome.stderr
    assert "step-6` could not be read: Stale file handle; nothing was removed" in outcome.stderr
    assert digests(checkpoints) == before
    later = course.ends_alike("away")
    assert "passed over" not in later.stderr
    figure("ESTALE at every read: exit 5, then all bytes equal")


def test_where_every_checkpoint_is_damaged_the_run_ends_and_never_starts_from_zero(
    course: Course, figure: Figure
) -> None:
    checkpoints = course.copy_of_the_whole("spoilt") / "checkpoints"
    for step in (2, 4, 6):
        flip_a_bit(checkpoints / f"step-{step}" / "weights.safetensors")
    before = digests(checkpoints)
    outcome = course.run("spoilt")
    assert outcome.returncode == 6
    for step in (2, 4, 6):
        assert f"`step-{step}` is damaged" in outcome.stderr
    assert digests(checkpoints) == before
    figure("exit 6, 3 of 3 named")


def fit_the_manifest(folder: Path, **changes: Any) -> None:
    """Makes sizes and digests fit what is there, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["content"]["files"]:
        content = (folder / name).read_bytes()
        described = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["content"]["files"][name] = described
    manifest["content"]["config"] |= changes
    content = json.dumps(manifest["content"], sort_keys=True).encode()
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_a_pickle_in_a_checkpoint_is_not_executed(
    course: Course, tmp_path: Path, figure: Figure
) -> None:
    newest = course.copy_of_the_whole("trap") / "checkpoints" / "step-6"
    witness = tmp_path / "executed"
    torch.save({"state": Trap(witness)}, newest / "optimizer.pt")
    fit_the_manifest(newest)
    outcome = course.ends_alike("trap")
    assert "`step-6` is damaged and passed over" in outcome.stderr
    assert not witness.exists()
    # The trap itself works.
    torch.save({"state": Trap(witness)}, tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert witness.exists()
    figure("passed over, not executed")


def test_a_checkpoint_of_another_configuration_is_refused_with_both_values_of_what_differs(
    course: Course, figure: Figure
) -> None:
    folder = course.copy_of_the_whole("other")
    before = ending_of(folder)
    flags = ["--rank", "8", "--learning-rate", "0.002"]
    outcome = course.run("other", flags=flags)
    assert outcome.returncode == 6
    assert "`rank`: 4 → 8" in outcome.stderr
    assert "`learning_rate`: 0.001 → 0.002" in outcome.stderr
    assert "lora_alpha" not in outcome.stderr
    assert ending_of(folder) == before
    figure("exit 6, 2 of 2 fields")


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    course: Course, figure: Figure
) -> None:
    folder = course.copy_of_the_whole("processes")
    for step in (2, 4, 6):
        changes = {"number of processes": 2}
        fit_the_manifest(folder / "checkpoints" / f"step-{step}", **changes)
    outcome = course.run("processes")
    assert outcome.returncode == 6
    assert "`number of processes`: 2 → 1" in outcome.stderr
    figure("exit 6, field and both values")


def ending_of(folder: Path) -> dict[str, str]:
    """What a refused run must leave as it was."""
    return digests(folder / "checkpoints") | digests(folder / "outputs")
