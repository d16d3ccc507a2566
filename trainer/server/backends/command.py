"""Trainings handed over by commands of the owner's own: one hands over, one tells, one stops.

Each is a template without a shell; `{id}` and the other places stand in words of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.server.backends import BackendError, Handover, Standing, with_places
from trainer.server.backends.slurm import run

_STATES: Mapping[str, Literal["waiting", "running", "gone", "unknown"]] = {
    "waiting": "waiting",
    "running": "running",
    "gone": "gone",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Templates:
    """The three commands.

    Args:
        submit: takes a training: `{id}`, `{folder}`, and `{command}`, which is all words of the
            training's own command.
        state: prints `waiting`, `running`, `unknown` or `gone`, after which an exit code may
            stand: `{id}`.
        stop: asks for a checkpoint and the end: `{id}`.
    """

    submit: str
    state: str
    stop: str


class CommandBackend:
    """Runs trainings by these commands."""

    runs_here = False

    def __init__(self, templates: Templates) -> None:
        self._templates = templates

    def has_room(self) -> bool:
        """What is behind the commands has a queue of its own."""
        return True

    def start(self, job: Handover) -> bool:
        """Hands a training over, unless it is there already."""
        if self.standing(job.id).state in ("waiting", "running"):
            return True
        places = {"id": job.id, "folder": str(job.folder)}
        words = with_places(shlex.split(self._templates.submit), places)
        command = [w for word in words for w in (job.command if word == "{command}" else [word])]
        done = run(command)
        with open(job.log, "a") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip()
            raise BackendError(f"`{command[0]}` refuses the job ({done.returncode}): {reason}")
        return True

    def standing(self, id: str) -> Standing:
        """What the state command prints."""
        told = run(with_places(shlex.split(self._templates.state), {"id": id}))
        words = told.stdout.split()
        if told.returncode != 0 or not words or words[0] not in _STATES:
            # An engine that does not answer says nothing about its jobs.
            return Standing("running")
        code = int(words[1]) if len(words) > 1 and words[1].isdigit() else None
        return Standing(_STATES[words[0]], code)

    def stop(self, id: str, *, at_once: bool) -> bool:
        """Runs the stop command, also where it is to end at once."""
        return run(with_places(shlex.split(self._templates.stop), {"id": id})).returncode == 0
