"""Webhooks: sent until taken, signed so that their receivers can tell, and to public hosts only."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from trainer import fetch
from trainer.errors import InputError
from trainer.network import AddressForbidden, AddressRefused
from trainer.server.database import Database
from trainer.server.fal.signing import signature
from trainer.server.queue import SCHEMA, Job, NewJob, Queue
from trainer.server.refusals import Refusal
from trainer.server.signing import KEY_NAME, sign_with_secret, webhook_key
from trainer.server.webhooks import MOST_TRIES, WAITS, Outbox, checked_webhook

MESSAGE = {"status": "OK"}
Post = Callable[[str, bytes, Mapping[str, str]], int]


class Receiver(ThreadingHTTPServer):
    """A receiver on a free port of 127.0.0.1, which answers with the statuses it is given."""

    daemon_threads = True

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), _Receiving)

    def handle_error(self, *_: object) -> None:
        """Nothing: clients that hang up are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?to=me"


class _Receiving(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:  # noqa: N802 - named by the base class
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append((self.path, headers, body))
        status = self.server.statuses.pop(0) if self.server.statuses else 204
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: a test says what it saw."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "127.0.0.1")
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class House:
    """A queue with its outbox, and a protocol that says and signs little."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "server.sqlite3", SCHEMA)
        self.queue = Queue(self.database)
        self.message: Mapping[str, Any] = MESSAGE

    def ended(self, url: str) -> Job:
        """A job with a webhook that is over."""
        asked = NewJob("any", "app", "training", {}, "", webhook={"url": url})
        job = self.queue.submit(asked)
        self.queue.start(job)
        self.queue.settle(job, "done")
        return job

    def announced(self, job: Job, _: object) -> Mapping[str, Any]:
        return self.message

    def signed(self, job: Job, body: bytes, _: object) -> Mapping[str, str]:
        return {"X-Signed": f"{job.id} {len(body)}"}

    def outbox(self, send: Post = fetch.post, *, waits: tuple[float, ...] = (0.0,) * 9) -> Outbox:
        workshop = cast(Any, SimpleNamespace(queue=self.queue))
        return Outbox(
            self.database,
            workshop,
            protocol=lambda name: cast(Any, self),
            send=send,
            waits=waits,
        )

    def states(self) -> list[tuple[str, int]]:
        """How each message stands, and its tries."""
        rows = self.database.rows("SELECT state, tries FROM outbox ORDER BY rowid")
        return [(row["state"], row["tries"]) for row in rows]

    def run(self, outbox: Outbox, *, until: Callable[[], bool] | None = None) -> None:
        """Lets an outbox work until nothing waits, or something else is so."""
        reached = until or (lambda: all(state != "waiting" for state, _ in self.states()))

        async def work() -> None:
            running = asyncio.create_task(outbox.run())
            async with asyncio.timeout(10):
                while not reached():
                    await asyncio.sleep(0.01)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

        asyncio.run(work())


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr("trainer.server.webhooks._LOOK_SECONDS", 0.01)
    return House(tmp_path)


# Sending


def test_the_end_of_a_job_is_told_once_with_the_protocols_words_and_signature(
    house: House, receiver: Receiver
) -> None:
    job = house.ended(receiver.url)

    house.run(house.outbox())
    house.run(house.outbox())

    ((path, headers, body),) = receiver.received
    assert path == "/hook?to=me"
    assert json.loads(body) == MESSAGE
    assert headers["x-signed"] == f"{job.id} {len(body)}"
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers
    assert house.states() == [("delivered", 1)]


def test_a_receiver_that_fails_or_leads_elsewhere_is_asked_again(
    house: House, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302, 404]
    house.ended(receiver.url)

    house.run(house.outbox())

    assert house.states() == [("delivered", 4)]
    assert {path for path, *_ in receiver.received} == {"/hook?to=me"}


def test_after_ten_tries_within_two_hours_a_message_is_given_up(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str] = []

    def dead(url: str, body: bytes, headers: Mapping[str, str]) -> int:
        tried.append(url)
        raise AddressRefused("nobody answers", "wait")

    house.ended("https://dead.example/x?key=secret")
    house.run(house.outbox(dead))

    # The numbers of fal's and BFL's descriptions of their webhooks.
    assert (MOST_TRIES, WAITS[:3]) == (10, (1, 5, 30))
    assert sum(WAITS) <= 7200
    assert len(tried) == 10
    assert house.states() == [("given_up", 10)]
    assert "given up" in caplog.text
    assert "secret" not in caplog.text


def test_the_next_try_waits_as_long_as_promised_also_over_a_restart(
    house: House, receiver: Receiver
) -> None:
    receiver.statuses = [500]
    house.ended(receiver.url)

    house.run(house.outbox(waits=(0.4,)), until=lambda: house.states() == [("waiting", 1)])
    began = time.monotonic()
    house.run(house.outbox(waits=(0.4,)))

    assert time.monotonic() - began > 0.2
    assert house.states() == [("delivered", 2)]


def test_a_server_that_ended_in_the_last_try_does_not_begin_another(house: House) -> None:
    house.ended("https://a.example/")
    with house.database.transaction() as connection:
        connection.execute("UPDATE outbox SET tries = 10")

    house.run(house.outbox(lambda *_: 200))

    assert house.states() == [("given_up", 10)]


def test_a_dead_receiver_holds_up_no_other(house: House) -> None:
    release = threading.Event()
    told: list[str] = []

    def send(url: str, body: bytes, headers: Mapping[str, str]) -> int:
        if "dead" in url:
            release.wait(10)
            return 500
        told.append(url)
        return 200

    for _ in range(20):
        house.ended("https://dead.example/x")
    for number in range(20):
        house.ended(f"https://alive.example/{number}")

    house.run(house.outbox(send), until=lambda: len(told) == 20)
    release.set()

    assert len(set(told)) == 20


def test_a_private_receiver_is_not_asked_and_given_up_at_once(
    house: House,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("TRAINER_ALLOWED_HOSTS")
    house.ended(receiver.url)

    house.run(house.outbox())

    assert receiver.received == []
    assert house.states() == [("given_up", 1)]
    assert "TRAINER_ALLOWED_HOSTS" in caplog.text


def test_a_message_that_is_too_long_is_not_sent(house: House, receiver: Receiver) -> None:
    house.message = {"text": "x" * 2**20}
    house.ended(receiver.url)

    house.run(house.outbox())

    assert (receiver.received, house.states()) == ([], [("given_up", 1)])


def test_a_receiver_that_takes_a_message_slowly_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "localhost")
    monkeypatch.setattr(fetch, "POST_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://localhost:{silent.getsockname()[1]}/"
        began = time.monotonic()

        with pytest.raises(AddressRefused, match="does not answer") as refused:
            fetch.post(url, b"x" * 2**24, {})

    assert not isinstance(refused.value, AddressForbidden)
    assert time.monotonic() - began < 5


# Addresses


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://a.example/x", "no web address"),
        ("file:///etc/passwd", "no web address"),
        ("/hook", "no web address"),
        ("http://", "no web address"),
        ("http://[::1/x", "no valid address"),
        ("https://user:word@a.example/x", "user name or password"),
        ("http://127.0.0.1:3000/x", "not on the public internet"),
        ("http://[::ffff:10.0.0.1]/x", "not on the public internet"),
        ("http://LOCALHOST./x", "not on the public internet"),
        ("http://app.localhost/x", "not on the public internet"),
        ("https://a.example/" + "x" * 2000, "longer than 2000"),
    ],
)
def test_an_address_that_cannot_be_told_is_refused_at_once(url: str, says: str) -> None:
    with pytest.raises(Refusal, match=says) as refusal:
        checked_webhook(url, "webhook_url")

    (problem,) = refusal.value.problems
    assert problem.field == "webhook_url"
    assert "word@" not in problem.message


def test_public_addresses_and_those_that_the_owner_allows_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "localhost,10.0.0.1")

    for url in ("https://a.example/x?y=z", "http://localhost:3000/x", "http://10.0.0.1/"):
        assert checked_webhook(url, "webhook_url") == url


# Signatures


def verified(jwks: Mapping[str, Any], headers: Mapping[str, str], body: bytes) -> bool:
    """A receiver's check, from the description on https://docs.fal.ai/model-endpoints/webhooks."""
    names = ("request-id", "user-id", "timestamp", "signature")
    id, user, moment, signature = (headers[f"x-fal-webhook-{name}"] for name in names)
    if abs(time.time() - int(moment)) > 300:
        return False
    message = f"{id}\n{user}\n{moment}\n{hashlib.sha256(body).hexdigest()}".encode()
    for key in jwks["keys"]:
        public = base64.urlsafe_b64decode(key["x"] + "=" * (-len(key["x"]) % 4))
        with suppress(InvalidSignature):
            Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), message)
            return True
    return False


def test_a_receiver_verifies_the_signature_with_the_public_key_alone(tmp_path: Path) -> None:
    key = webhook_key(tmp_path)
    body = b'{"status":"OK"}'
    now = int(time.time())
    signed = {n.lower(): v for n, v in signature(key, "id-1", "owner", now, body).items()}
    stale = {n.lower(): v for n, v in signature(key, "id-1", "owner", now - 301, body).items()}
    jwks = json.loads(json.dumps(key.jwks()))

    assert verified(jwks, signed, body)
    assert not verified(jwks, signed, body + b" ")
    assert not verified(jwks, {**signed, "x-fal-webhook-request-id": "id-2"}, body)
    assert not verified(jwks, stale, body)
    assert {jwks["keys"][0][name] for name in ("kty", "crv")} == {"OKP", "Ed25519"}
    assert "d" not in jwks["keys"][0]


def test_the_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    first = webhook_key(tmp_path).jwks()
    webhook_key.cache_clear()

    assert webhook_key(tmp_path).jwks() == first
    assert os.stat(tmp_path / KEY_NAME).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [KEY_NAME]


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    (tmp_path / KEY_NAME).write_text("-----BEGIN PRIVATE KEY-----\n")

    with pytest.raises(InputError, match="holds no Ed25519 key"):
        webhook_key(tmp_path)


def test_a_signature_with_a_secret_is_the_one_of_the_standard() -> None:
    # RFC 4231, test case 2.
    signed = sign_with_secret("X-BFL-Signature", "Jefe", b"what do ya want for nothing?")

    assert signed == {
        "X-BFL-Signature": "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    }
