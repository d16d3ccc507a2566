"""Trainings handed over to Slurm, found again by the name that each job has there.

Every node sees the data folder of the server at the same path.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from trainer.server.backends import PREEMPTED, BackendError, Handover, Standing
from trainer.server.slots import job_environment

_SECONDS = 30
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# Ends that say nothing about the training: it goes on elsewhere.
_PREEMPTED = ("PREEMPTED", "NODE_FAIL", "REQUEUED", "BOOT_FAIL", "REVOKED")
_TO_THE_SHELL, _TO_ALL_ELSE = ("--signal=TERM", "--batch"), ("--signal=TERM",)


class SlurmBackend:
    """Runs trainings by `sbatch`.

    Args:
        options: of sbatch, for every training.
        script: of sbatch, which is given the training's command; without one the command is all
            that runs.
        environment: of the commands; the one of jobs by default.
    """

    runs_here = False

    def __init__(
        self,
        options: Sequence[str],
        *,
        script: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._options = list(options)
        self._script = script
        self._environment = environment

    def has_room(self) -> bool:
        """Slurm has a queue of its own."""
        return True

    def start(self, job: Handover) -> bool:
        """Submits a training, unless it is there already."""
        if self.standing(job.id).state in ("waiting", "running"):
            return True
        submitted = self._run(
            "sbatch",
            "--parsable",
            f"--job-name={_name(job.id)}",
            f"--output={job.log}",
            "--open-mode=append",
            # Who goes on after an interruption is decided in one place: the server's queue.
            "--no-requeue",
            *self._options,
            *self._work(job),
        )
        if submitted.returncode != 0:
            raise BackendError(f"sbatch refuses the job: {submitted.stderr.strip()}")
        return True

    def standing(self, id: str) -> Standing:
        """What squeue says, and of those that it has forgotten, sacct."""
        listed = self._run("squeue", "--noheader", f"--name={_name(id)}", "--format=%T")
        if listed.returncode != 0:
            # A controller that does not answer says nothing about its jobs.
            return Standing("running")
        states = listed.stdout.split()
        if any(state not in _WAITING for state in states):
            return Standing("running")
        return Standing("waiting") if states else self._ended(id)

    def stop(self, id: str, *, at_once: bool) -> bool:
        """Sends SIGTERM to its shell and to what srun started, or cancels it."""
        name = f"--name={_name(id)}"
        if at_once:
            return self._run("scancel", name).returncode == 0
        # All together, by `--full`, would reach srun too, which then kills what it started.
        if self._run("scancel", *_TO_THE_SHELL, name).returncode != 0:
            return False
        # The shell may be all that there is, and it was told, whatever becomes of the rest.
        with suppress(BackendError):
            self._run("scancel", *_TO_ALL_ELSE, name)
        return True

    def _work(self, job: Handover) -> Sequence[str]:
        if self._script is not None:
            return [str(self._script), *job.command]
        # The shell becomes the training, so that signals reach it.
        return [f"--wrap=exec {shlex.join(job.command)}"]

    def _ended(self, id: str) -> Standing:
        try:
            found = self._run(
                *("sacct", "--noheader", "--allocations", "--parsable2"),
                *(f"--name={_name(id)}", "--format=State,ExitCode", "--starttime=now-30days"),
            )
        except BackendError:
            # Slurm without accounting has no sacct.
            return Standing("gone")
        lines = found.stdout.splitlines() if found.returncode == 0 else []
        if not lines:
            return Standing("gone")
        state, _, code = lines[-1].partition("|")
        if state.split()[0] in _PREEMPTED:
            return Standing("gone", PREEMPTED)
        number, _, ended_by = code.partition(":")
        if ended_by.isdigit() and ended_by != "0":
            # As a shell tells it.
            return Standing("gone", 128 + int(ended_by))
        return Standing("gone", int(number) if number.isdigit() else None)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return run(command, self._environment)


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command of an engine, without a shell, and gives what it prints.

    Args:
        environment: the one of jobs by default.

    Raises:
        BackendError: there is no such command, or it does not end.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=job_environment() if environment is None else dict(environment),
        )
    except FileNotFoundError as error:
        raise BackendError(f"there is no command `{command[0]}` on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"`{command[0]}` does not end within {_SECONDS} seconds") from error


def _name(id: str) -> str:
    return f"trainer-{id}"
