"""Slots of this machine: a GPU each, or the processor, with one process at a time.

The lock of a slot and of a job is held by the process itself, from before it begins: a file
description that it inherits. So a restarted server sees what still runs, whoever started it, and
no two programs of one server ever share a GPU. Other programs know nothing of these locks.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.server.settings import GENERATION_COMMAND, JOB_COMMAND, KEYS, PREPARATION_COMMAND

PROCESSOR = "cpu"
_CODE = Path(__file__).parents[2]
_OWN_VARIABLES = (KEYS, JOB_COMMAND, GENERATION_COMMAND, PREPARATION_COMMAND)
_NVIDIA = Path("/proc/driver/nvidia/gpus")
# The process id is written by the process to be, before it becomes the program: there is no
# moment in which the lock is held and nobody knows by whom.
_SHELL = ("/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"')


class Busy(Exception):
    """Another process holds the lock."""


def gpus_of_this_machine() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, or the processor."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
        return named or (PROCESSOR,)
    count = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
    return tuple(map(str, range(count))) or (PROCESSOR,)


@dataclass(frozen=True)
class Slot:
    """A place for one process.

    Args:
        name: the GPU, as CUDA_VISIBLE_DEVICES names it, or `cpu`.
        folder: of locks.
    """

    name: str
    folder: Path

    @property
    def lock(self) -> Path:
        """Its lock."""
        return self.folder / f"slot-{self.name.replace('/', '-')}.lock"

    def is_held(self) -> bool:
        """Whether a process is in it."""
        return is_held(self.lock)

    def environment(self) -> dict[str, str]:
        """The environment of a process in it."""
        devices = "" if self.name == PROCESSOR else self.name
        return {**job_environment(), "CUDA_VISIBLE_DEVICES": devices}


def job_environment() -> dict[str, str]:
    """The environment of jobs and of what starts them: the server's, without its own affairs.

    They run the server's own code, also where that is not installed, and find its programs, such
    as accelerate, also where its environment is not activated.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}
    first = {"PYTHONPATH": str(_CODE), "PATH": str(Path(sys.executable).parent)}
    before = {name: [place, *filter(None, [kept.get(name)])] for name, place in first.items()}
    return kept | {name: os.pathsep.join(places) for name, places in before.items()}


def spawn(
    command: Sequence[str],
    *,
    locks: Sequence[Path],
    log: Path,
    environment: Mapping[str, str],
    pipe: bool = False,
) -> subprocess.Popen[bytes]:
    """A process of a session of its own that holds these locks until it ends.

    The first lock has its process id, and its folder is where the process works.

    Args:
        command: program and arguments; no shell reads them.
        locks: files, made when missing.
        log: file that its output is appended to.
        environment: its environment variables.
        pipe: whether its input is written to; it reads nothing else.

    Raises:
        Busy: one of the locks is held.
        OSError: it cannot be started.
    """
    with ExitStack() as stack:
        held = [stack.enter_context(_taken(path)) for path in locks]
        output = stack.enter_context(open(log, "ab"))
        return subprocess.Popen(
            [*_SHELL, str(locks[0]), *command],
            stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            # Where a request could name a file by a relative path, there is none.
            cwd=locks[0].parent,
            pass_fds=[file.fileno() for file in held],
            start_new_session=True,
        )


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    try:
        with _taken(lock):
            return False
    except Busy:
        return True


def end(lock: Path, *, at_once: bool) -> bool:
    """Sends the process group that holds a lock, if there is one, the signal to end.

    Returns:
        Whether it was sent: one that is about to start has not written its number yet.
    """
    process = process_of(lock) if is_held(lock) else None
    if process is None:
        return False
    try:
        os.killpg(process, signal.SIGKILL if at_once else signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


def process_of(lock: Path) -> int | None:
    """The process that a lock belongs to, or belonged to; nothing where none ever began."""
    text = lock.read_text().strip() if lock.exists() else ""
    return int(text) if text.isdigit() else None


@contextmanager
def _taken(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy from error
        yield file
