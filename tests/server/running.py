"""Servers for tests as programs of their own."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from starlette.testclient import TestClient

from trainer.server.room import Room

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake_job.py"
WARM = Path(__file__).parent / "warm_job.py"


def fake_jobs_environment() -> dict[str, str]:
    """The variables with which a server's jobs are fake: no model, no torch."""
    return {
        "TRAINER_JOB_COMMAND": shlex.join([sys.executable, str(FAKE), "{config}", "{output}"]),
        "TRAINER_GENERATION_COMMAND": shlex.join([sys.executable, str(FAKE), "--stdin"]),
        "TRAINER_PREPARATION_COMMAND": shlex.join(
            [sys.executable, str(FAKE), "--prepare", "{output}"]
        ),
    }


@dataclass
class RunningServer:
    """A server that runs as a program of its own.

    Args:
        url: under which it is reached.
        data: its folder.
        process: it.
        proxy: of unmodified clients, with https.
    """

    url: str
    data: Path
    process: subprocess.Popen[bytes]
    proxy: str = ""


def free_port() -> int:
    """A port that nobody listens at."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def warm_jobs(folder: Path) -> Iterator[dict[str, str]]:
    """The variables with which a server's jobs import nothing anew, as long as the block lasts."""
    place = str(folder / "warm")
    code = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, str(WARM), "serve", place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ask = shlex.join([sys.executable, "-S", str(WARM), place])
        yield {
            "TRAINER_JOB_COMMAND": f"{ask} train {{config}} --output {{output}} --seal-network",
            "TRAINER_GENERATION_COMMAND": f"{ask} generate --stdin",
            "TRAINER_PREPARATION_COMMAND": f"{ask} prepare {{config}} --output {{output}} "
            "--with-result",
            "OMP_NUM_THREADS": "1",
        }


@contextmanager
def running_server(
    data: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    graceful: bool = True,
) -> Iterator[RunningServer]:
    """`trainer serve` on loopback until the block ends.

    Args:
        graceful: whether it is told to end then; else the block has killed it.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "trainer", "serve", "--data", str(data), "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options], env={**os.environ, **(environment or {})}, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), process=process)
        yield RunningServer(url, data, process)
    finally:
        if graceful:
            process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Whether a server answers at this address."""
    try:
        return httpx2.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def settled_room(client: TestClient) -> Room:
    """The room of a server in this process, once it has been measured: not again for a minute."""
    room: Room = client.app.state.workshop.room
    wait_for(lambda: room.used > 0)
    return room


def wait_for(
    true: Callable[[], bool],
    *,
    seconds: float = 60,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come about"
        assert process is None or process.poll() is None, "the server has ended"
        time.sleep(0.05)
