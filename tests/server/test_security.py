"""The guard: who is let in, under which name, from which page; limits; and what gets out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from trainer.server.refusals import Refusal
from trainer.server.security import Guard, has_key
from trainer.server.settings import ServerSettings
from trainer.server.strict_json import MOST_OUTSIDE_TEXTS, parsed
from trainer.server.throttling import Rates

KEY = "key-id:0123456789abcdef"
WITH_KEY = {"authorization": f"Key {KEY}"}
JSON = {"content-type": "application/json"}
FILE = "/files/" + "0" * 32


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes


async def _handled(request: Request) -> Response:
    body = await request.body()
    if request.url.path == "/broken":
        raise KeyError("/home/owner/secret")
    return JSONResponse({"bytes": len(body), "has_key": has_key(request)})


def refused(path: str, refusal: Refusal) -> Response:
    """A protocol's answer, as far as the guard cares."""
    return JSONResponse({"path": path, "detail": refusal.message}, refusal.status)


async def _refused_inside(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(request.url.path, error)


def guarded(**given: Any) -> Starlette:
    """A guard before an application that takes everything."""
    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(
        routes=[Route("/{path:path}", _handled, methods=methods)],
        exception_handlers={Refusal: _refused_inside},
    )
    settings = ServerSettings(data=Path("unused"), **given)
    app.add_middleware(Guard, settings=settings, refused=refused)
    return app


def locked(**given: Any) -> Starlette:
    """A guard with a key."""
    return guarded(keys=[KEY, "another"], **given)


def ask(
    guard: Starlette,
    method: str = "GET",
    path: str = "/v1/my_finetunes",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    pieces: Sequence[bytes] = (b"",),
    *,
    client: str | None = "127.0.0.1",
    is_whole: bool = True,
    pause: float = 0.0,
) -> Answer:
    """Asks the guard as a server would.

    Args:
        headers: beside `Host`, unless that is among them.
        pieces: of the body.
        client: where the request comes from.
        is_whole: whether the last piece is the end of the body.
        pause: seconds before each piece.
    """
    named = list(headers.items() if isinstance(headers, Mapping) else headers)
    if "host" not in dict(named):
        named.append(("host", "localhost:8700"))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path.partition("?")[0],
        "raw_path": path.encode(),
        "query_string": path.partition("?")[2].encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in named],
        "client": client and (client, 40000),
        "server": ("192.168.1.7", 8700),
    }
    waiting = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) or not is_whole}
        for number, piece in enumerate(pieces, 1)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(60)
        await asyncio.sleep(pause)
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message.get("body", b"") for message in rest))


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Key {KEY}"},
        {"authorization": f"key  {KEY}"},
        {"authorization": f"Bearer {KEY}"},
        {"authorization": "BEARER another"},
        {"x-key": KEY},
        [("authorization", "Bearer wrong"), ("x-key", KEY)],
    ],
)
def test_a_key_is_taken_from_every_header_that_clients_use(headers: Any) -> None:
    answer = ask(locked(), headers=headers, client="203.0.113.9")

    assert answer.status == 200
    assert json.loads(answer.body)["has_key"] is True


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Key wrong"},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Key "},
        {"x-key": KEY[:-1]},
        {"x-key": "\xff\xfe"},
    ],
)
def test_without_a_right_key_nothing_is_asked_of_the_application(headers: Any) -> None:
    answer = ask(locked(), headers=headers)

    assert answer.status == 401
    assert "key" in json.loads(answer.body)["detail"]
    assert "wrong" not in str(answer)
    assert KEY[:-1] not in str(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/.well-known/jwks.json", 200),
        ("GET", f"{FILE}/lora.safetensors", 200),
        ("HEAD", "//files//x", 200),
        ("PUT", f"{FILE}?token=x", 200),
        ("POST", "/files/upload", 200),
        ("POST", "/storage/upload/x/complete", 200),
        ("POST", "/storage/auth/token", 401),
        ("POST", "/healthz", 401),
        ("DELETE", FILE, 401),
        ("PUT", "/api/fal/proxy", 401),
        ("PUT", "/fal-ai/x/requests/1/cancel", 401),
        ("POST", "/fal-ai/files/complete", 401),
        ("GET", "/v1/get_result", 401),
    ],
)
def test_only_what_is_public_or_has_a_token_of_its_own_needs_no_key(
    method: str, path: str, status: int
) -> None:
    answer = ask(locked(), method, path, client="203.0.113.9")

    assert answer.status == status
    if status == 200 and method != "HEAD":
        assert json.loads(answer.body)["has_key"] is False


def test_without_keys_this_machine_alone_is_served_whatever_key_it_gives() -> None:
    assert ask(guarded(), headers={"x-key": "any"}).status == 200
    assert ask(guarded(), client="::1").status == 200
    assert ask(guarded(), client=None).status == 200
    assert ask(guarded(), client="192.168.1.9").status == 401


def test_a_proxy_on_this_machine_does_not_make_its_clients_local() -> None:
    from_far = {"x-forwarded-for": "203.0.113.9, 127.0.0.1"}

    assert ask(guarded(), headers=from_far).status == 401
    assert ask(guarded(), headers={"x-forwarded-for": "127.0.0.1, ::1"}).status == 200
    assert ask(locked(), path="/metrics", headers=from_far).status == 401
    assert ask(locked(), path="/metrics").status == 200
    assert ask(locked(tls=True), path="/metrics").status == 401


# Host


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.:8700",
        "127.0.0.1:8700",
        "127.8.8.8",
        "[::1]:8700",
        "[0:0:0:0:0:0:0:1]",
        "192.168.1.7:8700",
        "trainer.example",
        "gpu.lan:80",
    ],
)
def test_names_that_the_owner_knows_are_let_in(host: str) -> None:
    guard = guarded(public_url="https://trainer.example", allowed_hosts=["gpu.lan"])

    assert ask(guard, headers={"host": host}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "192.168.1.8", "localhost.evil.example"])
def test_another_name_is_refused_and_told_how_to_be_let_in(host: str) -> None:
    answer = ask(locked(), headers={**WITH_KEY, "host": host})

    assert answer.status == 403
    assert "allowed_hosts" in json.loads(answer.body)["detail"]


def test_the_services_names_are_let_in_only_with_tls() -> None:
    named = {"host": "queue.fal.run"}

    assert ask(guarded(), headers=named).status == 403
    assert ask(guarded(tls=True), headers=named).status == 200


@pytest.mark.parametrize(
    "hosts", [[""], ["localhost", "localhost"], ["localhost, evil.example"], ["local host"]]
)
def test_a_request_must_name_one_host(hosts: list[str]) -> None:
    assert ask(guarded(), headers=[("host", host) for host in hosts]).status == 400


# Pages of others


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_foreign_page_cannot_write(method: str, headers: dict[str, str]) -> None:
    answer = ask(locked(), method, "/v1/finetune", {**WITH_KEY, **JSON, **headers})

    assert answer.status == 403
    assert "allowed_origins" in json.loads(answer.body)["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost:8700", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {},
    ],
)
def test_its_own_page_and_programs_may_write(headers: dict[str, str]) -> None:
    assert ask(guarded(), "POST", headers={**JSON, **headers}).status == 200


def test_a_foreign_page_may_be_led_here_and_reads_nothing() -> None:
    headers = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}

    answer = ask(guarded(), headers={**headers, "sec-fetch-mode": "navigate"})

    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_page_gets_exact_answers() -> None:
    guard = guarded(allowed_origins=["https://app.example"])
    page = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "x-key"}

    written = ask(guard, "POST", headers={**JSON, **page})
    asked = ask(guard, "OPTIONS", headers={**page, **asking})
    foreign = ask(guard, "OPTIONS", headers={"origin": "https://evil.example", **asking})

    assert (written.status, asked.status, foreign.status) == (200, 204, 403)
    for answer in (written, asked):
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["vary"] == "Origin"
    assert asked.headers["access-control-allow-headers"] == "x-key"
    assert "access-control-allow-origin" not in foreign.headers


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_that_any_page_could_send_is_refused_unless_a_key_comes_along(kind: str) -> None:
    headers = {"content-type": kind, "content-length": "2"}

    assert ask(guarded(), "POST", headers=headers, pieces=[b"{}"]).status == 400
    assert ask(guarded(), "POST", headers={**headers, "x-key": "k"}, pieces=[b"{}"]).status == 200
    assert ask(locked(), "POST", headers={**headers, **WITH_KEY}, pieces=[b"{}"]).status == 200


def test_json_and_nothing_at_all_are_taken() -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert ask(guarded(), "POST", headers={"content-type": kind}).status == 200
    assert ask(guarded(), "POST").status == 200
    assert ask(guarded(), "POST", headers={"content-length": "2"}, pieces=[b"{}"]).status == 400
    assert ask(guarded(), "PUT", "/fal-ai/x/requests/1/cancel").status == 200


# Limits


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [
        ("POST", "/v1/finetune", 2),
        ("POST", "/v3/training/subject", 1),
        ("POST", "/storage/auth/token", 1),
        ("DELETE", "/v1/finetune", 1),
        ("PUT", FILE, 3),
        ("POST", "/files/upload", 3),
    ],
)
def test_a_body_over_its_limit_is_refused_by_its_length_or_as_it_comes(
    method: str, path: str, most: int
) -> None:
    guard = locked(max_body_mib=2, max_upload_mib=3)
    whole, piece = most * 2**20, b"x" * 2**19

    declared = {**WITH_KEY, "content-length": str(whole + 1)}
    by_length = ask(guard, method, path, declared, [])
    as_it_comes = ask(guard, method, path, WITH_KEY, [piece] * (2 * most) + [b"x", b"never read"])
    fitting = ask(guard, method, path, WITH_KEY, [piece] * (2 * most))

    assert (by_length.status, as_it_comes.status, fitting.status) == (413, 413, 200)
    assert json.loads(fitting.body)["bytes"] == whole
    assert f"{most} MiB" in json.loads(by_length.body)["detail"]


def test_a_body_that_comes_too_slowly_is_cut_off() -> None:
    # It goes on after the first piece, and never comes.
    answer = ask(guarded(client_seconds=0.2), "POST", headers=JSON, pieces=[b"{"], is_whole=False)

    assert answer.status == 400
    assert "1000 bytes a second" in json.loads(answer.body)["detail"]


def test_a_slow_body_that_gives_enough_is_waited_for() -> None:
    guard = guarded(client_seconds=0.2)

    # Both take 0.6 s: one at 4000 bytes a second, one at 500.
    fast = ask(guard, "POST", headers=JSON, pieces=[b"x" * 200] * 12, pause=0.05)
    slow = ask(guard, "POST", headers=JSON, pieces=[b"x" * 25] * 12, pause=0.05)

    assert (fast.status, slow.status) == (200, 400)


def test_a_client_has_a_burst_and_then_its_rate() -> None:
    moment = [0.0]
    rates = Rates(2, clock=lambda: moment[0])

    def allowed(seconds: float, client: str = "a") -> int:
        """Requests taken at a moment, of twenty."""
        moment[0] = seconds
        taken = 0
        for _ in range(20):
            try:
                rates.take(client)
            except Refusal as refusal:
                assert refusal.reason == "too_many"
                assert refusal.headers["Retry-After"] == "1"
            else:
                taken += 1
        return taken

    # Four seconds' worth at once, then two in each second.
    assert [allowed(0), allowed(0, "b"), allowed(3), allowed(3.6), allowed(1000)] == [8, 8, 6, 1, 8]


def test_writes_are_counted_for_each_key_and_reads_are_not() -> None:
    guard = locked(requests_per_second=0.25)

    assert [ask(guard, "POST", headers=WITH_KEY).status for _ in range(2)] == [200, 429]
    assert ask(guard, "POST", headers={"x-key": "another"}).status == 200
    assert ask(guard, headers=WITH_KEY).status == 200


# JSON


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"a": tru}', "line 1, column 7"),
        (b'{"a": "secret', "no JSON"),
        (b'{"a": NaN}', "number"),
        (b'{"a": -Infinity}', "number"),
        (b'{"a": 1e999}', "number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "UTF-8"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "64 deep"),
        (b"[" * 1_000_000, "64 deep"),
        (b'{"a": [' + b"1," * 2**19 + b"1]}", "characters outside"),
    ],
)
def test_a_body_that_is_no_plain_json_object_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(Refusal) as refusal:
        parsed(body)

    assert refusal.value.reason == "malformed"
    assert says in refusal.value.message
    assert "secret" not in refusal.value.message


def test_plain_json_is_read() -> None:
    brackets = "[{" * MOST_OUTSIDE_TEXTS
    content = {"a": brackets, "\u00fc": [1.5, None, True], "q": 'say "[\\"', "smile": "\U0001f600"}

    assert parsed(json.dumps(content).encode()) == content
    assert parsed(json.dumps(content, ensure_ascii=False).encode()) == content
    assert parsed(b'{"a":' * 64 + b"1" + b"}" * 64)


# What gets out


def test_every_answer_tells_browsers_not_to_guess_or_keep_it() -> None:
    for answer in (ask(guarded()), ask(locked())):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_a_fault_tells_nothing_of_this_machine_and_is_found_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = ask(guarded(), path="/broken")

    assert answer.status == 500
    assert json.loads(answer.body)["path"] == "/broken"
    assert "secret" not in str(answer)
    id = answer.headers["x-request-id"]
    assert id in json.loads(answer.body)["detail"]
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert id in record.getMessage()
    assert "secret" in str(record.exc_info)


def test_the_log_has_a_line_for_every_request_and_no_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="trainer.server.access")
    id = "0123456789abcdef0123456789abcdef"

    ask(locked(), "POST", "/v1/finetune?token=secret", {**WITH_KEY, **JSON})
    ask(locked(), path=f"/files/{id}/a.png")
    ask(locked(), path="/fal-ai/x/requests/1/status?logs=1", headers=WITH_KEY)
    ask(locked(), path="/a\nb", headers={"x-key": "wrong"})

    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/finetune", 200),
        ("GET", "/files/01234567…/a.png", 200),
        ("GET", "/a\nb", 401),
    ]
    assert lines[0]["client"] == "127.0.0.1"
    assert lines[0]["ms"] >= 0
    assert KEY not in caplog.text
    assert "secret" not in caplog.text
    assert "\n" not in caplog.records[2].getMessage()


def test_no_token_in_a_path_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trainer.server.access")
    token = "t0ken-_" + "a" * 25

    ask(guarded(), "PUT", f"{FILE}/me.zip/multipart/{token}/1")
    ask(guarded(), "PUT", f"{FILE}/me.zip/multipart/short/1")
    ask(guarded(), "PUT", f"/storage/upload/{token}")

    paths = [json.loads(record.getMessage())["path"] for record in caplog.records]
    assert paths == [
        "/files/00000000…/me.zip/multipart/…/1",
        "/files/00000000…/me.zip/multipart/…/1",
        "/storage/upload/…",
    ]
