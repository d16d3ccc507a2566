"""A server that is killed under load: what it acknowledged is done, and done once."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from running import answers, free_port, running_server, wait_for

FAKE = Path(__file__).parent / "fake_job.py"
APP = "fal-ai/personalization"
PAYLOAD = {"images_data_url": "https://photos.example/a.zip", "photo_class": "Man"}
SUBMISSIONS = 200
KILLS = 3


def environment(tmp_path: Path, seconds: float) -> dict[str, str]:
    return {
        "TRAINER_JOB_COMMAND": f"{sys.executable} -S {FAKE} {{config}} {{output}}",
        "FAKE_LOG": str(tmp_path / "starts"),
        "FAKE_ENDS": str(tmp_path / "ends"),
        "FAKE_SECONDS": str(seconds),
    }


def slots(count: int) -> list[str]:
    return [word for number in range(count) for word in ("--gpus", str(number))]


async def submit_all(url: str, numbers: range) -> dict[int, str]:
    """Submission to the id of its job, for those that were acknowledged."""
    limits = httpx2.Limits(max_connections=100)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def submit(number: int) -> tuple[int, str] | None:
            headers = {"Idempotency-Key": f"submission {number}"}
            try:
                answer = await client.post(
                    f"/{APP}", json={**PAYLOAD, "seed": number}, headers=headers
                )
            except httpx2.HTTPError:
                return None
            return (number, answer.json()["request_id"]) if answer.status_code == 200 else None

        done = await asyncio.gather(*map(submit, numbers))
    return dict(pair for pair in done if pair is not None)


@pytest.mark.thorough
def test_no_acknowledged_job_is_lost_or_done_twice_across_kills(tmp_path: Path) -> None:
    port, acknowledged = free_port(), dict[int, str]()
    draw = random.Random(6)
    given = environment(tmp_path, 0.05)
    for _ in range(KILLS):
        with running_server(
            tmp_path / "data", *slots(4), environment=given, port=port, graceful=False
        ) as server:
            # In the midst of submissions and of jobs that begin and end.
            killing = threading.Timer(draw.uniform(0.3, 1.0), server.process.kill)
            killing.start()
            acknowledged |= asyncio.run(submit_all(server.url, range(SUBMISSIONS)))
            server.process.wait()
    with running_server(tmp_path / "data", *slots(4), environment=given, port=port) as server:
        # Those that nobody acknowledged are sent again, under the same keys.
        acknowledged |= asyncio.run(submit_all(server.url, range(SUBMISSIONS)))
        ids = list(acknowledged.values())
        assert len(set(ids)) == SUBMISSIONS

        def states() -> Counter[str]:
            text = httpx2.get(f"{server.url}/metrics").text
            counted = [line for line in text.splitlines() if line.startswith("trainer_jobs{")]
            return Counter({line.split('"')[1]: int(line.split()[-1]) for line in counted})

        wait_for(lambda: states()["queued"] + states()["running"] == 0, seconds=120)

        assert +states() == Counter({"done": SUBMISSIONS})
    ends = Counter((tmp_path / "ends").read_text().split())
    assert set(ends) == set(ids), "each was done"
    assert set(ends.values()) == {1}, "and none twice"


def test_two_hundred_submissions_at_once_are_all_taken(tmp_path: Path) -> None:
    with running_server(
        tmp_path / "data", "--gpus", "0", environment=environment(tmp_path, 60)
    ) as server:
        acknowledged = asyncio.run(submit_all(server.url, range(200)))

    assert len(set(acknowledged.values())) == 200


def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        code, said = refused(tmp_path / "data")
        assert answers(server.url)

    assert code == 2
    assert "another server is running" in said


def refused(data: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "trainer", "serve", "--data", str(data)]
    done = subprocess.run(
        [*command, "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_server_that_is_told_to_end_interrupts_its_jobs_and_takes_them_up_again(
    tmp_path: Path,
) -> None:
    slow, quick = environment(tmp_path, 60), environment(tmp_path, 0)
    with running_server(tmp_path / "data", environment=slow) as server:
        answer = httpx2.post(f"{server.url}/{APP}", json=PAYLOAD).json()
        wait_for((tmp_path / "starts").exists)

    with running_server(tmp_path / "data", environment=quick) as server:
        status = f"{server.url}/{APP}/requests/{answer['request_id']}/status"
        wait_for(lambda: httpx2.get(status).json()["status"] == "COMPLETED")

        assert "error" not in httpx2.get(status).json()
    assert len((tmp_path / "starts").read_text().split()) == 2


SLOW = {
    "head": b"POST /fal-ai/personalization HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "body": b"POST /fal-ai/personalization HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
}


def test_clients_that_do_not_get_on_are_cut_off_and_others_served(tmp_path: Path) -> None:
    with running_server(tmp_path / "data", "--client-seconds", "1.5") as server:
        port = int(server.url.rpartition(":")[2])
        slow = []
        for number in range(40):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(list(SLOW.values())[number % 2])
            slow.append(client)
        try:
            assert answers(server.url)
            wait_for(lambda: all(is_closed(client) for client in slow), seconds=20)
        finally:
            for client in slow:
                client.close()


def is_closed(client: socket.socket) -> bool:
    """Sends a byte now and then, as a slow client does, and looks whether it is listened to."""
    try:
        client.sendall(b"x")
        client.settimeout(0.01)
        return client.recv(65536) == b"" or is_closed(client)
    except TimeoutError:
        return False
    except OSError:
        return True
