"""A tiny training from outside, run whole once, and again in pieces that are to end alike."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from faulty_disk import Fault, FaultyDisk, Outcome
from tiny import SMALL, TWO_LAYERS, digests

from trainer.job import RunFolder

# Two pictures of one size: one step is as good as another, and takes a hundredth of a second.
QUICK: dict[str, Any] = {
    **SMALL,
    **TWO_LAYERS,
    "resolution_width": 64,
    "resolution_height": 64,
    "max_train_steps": 6,
    "checkpointing_steps": 2,
}


def ending(root: Path) -> dict[str, Any]:
    """What two runs of one training must have in common to the byte when they have ended."""
    folder = RunFolder(root)
    result = folder.read_result()
    return {
        "outputs": digests(folder.outputs),
        "checkpoints": digests(folder.checkpoints),
        "losses": [(e["step"], e["loss"]) for e in folder.read_events() if e["event"] == "step"],
        "result": None if result is None else result.model_dump(exclude={"peak_memory"}),
        "half written": [str(path) for path in root.rglob(".tmp*")],
    }


class Course:
    """One training and how it ends when nothing happens.

    Args:
        root: for configuration and run folders.
        model: base model.
        photos: from which the first two pictures are taken.
        leaves: options over `QUICK`.
    """

    def __init__(self, root: Path, model: Path, photos: Path, **leaves: Any) -> None:
        pictures = root / "pictures"
        pictures.mkdir()
        for number in range(2):
            shutil.copy(photos / f"photo_{number}.jpg", pictures)
        given = {**QUICK, "model_url": str(model), "images_data_url": str(pictures), **leaves}
        self.root = root / "runs"
        self.root.mkdir()
        self._file = root / "config.yaml"
        self._file.write_text(yaml.safe_dump(given))
        self._disk = FaultyDisk(self.root)
        self.whole = self.run("whole")
        assert self.whole.returncode == 0, self.whole.stderr
        self.expected = ending(self.root / "whole")
        assert self.expected["half written"] == []

    def run(self, name: str, fault: Fault | None = None, flags: Sequence[str] = ()) -> Outcome:
        """Runs, or goes on with, the training in the run folder of this name."""
        command = ["train", str(self._file), "--output", str(self.root / name), *flags]
        return self._disk.run(command, fault)

    def copy_of_the_whole(self, name: str) -> Path:
        """The run that nothing happened to, once more, in a folder of this name."""
        folder = self.start_again(name)
        shutil.copytree(self.root / "whole", folder)
        return folder

    def start_again(self, name: str) -> Path:
        """An empty place for a run of this name."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return self.root / name

    def ends_alike(self, name: str, fault: Fault | None = None) -> Outcome:
        """Goes on with a run to its end and compares it with the one that nothing happened to."""
        outcome = self.run(name, fault)
        assert outcome.returncode == 0, outcome.stderr
        found = ending(self.root / name)
        different = [what for what, value in self.expected.items() if found[what] != value]
        assert not different, {what: (self.expected[what], found[what]) for what in different}
        return outcome
