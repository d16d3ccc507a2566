"""The command `trainer serve`: settings from file, flags and environment, and what it refuses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from running import free_port, running_server

from trainer.cli import run
from trainer.errors import InputError
from trainer.server.settings import KEYS, ServerSettings
from trainer.serving import settings_from


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS, raising=False)


def keys_of(settings: ServerSettings) -> list[str]:
    return [key.get_secret_value() for key in settings.keys]


def test_without_flags_only_this_machine_is_served() -> None:
    settings = settings_from(None, {})

    assert (settings.host, settings.port, settings.keys) == ("127.0.0.1", 8700, ())


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 9000\nmax_queued: 5\nallowed_hosts: [gpu.example]\n")

    settings = settings_from(file, {"port": "9001", "gpus": ("0", "1"), "tls": True})

    assert (settings.port, settings.max_queued, settings.tls) == (9001, 5, True)
    assert (settings.allowed_hosts, settings.gpus) == (("gpu.example",), ("0", "1"))


def test_keys_come_from_a_file_and_the_environment_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("# ours\n\none\n id:secret \n")
    monkeypatch.setenv(KEYS, "two, one")

    settings = settings_from(None, {"key_file": str(tmp_path / "keys"), "host": "0.0.0.0"})

    assert keys_of(settings) == ["one", "id:secret", "two"]


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, "a-secret")

    settings = settings_from(None, {})

    assert "a-secret" not in f"{settings!r}{settings.model_dump_json()}"


@pytest.mark.parametrize(
    ("flags", "field", "told"),
    [
        ({"host": "0.0.0.0"}, "host", "there is no key"),
        ({"host": "192.168.1.7"}, "host", "there is no key"),
        ({"port": "x"}, "port", "a whole number"),
        ({"port": "70000"}, "port", "at most 65535"),
        ({"backend": "ray"}, "backend", "one of local, slurm, command"),
        ({"public_url": "example"}, "public_url", "matching"),
        ({"keep_days": "0"}, "keep_days", "above 0"),
        ({"key_file": "/nowhere"}, "key_file", "cannot be read"),
        ({"key_file": 5}, "key_file", "allowed: "),
        ({"backend": "command"}, "host", "--submit-command"),
        ({"sbatch_script": "/nowhere"}, "sbatch_script", "`/nowhere` is not a file"),
    ],
)
def test_a_wrong_setting_is_told_by_name(flags: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        settings_from(None, flags)

    (problem,) = refused.value.problems
    assert problem.field == field
    assert told in problem.message


def test_a_setting_that_does_not_exist_is_told_with_one_that_does(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("max_queue: 5\n")

    with pytest.raises(InputError, match="max_queued"):
        settings_from(file, {})


def test_keys_do_not_stand_among_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("keys: [one]\n")

    with pytest.raises(InputError, match="no such setting"):
        settings_from(file, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    assert settings_from(None, {"host": host}).host == host


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    run(["serve", "--help"])

    said = capsys.readouterr().out
    for name, info in ServerSettings.model_fields.items():
        assert (f"--{name.replace('_', '-')}" in said) is (not info.json_schema_extra), name


def taken(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


@pytest.mark.parametrize("flag", ["--port", "--tls-port", "--proxy-port"])
def test_an_address_that_is_taken_is_told_by_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with taken(0) as other:
        ports = {"--port": free_port(), "--tls-port": free_port(), "--proxy-port": free_port()}
        ports[flag] = other.getsockname()[1]
        words = [word for name, port in ports.items() for word in (name, str(port))]

        code = run(["serve", "--tls", "--data", str(tmp_path / "data"), *words])

    said = capsys.readouterr().err
    assert code == 2
    assert f"error[input]: `{flag}`: cannot listen at" in said
    assert "Serving at" not in said


def test_a_flag_turns_off_what_a_file_turns_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.yaml").write_text("tls: true\n")
    served: list[ServerSettings] = []
    monkeypatch.setattr("trainer.server.listening.run", served.append)

    for flags in ([], ["--no-tls"], ["--tls"]):
        assert run(["serve", "--settings", str(tmp_path / "server.yaml"), *flags]) == 0

    assert [settings.tls for settings in served] == [True, False, True]


def test_a_data_folder_that_cannot_be_made_is_told_with_its_own_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = run(["serve", "--data", "/proc/nothing/here", "--port", "1"])

    said = capsys.readouterr().err
    assert code != 0
    assert "give another --data" in " ".join(said.split())


def health(capsys: pytest.CaptureFixture[str], port: int, *flags: str) -> tuple[int, str]:
    """The exit code of a question after a server's health, and what is printed."""
    code = run(["health", "--url", f"http://127.0.0.1:{port}", *flags])
    told = capsys.readouterr()
    return code, told.out + told.err


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server that answers this to everything."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_works_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_server(tmp_path) as server:
        port = int(server.url.rsplit(":", 1)[1])
        assert health(capsys, port) == (0, "ok\n")
        assert health(capsys, port, "--optional") == (0, "ok\n")


@pytest.mark.parametrize("flags", [(), ("--optional",)])
def test_a_server_that_is_broken_is_not_well(
    flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(500) as port:
        code, told = health(capsys, port, *flags)
    assert code == 1
    assert f"the server at http://127.0.0.1:{port} does not work: it answers 500" in told


def test_where_nothing_listens_nothing_is_well_unless_it_need_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    code, told = health(capsys, port)
    assert (code, "nothing listens there" in told) == (1, True)
    assert health(capsys, port, "--optional") == (0, "no server listens\n")


def test_a_server_that_says_nothing_is_not_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.serving._ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        code, told = health(capsys, mute.getsockname()[1], "--optional")
    assert (code, "timed out" in told) == (1, True)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8700", "https://here", "http://here:no", "http://", "a", "http://a..b"]
)
def test_what_is_no_address_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["health", "--url", url]) == 2
    assert "--url" in capsys.readouterr().err
