"""Trainings whose every change of a folder is counted, and fails where a test wants it to.

`shim.c` stands between the process and its files. A server process with the shim, and with all
of the trainer imported, forks a child for every run, so a run takes what its training takes:

    with FaultyDisk(tmp_path) as disk:
        outcome = disk.run(["train", ...], Fault("kill", at=17, below=folder / "checkpoints"))
        outcome.cut_power()
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

HERE = Path(__file__).parent
SHIM = HERE / "shim.c"
SECONDS = 240

Kind = Literal[
    "kill", "term", "int", "stop", "enospc", "edquot", "erofs", "eio", "unreadable", "stale"
]
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "stop": signal.SIGSTOP,
}
ERRORS = {
    "enospc": errno.ENOSPC,
    "edquot": errno.EDQUOT,
    "erofs": errno.EROFS,
    "eio": errno.EIO,
    "unreadable": errno.EIO,
    "stale": errno.ESTALE,
}
# As in shim.c.
_SPARE_REMOVAL, _ONCE, _HALF, _READS, _TWICE = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong at which operation.

    Args:
        kind: a signal to the process at that operation (of a write, `kill` lets the first half
            through); an error of that operation and all later ones; `unreadable` and `stale`, a
            folder whose server is away, are errors of every read.
        at: number of the operation, from 1, among those below the folder.
        below: folder or file whose operations are counted. None: the whole root.
        once: one operation fails, later ones succeed.
        half: the first half of that write comes through, later writes fail.
        twice: the signal comes at the next operation, too.
    """

    kind: Kind
    at: int = 1
    below: Path | None = None
    once: bool = False
    half: bool = False
    twice: bool = False

    @property
    def flags(self) -> int:
        """As shim.c takes them."""
        return (
            _SPARE_REMOVAL * (self.kind in ("enospc", "edquot"))
            + _ONCE * self.once
            + _HALF * self.half
            + _READS * (self.kind in ("unreadable", "stale"))
            + _TWICE * self.twice
        )


@dataclass(frozen=True)
class Operation:
    """One change of the folder, done or failed by itself.

    Args:
        number: from 1, among all below the root.
        name: open (a new or emptied file), append (an existing one opened to be written), write,
            fsync, rename, unlink, mkdir, rmdir, truncate, link or chmod.
        path: what was changed.
        size: bytes written, left by truncate, or there when opened.
        target: new name of rename and link.
        error: number of the error. 0: it was done.
    """

    number: int
    name: str
    path: Path
    size: int
    target: Path | None = None
    error: int = 0

    def concerns(self, folder: Path) -> bool:
        """Whether anything below a folder, or that itself, was changed."""
        paths = [self.path, *([self.target] if self.target else [])]
        return any(path.is_relative_to(folder) for path in paths)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: return code (negative: by that signal), what it said and did."""

    pid: int
    returncode: int
    stdout: str
    stderr: str
    operations: list[Operation] = field(repr=False)

    def below(self, folder: Path) -> list[Operation]:
        """The operations that `Fault(at=k, below=folder)` counts, in their order."""
        return [operation for operation in self.operations if operation.concerns(folder)]

    def cut_power(self) -> list[Path]:
        """Takes away what a power cut may: everything written to a file since its last fsync.

        Names persist in the order they were given in.

        Returns:
            The files that lost something.
        """
        lost = []
        for path, (size, durable) in _sizes(self.operations).items():
            if durable < size and path.is_file() and durable < path.stat().st_size:
                os.truncate(path, durable)
                lost.append(path)
        return lost

    def renamed_before_durable(self) -> list[str]:
        """Every rename of data that was not made durable before, in words."""
        found = []
        for end, operation in enumerate(self.operations):
            if operation.name == "rename" and not operation.error:
                sizes = _sizes(self.operations[:end])
                found += [
                    f"{path} renamed to {operation.target} with {durable} of {size} bytes durable"
                    for path, (size, durable) in sizes.items()
                    if path.is_relative_to(operation.path) and durable < size
                ]
        return found

    def has_processes(self, within: float = 10) -> bool:
        """Whether a process of the run is still there after so many seconds."""
        end = time.monotonic() + within
        while _group_lives(self.pid):
            if time.monotonic() > end:
                return True
            time.sleep(0.05)
        return False


def _sizes(operations: Sequence[Operation]) -> dict[Path, tuple[int, int]]:
    """The size of every file that was written, and how much of it is durable."""
    sizes: dict[Path, tuple[int, int]] = {}
    for operation in operations:
        if operation.error:
            continue
        path, (size, durable) = operation.path, sizes.get(operation.path, (0, 0))
        match operation.name:
            case "unlink":
                sizes.pop(path, None)
            case "rename":
                _move(sizes, operation)
            case "append" if path in sizes:
                pass
            case name if name in _AFTERWARDS:
                sizes[path] = _AFTERWARDS[name](operation.size, size, durable)
    return sizes


# Size and durable bytes of a file, from the size that an operation has and both before it.
_AFTERWARDS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "open": lambda _, size, durable: (0, 0),
    "append": lambda there, size, durable: (there, there),
    "write": lambda more, size, durable: (size + more, durable),
    "truncate": lambda left, size, durable: (left, min(durable, left)),
    "fsync": lambda _, size, durable: (size, size),
}


def _move(sizes: dict[Path, tuple[int, int]], rename: Operation) -> None:
    assert rename.target is not None
    for path in [path for path in sizes if path.is_relative_to(rename.path)]:
        sizes[rename.target / path.relative_to(rename.path)] = sizes.pop(path)


class Running:
    """A run that was started and not yet waited for."""

    def __init__(self, server: _Server, pid: int, scratch: Path) -> None:
        self._server = server
        self._scratch = scratch
        self._outcome: Outcome | None = None
        self.pid = pid

    def send_signal(self, number: int) -> None:
        """Sends a signal to the training's process, not to its workers."""
        if self._outcome is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> Outcome:
        """Waits for the end.

        Raises:
            TimeoutError: it went on for longer, and was killed.
        """
        if self._outcome is None:
            status = self._server.ask(wait=self.pid, seconds=seconds, scratch=str(self._scratch))
            # A limit of file sizes that a test has set cuts the log short.
            log = _lines(self._scratch / "operations")
            lines = [line for line in log if line.count("\t") == 5]
            operations = sorted(map(_operation, lines), key=lambda it: it.number)
            self._outcome = Outcome(
                self.pid,
                os.waitstatus_to_exitcode(status["status"]),
                (self._scratch / "stdout").read_text(),
                (self._scratch / "stderr").read_text(),
                operations,
            )
            shutil.rmtree(self._scratch)
            if status["late"]:
                raise TimeoutError(f"still running after {seconds} s: {self._outcome.stderr}")
        return self._outcome


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _operation(line: str) -> Operation:
    number, name, error, size, path, target = line.split("\t")
    return Operation(
        int(number), name, Path(path), int(size), Path(target) if target else None, int(error)
    )


class FaultyDisk:
    """Runs commands of the trainer while watching everything below a folder.

    Args:
        root: what is watched.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._runs: list[Running] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what is still running."""
        for run in self._runs:
            run.send_signal(signal.SIGKILL)
            run.wait()

    def run(
        self,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        program: str = "trainer.cli",
        seconds: float = SECONDS,
    ) -> Outcome:
        """Runs a command to its end: `run` of a module, usually that of `trainer`, with these."""
        started = self.start(arguments, fault, environment=environment, program=program)
        return started.wait(seconds)

    def start(
        self,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        program: str = "trainer.cli",
    ) -> Running:
        """Starts a command: what a process reads when it starts comes too late here.

        PYTHONHASHSEED, OMP_NUM_THREADS and the like stay those of the server.
        """
        scratch = Path(tempfile.mkdtemp(prefix="trainer-run-"))
        below = (fault.below or self.root) if fault else self.root
        case = {
            "program": program,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(environment or {}),
            "scratch": str(scratch),
            "arm": [
                *(str(self.root), str(scratch / "operations")),
                str(below.resolve()),
                int(SIGNALS.get(fault.kind, 0)) if fault else 0,
                ERRORS.get(fault.kind, 0) if fault else 0,
                fault.flags if fault else 0,
                fault.at if fault else 0,
            ],
        }
        server = _server()
        running = Running(server, server.ask(case=case)["pid"], scratch)
        self._runs.append(running)
        return running


def build_shim(folder: Path) -> Path:
    """Compiles the shim.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError(
            "the reliability tests need a C compiler named `cc`, such as: apt-get install gcc"
        )
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr}")
    return library


class _Server:
    """The process that forks, as seen from the tests."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="trainer-shim-"))
        paths = [
            str(HERE.parent.parent),
            str(HERE.parent),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        environment = os.environ | {
            "LD_PRELOAD": str(build_shim(self._folder)),
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        atexit.register(self.close)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Sends a question and waits for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the forking server ended with code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def _server() -> _Server:
    """The server of this test process, started for the first run."""
    return _Server()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _serve() -> None:
    """Answers questions until there are no more; whatever runs then is killed."""
    importlib.import_module("trainer.printing").hush_libraries()
    with importlib.import_module("trainer.collection").importing():
        _import_modules(["trainer.cli", "trainer.engine"])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    children: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        if "case" in question:
            pid = os.fork()
            if pid == 0:
                _be_the_run(question["case"])
            children.add(pid)
            answer = {"pid": pid}
        else:
            children.discard(question["wait"])
            answer = _wait(question["wait"], question["seconds"])
            # What one run imported, the next ones find imported.
            _import_modules(_lines(Path(question["scratch"], "modules")))
        replies.write(json.dumps(answer) + "\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(pid: int, seconds: float) -> dict[str, int]:
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"status": status, "late": 0}
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return {"status": os.waitpid(pid, 0)[1], "late": 1}
        time.sleep(0.005)


def _be_the_run(case: dict[str, Any]) -> None:
    """Becomes the run and ends with its exit code."""
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{case['scratch']}/stdout", os.O_WRONLY | os.O_CREAT),
        (2, f"{case['scratch']}/stderr", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    os.environ.update(case["environment"])
    os.environ.pop("LD_PRELOAD", None)
    sys.argv = ["trainer", *case["arguments"]]
    code = 1
    try:
        texts = (text.encode() for text in case["arm"][:3])
        if ctypes.CDLL(None).faulty_disk_arm(*texts, *map(ctypes.c_long, case["arm"][3:])):
            raise RuntimeError("the shim could not be armed")
        code = importlib.import_module(case["program"]).run(case["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A limit of file sizes that a test has set holds here too.
        with contextlib.suppress(OSError):
            Path(case["scratch"], "modules").write_text("\n".join(sys.modules))
        os._exit(code)


def _import_modules(names: Sequence[str]) -> None:
    """Imports what the runs will, without starting a thread."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


if __name__ == "__main__":
    _serve()
