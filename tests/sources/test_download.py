"""Pictures and captions behind a web address: fetched once, whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from grid import grid_bytes, picture_set, prepared, zip_bytes

from trainer.data.picture_set import PictureSet
from trainer.data.report import inspect
from trainer.errors import DiskError, InputError
from trainer.events import StageEvent
from trainer.sources.download import downloaded

PICTURES = zip_bytes({f"{n}.png": grid_bytes(blue=60 * n) for n in range(3)})


class Server(ThreadingHTTPServer):
    """Gives `content` for every path, or only so much of it before it hangs up."""

    daemon_threads = True
    content = PICTURES
    cut: int | None = None
    status = 200
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # noqa: N802 - named by the base class
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

    def log_message(self, *_: object) -> None:
        """Nothing: a test says what it saw."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the owner of the machine allows."""
    monkeypatch.setenv("TRAINER_ALLOWED_HOSTS", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def fetched(url: str | None, folder: Path) -> tuple[list[StageEvent], Path | None]:
    events, fetching = [], downloaded(url, folder)
    while True:
        try:
            events.append(next(fetching))
        except StopIteration as end:
            return events, end.value


@pytest.mark.parametrize("place", [None, "photos", "./set.zip", "data:application/zip;base64,UEs="])
def test_a_place_that_is_no_web_address_is_left_to_others(
    place: str | None, tmp_path: Path
) -> None:
    assert fetched(place, tmp_path / "folder") == ([], None)
    assert not (tmp_path / "folder").exists()


def test_the_file_is_kept_in_the_folder_and_progress_told_in_mebibytes(
    server: Server, tmp_path: Path
) -> None:
    server.content = bytes(3 * 2**20 + 1)

    events, path = fetched(server.url, tmp_path / "new" / "folder")

    assert path is not None
    assert path.read_bytes() == server.content
    assert list((tmp_path / "new" / "folder").iterdir()) == [path]
    assert {(event.stage, event.total) for event in events} == {("download", 4)}
    assert (events[0].done, events[-1].done) == (0, 4)


def test_it_is_fetched_once_also_when_the_address_has_expired(
    server: Server, tmp_path: Path
) -> None:
    _, first = fetched(server.url, tmp_path)
    server.content = b"expired"

    events, again = fetched(server.url, tmp_path)

    assert (events, again, server.requests) == ([], first, 1)


def test_each_address_has_a_file_of_its_own(server: Server, tmp_path: Path) -> None:
    _, one = fetched(server.url, tmp_path)
    _, other = fetched(f"{server.url}?version=2", tmp_path)

    assert one != other


def test_a_broken_download_leaves_nothing_and_is_begun_again(
    server: Server, tmp_path: Path
) -> None:
    server.cut = 100
    with pytest.raises(InputError) as caught:
        fetched(server.url, tmp_path)
    assert [problem.field for problem in caught.value.problems] == ["images_data_url"]
    assert list(tmp_path.iterdir()) == []
    server.cut = None

    _, path = fetched(server.url, tmp_path)

    assert path is not None
    assert path.read_bytes() == PICTURES


def test_an_abandoned_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = bytes(3 * 2**20)
    fetching = downloaded(server.url, tmp_path)
    next(fetching)

    fetching.close()

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_disk_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DiskError):
        fetched(server.url, tmp_path / "file" / "folder")


def test_pictures_are_prepared_from_it(server: Server, tmp_path: Path) -> None:
    _, examples = prepared(picture_set(server.url), tmp_path / "prepared")
    server.content = b"expired"

    _, again = prepared(picture_set(server.url), tmp_path / "prepared")

    assert [example.name for example in examples] == ["0.png", "1.png", "2.png"]
    assert again == examples
    assert server.requests == 1


def test_what_turns_out_to_be_no_archive_is_fetched_anew_next_time(
    server: Server, tmp_path: Path
) -> None:
    server.content = b"<!DOCTYPE html><html>try again later</html>"
    with pytest.raises(InputError, match="web page"):
        prepared(picture_set(server.url), tmp_path / "prepared")
    server.content = PICTURES

    _, examples = prepared(picture_set(server.url), tmp_path / "prepared")

    assert len(examples) == 3


CAPTIONS = b"".join(b'{"file_name": "%d.png", "text": "caption %d"}\n' % (n, n) for n in range(3))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    path = tmp_path / "set.zip"
    path.write_bytes(PICTURES)
    return path


def captioned(pictures: Path, url: str) -> PictureSet:
    """The pictures with captions at this address, which has a key."""
    return picture_set(pictures, captions_file_url=f"{url}?key=secret")


def test_a_captions_file_is_fetched_once_also_when_the_address_has_expired(
    server: Server, pictures: Path, tmp_path: Path
) -> None:
    server.content = CAPTIONS
    _, examples = prepared(captioned(pictures, server.url), tmp_path / "prepared")
    server.status = 403

    _, again = prepared(captioned(pictures, server.url), tmp_path / "prepared")

    assert [example.caption for example in examples] == ["caption 0", "caption 1", "caption 2"]
    assert again == examples
    assert server.requests == 1


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>", b'{"file_name": "0.png", "words": "in another column"}']
)
def test_a_captions_file_that_cannot_be_used_is_told_by_its_address_and_fetched_anew(
    server: Server, pictures: Path, tmp_path: Path, content: bytes
) -> None:
    server.content = content
    with pytest.raises(InputError) as caught:
        prepared(captioned(pictures, server.url), tmp_path / "prepared")
    server.content = CAPTIONS

    _, examples = prepared(captioned(pictures, server.url), tmp_path / "prepared")

    assert f"of `{server.url}` " in str(caught.value)
    assert "secret" not in str(caught.value)
    assert examples[0].caption == "caption 0"


def test_pictures_that_cannot_be_used_leave_the_captions_where_they_are(
    server: Server, pictures: Path, tmp_path: Path
) -> None:
    server.content = CAPTIONS
    pictures.write_bytes(b"no archive")
    with pytest.raises(InputError):
        prepared(captioned(pictures, server.url), tmp_path / "prepared")
    pictures.write_bytes(PICTURES)

    prepared(captioned(pictures, server.url), tmp_path / "prepared")

    assert server.requests == 1


def test_a_captions_file_that_cannot_be_had_names_its_option(
    server: Server, pictures: Path, tmp_path: Path
) -> None:
    server.status = 404

    with pytest.raises(InputError, match="nothing at this address") as caught:
        prepared(captioned(pictures, server.url), tmp_path / "prepared")

    assert [problem.field for problem in caught.value.problems] == ["captions_file_url"]
    assert "secret" not in str(caught.value)


def test_a_download_has_the_limit_of_its_option(server: Server, tmp_path: Path) -> None:
    fetching = downloaded(server.url, tmp_path, field="captions_file_url", limit=2**20)
    server.content = bytes(2**20 + 1)

    with pytest.raises(InputError, match="larger than 1 MiB") as caught:
        list(fetching)

    assert [problem.field for problem in caught.value.problems] == ["captions_file_url"]


def test_captions_are_read_from_an_address_without_preparing(
    server: Server, pictures: Path
) -> None:
    server.content = CAPTIONS

    report = inspect(captioned(pictures, server.url))

    assert [picture.caption for picture in report.pictures][:2] == ["caption 0", "caption 1"]


def test_a_file_is_durable_before_it_has_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names))[1])

    fetched(server.url, tmp_path)

    assert done == ["sync", "name", "sync"]
