"""Downloading from real servers on this machine, and refusing what is not public."""

from __future__ import annotations

import io
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import httpcore2
import pytest

from trainer import fetch
from trainer.errors import DiskError, InputError
from trainer.fetch import download
from trainer.network import PinnedBackend, is_public, shown_url

PUBLIC = "93.184.215.14"
LIMIT = 2**30
FIELD = "images_data_url"
CONTENT = bytes(range(256)) * 8192


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: `/status/404`, `/redirect/3`, anything else with the content."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:  # noqa: N802 - named by the base class
        self.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        kind, _, value = self.path.removesuffix("?key=secret").lstrip("/").partition("/")
        {
            "status": self.status,
            "redirect": self.redirect,
            "announced": self.announced,
            "cut": self.cut,
            "chunked": self.chunked,
            "silent": self.silent,
            "length": self.length,
            "raw": self.raw,
            "trickle": self.trickle,
            "moved": self.moved,
        }.get(kind, self.content)(value)

    def log_message(self, *_: object) -> None:
        """Nothing: a test says what it saw."""

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def content(self, _: str) -> None:
        self.answer(200, {"Content-Length": str(len(CONTENT))}, CONTENT)

    def status(self, value: str) -> None:
        self.answer(int(value), {"Content-Length": "0"})

    def redirect(self, value: str) -> None:
        """`/redirect/3` leads to `/redirect/2`; `/redirect/to?ADDRESS` leads there."""
        left, _, place = unquote(value).partition("?")
        if left != "to":
            place = f"/redirect/{int(left) - 1}" if int(left) > 1 else "/file?key=secret"
        self.answer(302, {"Location": place, "Content-Length": "5", "Set-Cookie": "a=b"}, b"moved")

    def announced(self, value: str) -> None:
        self.answer(200, {"Content-Length": value})
        self.close_connection = True

    def cut(self, value: str) -> None:
        self.answer(200, {"Content-Length": str(len(CONTENT))}, CONTENT[: int(value)])
        self.close_connection = True

    def chunked(self, value: str) -> None:
        """The content without its length; `/chunked/cut` breaks off."""
        body = b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT)
        end = b"" if value == "cut" else b"0\r\n\r\n"
        self.answer(200, {"Transfer-Encoding": "chunked"}, body + end)
        self.close_connection = True

    def silent(self, _: str) -> None:
        self.server.stopped.wait()
        self.close_connection = True

    def length(self, value: str) -> None:
        self.answer(200, {"Content-Length": value}, b"abc")
        self.close_connection = True

    def raw(self, _: str) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        self.close_connection = True

    def trickle(self, what: str) -> None:
        """`/trickle/head` never comes to its content, `/trickle/body` not to its end."""
        if what == "body":
            self.answer(200, {"Content-Length": str(len(CONTENT))})
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        line = b"X-More: to come\r\n"
        while not self.server.stopped.wait(0.02):
            self.wfile.write(line)

    def moved(self, encoding: str) -> None:
        """Leads to `/grün.zip`, not quoted as it should be."""
        place = "/gr\u00fcn.zip".encode(encoding)
        self.wfile.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % place)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    """A web server on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), type("Seeing", (Handler,), {"seen": self.requests}))

    def handle_error(self, *_: object) -> None:
        """Nothing: clients that hang up are what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the owner of the machine allows."""
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "127.0.0.1")
    with serving(Server()) as running:
        yield running


class Recorder(httpcore2.NetworkBackend):
    """Notes where a connection would go, and what TLS would verify, and refuses it."""

    def __init__(self, answers: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self.hostnames: list[str | None] = []
        self._answers = answers

    def connect_tcp(self, host: str, *_: object) -> httpcore2.NetworkStream:
        self.asked.append(host)
        if host in self._answers:
            return RecordedStream(self.hostnames)
        raise httpcore2.ConnectError("refused")


class RecordedStream(httpcore2.NetworkStream):
    """A connection on which TLS fails after its host name is noted."""

    def __init__(self, hostnames: list[str | None]) -> None:
        self._hostnames = hostnames

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float = 0
    ) -> httpcore2.NetworkStream:
        assert ssl_context.check_hostname
        self._hostnames.append(server_hostname)
        raise httpcore2.ConnectError("no TLS here")


def content_at(url: str, limit: int = LIMIT, **options: object) -> bytes:
    target = io.BytesIO()
    for _ in download(url, FIELD, target, limit=limit, **options):
        pass
    return target.getvalue()


def refusal(url: str, limit: int = LIMIT, **options: object) -> str:
    with pytest.raises(InputError) as error:
        content_at(url, limit, **options)
    assert {problem.field for problem in error.value.problems} == {FIELD}
    assert all(problem.hint for problem in error.value.problems)
    return str(error.value)


def resolving(*answers: list[str], inner: httpcore2.NetworkBackend | None = None) -> PinnedBackend:
    """A backend whose resolver answers these in turn."""
    left = list(answers)
    return PinnedBackend(lambda host, port: left.pop(0), inner or Recorder())


def test_the_content_of_an_address_is_written_as_it_is(server: Server) -> None:
    assert content_at(f"{server.url}/set.zip") == CONTENT


def test_progress_grows_by_about_a_mebibyte_up_to_the_announced_total(server: Server) -> None:
    steps = list(download(f"{server.url}/set.zip", FIELD, io.BytesIO(), limit=LIMIT))

    done = [bytes_done for bytes_done, _ in steps]
    assert {total for _, total in steps} == {len(CONTENT)}
    assert done == sorted(set(done))
    assert done[0] == 0
    assert done[-1] == len(CONTENT) == 2 * 2**20
    assert len(steps) <= 4


def test_an_unknown_total_is_nothing(server: Server) -> None:
    steps = list(download(f"{server.url}/chunked/", FIELD, io.BytesIO(), limit=LIMIT))

    assert {total for _, total in steps} == {None}
    assert steps[-1] == (len(CONTENT), None)


def test_no_packed_transfer_is_asked_for_and_no_credentials_are_sent(server: Server) -> None:
    content_at(f"{server.url}/set.zip")

    ((_, headers),) = server.requests
    assert headers["accept-encoding"] == "identity"
    assert not {"authorization", "cookie", "proxy-authorization"} & set(headers)


def test_proxies_of_the_environment_are_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert content_at(f"{server.url}/set.zip") == CONTENT


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "refuses access (HTTP 401)"),
        (403, "refuses access (HTTP 403)"),
        (404, "nothing at this address (HTTP 404)"),
        (410, "any more (HTTP 410)"),
        (429, "too many requests (HTTP 429)"),
        (503, "cannot give it now (HTTP 503)"),
        (204, "gives no file (HTTP 204)"),
        (304, "gives no file (HTTP 304)"),
        (302, "gives no file (HTTP 302)"),
    ],
)
def test_a_status_other_than_200_is_refused_by_its_number(
    server: Server, status: int, says: str
) -> None:
    assert says in refusal(f"{server.url}/status/{status}")


def test_five_redirects_are_followed_and_six_are_not(server: Server) -> None:
    assert content_at(f"{server.url}/redirect/5") == CONTENT
    assert "redirects more than 5 times" in refusal(f"{server.url}/redirect/6")


def test_a_redirect_carries_no_cookie_over(server: Server) -> None:
    content_at(f"{server.url}/redirect/2")

    assert [path for path, _ in server.requests] == [
        "/redirect/2",
        "/redirect/1",
        "/file?key=secret",
    ]
    assert not any({"cookie", "authorization", "referer"} & set(h) for _, h in server.requests)


@pytest.mark.parametrize(
    "place", ["http://127.0.0.2/x.zip", "http://169.254.169.254/latest/meta-data/", "//10.0.0.1/x"]
)
def test_a_redirect_from_an_allowed_host_to_a_private_one_is_refused(
    server: Server, place: str
) -> None:
    assert "is not on the public internet" in refusal(f"{server.url}/redirect/to?{place}")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file:///etc/passwd", "redirects to `file:///etc/passwd`: it is no web address"),
        ("ftp://example.com/x.zip", "it is no web address"),
        ("http://user:word@example.com/x.zip", "user name or password"),
        ("http://example.com:port/x.zip", "no valid address"),
    ],
)
def test_a_redirect_is_checked_like_the_first_address(
    server: Server, place: str, says: str
) -> None:
    message = refusal(f"{server.url}/redirect/to?{place}")

    assert says in message
    assert "word@" not in message


def test_a_content_announced_too_large_is_refused_before_it_comes(server: Server) -> None:
    assert "larger than 4 GiB" in refusal(f"{server.url}/announced/{2**33}", limit=2**32)


def test_a_content_of_unannounced_size_is_counted(server: Server) -> None:
    target = io.BytesIO()

    with pytest.raises(InputError, match="larger than 1 MiB"):
        list(download(f"{server.url}/chunked/", FIELD, target, limit=2**20))

    assert len(target.getvalue()) <= 2**20


def test_a_content_that_breaks_off_is_told_with_what_came(server: Server) -> None:
    message = refusal(f"{server.url}/cut/524288?key=secret")

    assert "the download stopped after 0.5 of 2.1 MB" in message
    assert "secret" not in message


def test_a_content_of_unknown_size_that_breaks_off_is_told(server: Server) -> None:
    assert "the download stopped after 2.1 MB" in refusal(f"{server.url}/chunked/cut")


def test_a_server_that_says_nothing_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "READ_SECONDS", 0.2)

    assert "does not answer" in refusal(f"{server.url}/silent")


@pytest.mark.parametrize(
    ("what", "says"),
    [("head", "does not answer"), ("body", "the download stopped after")],
)
def test_a_server_that_trickles_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch, what: str, says: str
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(fetch, "LEAST_BYTES_PER_SECOND", 10_000)
    began = time.monotonic()

    message = refusal(f"{server.url}/trickle/{what}")

    assert says in message
    assert time.monotonic() - began < 10


def test_a_slow_server_that_gives_enough_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(fetch, "LEAST_BYTES_PER_SECOND", 20)
    began = time.monotonic()
    fetching = download(f"{server.url}/trickle/body", FIELD, io.BytesIO(), limit=LIMIT)

    # It gives 800 bytes a second.
    for _ in fetching:
        if time.monotonic() - began > 1:
            break

    fetching.close()


def test_time_that_is_not_spent_on_the_server_does_not_count(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(fetch, "LEAST_BYTES_PER_SECOND", 2**40)
    target = io.BytesIO()

    for done, _ in download(f"{server.url}/set.zip", FIELD, target, limit=LIMIT):
        time.sleep(0.6 if done == 0 else 0)

    assert target.getvalue() == CONTENT


@pytest.mark.parametrize(("encoding", "path"), [("utf-8", "%C3%BC"), ("latin-1", "%C3%BC")])
def test_a_redirect_to_an_address_that_is_not_quoted_is_followed(
    server: Server, encoding: str, path: str
) -> None:
    assert content_at(f"{server.url}/moved/{encoding}") == CONTENT
    assert server.requests[-1][0] == f"/gr{path}n.zip"


@pytest.mark.parametrize("length", ["many", "-5", "9" * 5000])
def test_a_length_that_is_none_is_refused(server: Server, length: str) -> None:
    refusal(f"{server.url}/length/{length}")


def test_what_is_no_web_server_is_refused(server: Server) -> None:
    assert "does not answer as a web server does" in refusal(f"{server.url}/raw")


def test_a_closed_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    assert "no connection to `127.0.0.1`" in refusal(f"http://127.0.0.1:{port}/x")


def test_a_host_that_does_not_exist_is_told() -> None:
    def nowhere(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    message = refusal("https://nowhere.example/x", backend=PinnedBackend(nowhere, Recorder()))

    assert "there is no host `nowhere.example`" in message


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x.zip",
        "file:///etc/passwd",
        "http:///x.zip",
        "http://",
        "https:example.com",
        "http://exa mple.com/\n",
        "http://[::1/x",
        "http://example.com:99999999/x",
        "http://\ud800.com/x",
        "http://" + "a" * 70_000,
    ],
)
def test_an_address_that_is_none_is_refused_before_any_connection(url: str) -> None:
    recorder = Recorder()

    refusal(url, backend=resolving([PUBLIC], inner=recorder))

    assert recorder.asked == []


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    message = refusal("https://user:passw0rd@example.com/x.zip", backend=resolving([PUBLIC]))

    assert "user name or password" in message
    assert "passw0rd" not in message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
        ("198.51.100.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:5db8:d70e::", False),
        ("2001:0:5ef5:79fd:0:0:0:1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_host_name_with_a_private_address_is_refused() -> None:
    recorder = Recorder()

    message = refusal("http://inside.example/x", backend=resolving(["10.0.0.1"], inner=recorder))

    assert "`inside.example` is not on the public internet" in message
    assert "TRAINER_ALLOWED_HOSTS" in message
    assert "10.0.0.1" not in message
    assert recorder.asked == []


def test_a_host_name_with_one_private_address_among_public_ones_is_refused() -> None:
    recorder = Recorder()

    refusal("http://mixed.example/x", backend=resolving([PUBLIC, "10.0.0.1"], inner=recorder))

    assert recorder.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "[::1]"])
def test_other_spellings_of_this_machine_are_refused(host: str) -> None:
    recorder = Recorder()

    refusal(f"http://{host}/x", backend=PinnedBackend(inner=recorder))

    assert recorder.asked == []


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    # A name server that turns the name over after the check.
    recorder = Recorder()
    backend = resolving([PUBLIC], ["127.0.0.1"], inner=recorder)

    refusal("http://turning.example/x", backend=backend)

    assert recorder.asked == [PUBLIC]


def test_a_host_without_a_name_is_not_taken_for_an_allowed_one() -> None:
    recorder = Recorder()

    refusal("http://./x", backend=resolving(["127.0.0.1"], inner=recorder))

    assert recorder.asked == []


def test_the_host_is_named_to_the_server_as_it_stands_in_the_address(server: Server) -> None:
    class Inner(httpcore2.SyncBackend):
        def connect_tcp(self, host: str, *rest: object) -> httpcore2.NetworkStream:
            return super().connect_tcp("127.0.0.1", *rest)

    hosts = [f"a.example:{server.server_port}", f"[2606:2800::1]:{server.server_port}"]
    for host in hosts:
        content_at(f"http://{host}/x", backend=resolving([PUBLIC], inner=Inner()))

    assert [headers["host"] for _, headers in server.requests] == hosts


def test_a_name_that_turns_private_between_two_requests_is_refused_at_the_second(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "")
    # The test's own server plays the public one.
    answers = [[PUBLIC], ["127.0.0.1"]]
    asked: list[str] = []

    class Inner(httpcore2.SyncBackend):
        def connect_tcp(self, host: str, *rest: object) -> httpcore2.NetworkStream:
            asked.append(host)
            return super().connect_tcp("127.0.0.1", *rest)

    backend = PinnedBackend(lambda host, port: answers.pop(0), Inner())
    url = f"http://turning.example:{server.server_port}/redirect/to?"
    message = refusal(f"{url}http://turning.example:81/x", backend=backend)

    assert "is not on the public internet" in message
    assert asked == [PUBLIC]


def test_a_second_address_is_tried_where_the_first_does_not_answer() -> None:
    recorder = Recorder()
    second = "93.184.215.15"

    refusal("http://two.example/x", backend=resolving([PUBLIC, second], inner=recorder))

    assert recorder.asked == [PUBLIC, second]


def test_tls_verifies_the_host_name_and_not_the_address() -> None:
    recorder = Recorder(answers=(PUBLIC,))

    refusal("https://named.example/x", backend=resolving([PUBLIC], inner=recorder))

    assert recorder.hostnames == ["named.example"]


def test_a_server_without_tls_is_not_read_over_https(server: Server) -> None:
    message = refusal(server.url.replace("http", "https") + "/x")

    assert "no connection to `127.0.0.1`" in message
    assert "SSL" in message


@pytest.mark.parametrize(
    "allowed", ["inside.example", " other.example , INSIDE.example", "10.0.0.1", "[10.0.0.1]"]
)
def test_the_owner_of_the_machine_may_allow_a_private_host(
    monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", allowed)
    recorder = Recorder()

    refusal("http://inside.example/x", backend=resolving(["10.0.0.1"], inner=recorder))

    assert recorder.asked == ["10.0.0.1"]


def test_an_allowed_host_does_not_allow_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "inside.example")
    recorder = Recorder()

    refusal("http://sub.inside.example/x", backend=resolving(["10.0.0.2"], inner=recorder))

    assert recorder.asked == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.example/b/c.zip?key=secret#part", "https://a.example/b/c.zip"),
        ("https://user:word@a.example:8443/c.zip", "https://a.example:8443/c.zip"),
        ("http://[2606::1]:80/x", "http://[2606::1]/x"),
        ("http://a.example:b/secret", "http://…"),
    ],
)
def test_a_shown_address_has_no_query_and_no_credentials(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_long_address_is_shown_cut() -> None:
    assert len(shown_url("https://a.example/" + "b" * 5000)) <= 201


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
def test_a_full_disk_is_told_with_what_is_needed(server: Server) -> None:
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(DiskError) as error,
    ):
        list(download(f"{server.url}/set.zip?key=secret", FIELD, full, limit=LIMIT))

    assert "no room in `/dev` for the download of" in error.value.message
    assert "needs 2.1 MB" in error.value.message
    assert "secret" not in error.value.message


def test_a_file_size_limit_in_the_temporary_folder_names_tmpdir(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryFile(buffering=0) as target:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            with pytest.raises(DiskError) as error:
                list(download(f"{server.url}/set.zip", FIELD, target, limit=LIMIT))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert tempfile.gettempdir() in error.value.message
    assert "TMPDIR" in error.value.hint


def test_a_download_that_is_given_up_closes_its_connection(server: Server) -> None:
    streams: list[httpcore2.NetworkStream] = []

    class Inner(httpcore2.SyncBackend):
        def connect_tcp(self, *place: object) -> httpcore2.NetworkStream:
            streams.append(super().connect_tcp(*place))
            return streams[-1]

    backend = PinnedBackend(inner=Inner())
    steps = download(f"{server.url}/set.zip", FIELD, io.BytesIO(), limit=LIMIT, backend=backend)

    next(steps)
    steps.close()

    assert [stream.get_extra_info("socket").fileno() for stream in streams] == [-1]


def test_fetching_needs_no_torch() -> None:
    code = "import sys, trainer.fetch; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
