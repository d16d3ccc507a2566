"""How long a submission takes while many come: `python scripts/bench_server.py`.

Starts a server on this machine whose jobs do nothing, sends it training requests at a fixed rate,
whether earlier ones are answered or not, and prints the latencies as JSON: from the moment at
which a request was due until its answer is read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2

APP = "fal-ai/personalization"
# A picture of one pixel, in place of an archive: what is measured is the queue.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLv"
    "AAAAAElFTkSuQmCC"
)
NOTHING = f"{sys.executable} -c 'import time; time.sleep(3600)'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (url, startup):
        latencies = asyncio.run(submitted(url, options.rate, options.seconds))
    latencies.sort()
    found = {
        "requests": len(latencies),
        "rate_per_second": options.rate,
        "startup_s": round(startup, 2),
        "median_ms": milliseconds(latencies, 0.5),
        "p90_ms": milliseconds(latencies, 0.9),
        "p99_ms": milliseconds(latencies, 0.99),
        "largest_ms": milliseconds(latencies, 1.0),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(found, indent=2))


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, float]]:
    """A server until the block ends: its address, and the seconds until it answered."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trainer", "serve", "--data", str(folder), "--port", str(port)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--gpus", "cpu", "--max-queued", "1000000", "--grace-seconds", "1"],
        env={**os.environ, "TRAINER_JOB_COMMAND": NOTHING},
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            time.sleep(0.02)
        yield url, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


async def submitted(url: str, rate: float, seconds: float) -> list[float]:
    """The seconds that each of the submissions took."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        payload = {"images_data_url": PICTURE, "photo_class": "Man"}
        # The first requests pay for imports and tables.
        for _ in range(20):
            (await client.post(f"/{APP}", json=payload)).raise_for_status()
        began = time.perf_counter()

        async def submit(number: int) -> float:
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            (await client.post(f"/{APP}", json={**payload, "seed": number})).raise_for_status()
            return time.perf_counter() - due

        return await asyncio.gather(*map(submit, range(int(rate * seconds))))


def milliseconds(latencies: list[float], share: float) -> float:
    place = min(len(latencies) - 1, int(share * len(latencies)))
    return round(latencies[place] * 1000, 1)


if __name__ == "__main__":
    main()
