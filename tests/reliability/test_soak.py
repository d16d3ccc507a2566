"""Long runs and many kills: memory, files and processes stay what they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_disk import Fault, FaultyDisk
from short_runs import command, kind_of_file, photographs, results, steps

# In thorough form: of this many steps, the memory of the last quarter is compared with that of the
# second.
STEPS = 2000
FEW = 90
KILLS = 20


def test_steps_leave_no_objects_behind(
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    thorough: bool,
    figure: Callable[[str], None],
) -> None:
    number, measures = STEPS if thorough else FEW, tmp_path / "measures.json"
    given = [sd15_folder, photo_folder, tmp_path / "run", number, measures]
    with FaultyDisk(tmp_path) as disk:
        # Its memory is that of a training alone, without the tests.
        outcome = disk.run([str(value) for value in given], program="soaked", seconds=900)
    assert outcome.returncode == 0, outcome.stderr
    seen = json.loads(measures.read_text())
    objects, tensors = zip(*seen["living"], strict=True)
    # Numbers such as losses are no containers, and are not counted.
    assert tensors[2] == tensors[1]
    assert objects[2] - objects[1] < 30
    if not thorough:
        figure(f"{tensors[2] - tensors[1]} tensors, {objects[2] - objects[1]} objects in 30 steps")
        return
    early, late = (sum(seen["resident"][first : first + 500]) / 500 for first in (500, 1500))
    figure(
        f"memory of steps 1,500-2,000 is {late / early:.4f} of that of 500-1,000 "
        f"({early / 2**20:.0f} MiB)"
    )
    assert late <= 1.02 * early


@pytest.mark.thorough
def test_a_run_killed_again_and_again_leaves_no_files_or_processes_of_its_ends(
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    photos = photographs(tmp_path / "photos", photo_folder)
    leaves = {"max_train_steps": 30, "cache_latents": False, "num_workers": 2}
    whole, killed = tmp_path / "disk" / "whole", tmp_path / "disk" / "killed"
    whole.parent.mkdir()
    with FaultyDisk(whole.parent) as disk:
        reference = disk.run(command(sd15_folder, photos, whole, **leaves))
        assert reference.returncode == 0, reference.stderr
        operations = len(reference.below(whole))
        chance = random.Random(9)
        for _ in range(KILLS):
            # In steps of a run that has come to where it was before, and beyond.
            fault = Fault("kill", at=chance.randrange(200, operations // 3), below=killed)
            outcome = disk.run(command(sd15_folder, photos, killed, **leaves), fault)
            assert outcome.returncode in (0, -9), outcome.stderr
            assert not outcome.has_processes()
        last = disk.run(command(sd15_folder, photos, killed, **leaves))
    assert last.returncode == 0, last.stderr
    assert not last.has_processes()
    assert results(killed) == results(whole)
    assert steps(killed) == steps(whole)
    left, usual = ({kind_of_file(p, run) for p in run.rglob("*")} for run in (killed, whole))
    assert left == usual
    assert len(list(killed.rglob("*"))) == len(list(whole.rglob("*")))
    sizes = [sum(p.stat().st_size for p in run.rglob("*")) for run in (killed, whole)]
    assert sizes[0] < 1.1 * sizes[1]
    figure(
        f"{KILLS} kills, {len(usual)} kinds of files as ever, {sizes[0] / sizes[1]:.3f} of the size"
    )
