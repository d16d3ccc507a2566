"""A training with its network shut: what it still reaches, what not, and that it gets done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TWO_LAYERS

from trainer import seal
from trainer.cli import run
from trainer.job import RunFolder

# Reserved for documentation, RFC 5737 and RFC 3849: nobody answers there, sealed or not.
OUTSIDE = ("192.0.2.1", "2001:db8::1")

SEALED = """
import asyncio, errno, os, socket, tempfile
import huggingface_hub.constants as hub
from trainer.seal import seal
hub.HF_HUB_OFFLINE = False
seal()
seal()

def refused(what, *place):
    try:
        what(*place)
    except OSError as error:
        assert error.errno == errno.ENETUNREACH, error
        assert "--seal-network" in str(error), error
    else:
        raise AssertionError(place)

for address in %r:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as outside:
            refused(outside.connect, (address, 443))
            refused(outside.connect_ex, (address, 443))
    with socket.socket(family, socket.SOCK_DGRAM) as outside:
        refused(outside.sendto, b"x", (address, 53))
        refused(outside.sendmsg, [b"x"], [], 0, (address, 53))
    refused(socket.getnameinfo, (address, 53), 0)
refused(socket.create_connection, ("example.com", 443))
refused(socket.getaddrinfo, "example.com", 443)
refused(socket.getaddrinfo, b"example.com", 443)
refused(socket.gethostbyname, "example.com")
refused(socket.gethostbyname_ex, "example.com")
refused(socket.gethostbyaddr, "192.0.2.1")
refused(socket.getaddrinfo, "::ffff:192.0.2.1", 443)

with socket.create_server(("127.0.0.1", 0)) as server:
    for host in ("127.0.0.1", "localhost", "::ffff:127.0.0.1"):
        socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
    server.bind(folder + "/socket")
    server.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(folder + "/socket")
one, other = socket.socketpair()
one.sendmsg([b"x"])
assert other.recv(1) == b"x"
one.close()
other.close()
asyncio.run(asyncio.sleep(0))
assert hub.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
print("done")
"""


def test_a_sealed_process_reaches_this_machine_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEALED % (OUTSIDE,)], capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_training_is_sealed_once_before_its_first_step_and_gets_done(
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "model-url": sd15_folder,
        "images-data-url": photo_folder,
        "rank": 2,
        "max-train-steps": 1,
        "resolution-width": 64,
        "resolution-height": 64,
        "target-unet-modules": ",".join(TWO_LAYERS["target_unet_modules"]),
        "output": tmp_path / "run",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    # In place of the hook, which would stay with all other tests: what was said until then.
    said: list[str] = []
    events = tmp_path / "run" / "events.jsonl"
    monkeypatch.setattr(seal, "_shut", lambda: said.extend(events.read_text().splitlines()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    code = run(["train", *flags, "--seal-network", "--json"])

    assert (code, json.loads(capsys.readouterr().out)["status"]) == (0, "done")
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert kinds[len(said)] == "run"
    assert "stage" in kinds[: len(said)]


def test_a_sealed_training_that_is_to_send_its_curves_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    flags = ["--images-data-url", "photos", "--wandb", "--output", str(output)]

    assert run(["train", *flags, "--seal-network"]) == 2

    assert "error[input]: `--seal-network`: shuts out Weights" in capsys.readouterr().err
    assert not RunFolder(output).root.exists()
