"""How like a run's training pictures other pictures are, measured by a CLIP of the user's."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from trainer.errors import InputError
from trainer.events import Event, StageEvent
from trainer.images.likeness import FIELD, Looker, likeness
from trainer.inference import Stop
from trainer.lineup import end_if, read_picture
from trainer.run_subjects import training_pictures
from trainer.strength import FinishedRun

Measured = Generator[Event, None, Mapping[str, float]]


class RunLikeness:
    """Measures pictures against the training pictures of runs.

    Args:
        url: folder or hub id of a CLIP.
        runs: with their training pictures.

    Raises:
        InputError: the model cannot be had, or a run has no training pictures any more.
    """

    def __init__(self, url: str, runs: Sequence[FinishedRun]) -> None:
        self._paths = [_training_pictures(run) for run in runs]
        self._looker = Looker(url)
        self._shown: list[list[Tensor]] = []

    def learn(self, stop: Stop) -> Iterator[Event]:
        """Looks at the training pictures."""
        total, done = sum(map(len, self._paths)), 0
        for paths in self._paths:
            self._shown.append([])
            for path in paths:
                end_if(stop)
                self._shown[-1].append(self._embedding(path))
                done += 1
                yield StageEvent("training pictures", done, total)

    def of(self, folder: Path, pictures: Mapping[str, int], stop: Stop) -> Measured:
        """The likeness of pictures by their names.

        Args:
            folder: where they lie.
            pictures: the number, from 0, of the run that each is measured against.
            stop: asked before every picture.
        """
        measured: dict[str, float] = {}
        for done, (name, run) in enumerate(pictures.items(), start=1):
            end_if(stop)
            measured[name] = round(likeness(self._embedding(folder / name), self._shown[run]), 4)
            yield StageEvent("likeness", done, len(pictures))
        return measured

    def _embedding(self, path: Path) -> Tensor:
        return self._looker.embedding(read_picture(path))


def likeness_captions(measured: Mapping[str, float]) -> dict[str, str]:
    """What stands under pictures in a grid."""
    return {path: f"likeness {value:.2f}" for path, value in measured.items()}


def _training_pictures(run: FinishedRun) -> list[Path]:
    paths = list(training_pictures(run.folder, run.config))
    if not paths:
        message = f"run `{run.folder.root}` has no prepared pictures any more to compare with"
        raise InputError.of(FIELD, message, f"leave {FIELD} out")
    return paths
