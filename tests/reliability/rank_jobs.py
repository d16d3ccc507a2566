"""Trainings in two processes, started without a launcher, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HERE = Path(__file__).parent
# Until a process sees that another is gone, the main thread has had its grace, and slow machines.
AFTERWARDS = 40


@dataclass
class Job:
    """A training in two processes."""

    pids: list[int]
    folder: Path
    zygote: Zygote

    def at_step(self, step: int) -> None:
        """Waits until the log has this step."""
        log = self.folder / "events.jsonl"
        self.until(lambda: log.exists() and f'"step": {step},' in log.read_text(), 120)

    def stop_by_launcher(self, rank: int) -> None:
        """Asks a process to stop, as launchers do once another has died; it may be over already."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGTERM)

    def until(self, true: Callable[[], bool], seconds: float) -> float:
        """Waits, and says how long it took."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < seconds, self.said()
            time.sleep(0.05)
        return time.monotonic() - began

    def ended(self, seconds: float = 120) -> list[int]:
        """The exit codes of all, once they have ended."""
        self.until(lambda: all(pid in self.zygote.codes() for pid in self.pids), seconds)
        return [self.zygote.codes()[pid] for pid in self.pids]

    def result(self) -> dict[str, Any]:
        """How it ended, by its `result.json`."""
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return found

    def said(self, rank: int | None = None) -> str:
        """What the processes printed."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "\n".join(Path(f"{self.folder}.log.{r}").read_text() for r in ranks)


class Zygote:
    """The process that forks trainings, see `ranks.py`."""

    def __init__(self, cache: Path) -> None:
        self._stores: list[TCPStore] = []
        roots = (HERE.parent.parent, HERE.parent)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py")],
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, roots)),
                "XDG_CACHE_HOME": str(cache),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def codes(self) -> dict[int, int]:
        """The exit codes of all processes that have ended."""
        return {int(pid): code for pid, code in self._ask(do="ended").items()}

    def start(
        self,
        arguments: list[str],
        folder: Path,
        *,
        hooks: dict[int, str] | None = None,
        agent: bool = False,
        **environment: str,
    ) -> Job:
        """Starts a training in two processes.

        Args:
            hooks: Python that runs first in the process of a rank.
            agent: hold the processes' store here, as torchrun does; else the main process does.
        """
        if agent:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self._stores.append(store)
            port = store.port
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        else:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
        pids = self._ask(
            do="start",
            arguments=arguments,
            count=2,
            port=port,
            log=f"{folder}.log",
            hooks={str(rank): code for rank, code in (hooks or {}).items()},
            environment=environment,
        )
        return Job(pids, folder, self)

    def end(self) -> None:
        """Ends the process that forks."""
        self._process.communicate(timeout=20)

    def _ask(self, **wanted: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
