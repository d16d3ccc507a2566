"""Where each job has its files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trainer.job import Result, RunFolder

log = logging.getLogger("trainer.server")


@dataclass(frozen=True)
class JobFolder:
    """The places inside the folder of one job.

    ```
    config.yaml   what is trained, or generation.json in `run`
    run/          the run folder
    log.txt       what its program printed
    lock          held by its process
    ```
    """

    root: Path

    @property
    def config(self) -> Path:
        """The configuration of a training."""
        return self.root / "config.yaml"

    @property
    def run(self) -> RunFolder:
        """The run folder, of pictures too."""
        return RunFolder(self.root / "run")

    @property
    def log(self) -> Path:
        """What its program printed."""
        return self.root / "log.txt"

    def result(self) -> Result | None:
        """How the job ended; an interrupted one has not, nor has one whose result is damaged."""
        result = self._read()
        return None if result is None or result.status == "interrupted" else result

    def was_interrupted(self) -> bool:
        """Whether the latest start ended in an interruption, and can go on."""
        result = self._read()
        return result is not None and result.status == "interrupted"

    def _read(self) -> Result | None:
        try:
            return self.run.read_result()
        except ValueError:
            log.warning("`%s` cannot be read, and does not count", self.run.result)
            return None


class JobFolders:
    """The folders of all jobs of a server."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, job: str) -> JobFolder:
        """The folder of the job with this id."""
        return JobFolder(self._root / job)
