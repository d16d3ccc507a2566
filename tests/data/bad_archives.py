"""Rows 1 to 17, 47, 78, 79 and 82 of the bad inputs: what is no archive, or holds no pictures."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO

import grid
from asking import (
    REFUSED,
    Answer,
    Case,
    Place,
    alone,
    another_picture,
    beside,
    each,
    file,
    good_pictures,
    prepared,
    zipped,
)
from grid import zip_bytes

from trainer.data.picture_set import PictureSet
from trainer.network import ALLOWED_HOSTS

WEB_PAGE = "<!DOCTYPE html><html><body>404 Not Found</body></html>"


def good_zip() -> bytes:
    return zip_bytes(good_pictures())


def tar_bytes(files: Mapping[str, bytes], links: tuple[str, ...] = (), mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    return content.getvalue()


def zip_with_link() -> bytes:
    content = io.BytesIO(good_zip())
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    return content.getvalue()


def lying_zip() -> bytes:
    """A zip whose directory says 10 bytes of an entry that has more."""
    content = bytearray(zip_bytes({"bomb.bmp": b"BM" + bytes(1000)}))
    # The size stands 24 bytes into the entry of the directory.
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 10)
    return bytes(content)


def locked_zip() -> bytes:
    """A zip whose entry is marked as encrypted."""
    content = bytearray(zip_bytes({"a.jpg": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def zip_with_damage() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in good_pictures().items():
            archive.writestr(name, content)
        archive.writestr("bad.jpg", b"damaged content")
    return packed.getvalue().replace(b"damaged content", b"DAMAGED content")


def zip_with_a_name_twice() -> bytes:
    packed = io.BytesIO(good_zip())
    with zipfile.ZipFile(packed, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("g0.jpg", good_pictures()["g1.jpg"])
    return packed.getvalue()


def damaged_uri(_: Place) -> PictureSet:
    uri = "data:application/zip;base64," + "QUJD" * 12053 + "A*BC"
    return grid.picture_set(uri)


class Giver(BaseHTTPRequestHandler):
    """Announces 480 MB and gives 1.2, or announces 8 GiB."""

    def do_GET(self) -> None:  # noqa: N802 - named by the base class
        is_huge = self.path == "/huge.zip"
        self.send_response(200)
        self.send_header("Content-Length", str(2**33 if is_huge else 480_000_000))
        self.end_headers()
        if not is_huge:
            self.wfile.write(bytes(1_200_000))

    def log_message(self, *_: object) -> None:
        """Nothing."""


def behind_addresses(names: tuple[str, ...], place: Place) -> Answer:
    """Pictures behind addresses of a server on this machine."""
    place.machine.setenv(ALLOWED_HOSTS, "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Giver) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            sets = [grid.picture_set(f"{address}/{name}") for name in names]
            answer = prepared(sets, place)
        finally:
            server.shutdown()
            serving.join()
    said = tuple(line.replace(address, "http://127.0.0.1") for line in answer.said)
    return Answer(answer.left, said, answer.captions)


def on_a_full_disk(wanted: PictureSet, place: Place) -> Answer:
    """On a machine whose temporary files come to lie on a full disk: Linux has one to try."""

    def full(buffering: int) -> BinaryIO:
        # By its number: a temporary file has no name.
        return open(os.open("/dev/full", os.O_RDWR), "r+b", buffering=buffering)

    place.machine.setattr(tempfile, "TemporaryFile", full)
    return prepared(wanted, place)


CASES = (
    Case(
        1,
        "a path that does not exist",
        lambda place: grid.picture_set(place.folder / "nope.zip"),
        REFUSED,
        (
            "error: `nope.zip` does not exist",
            "hint: check the path",
        ),
    ),
    Case(
        2,
        "an empty file as archive",
        file("empty.zip", b""),
        REFUSED,
        (
            "error: `empty.zip` is empty (0 bytes)",
            "hint: check whether its upload was interrupted",
        ),
    ),
    Case(
        3,
        "a web page saved as .zip",
        file("dl.zip", WEB_PAGE),
        REFUSED,
        (
            "error: `dl.zip` is a web page",
            "hint: download the file itself and check the link",
        ),
    ),
    Case(
        4,
        "a RAR archive",
        file("x.rar", b"Rar!\x1a\x07\x01\x00" + bytes(100)),
        REFUSED,
        (
            "error: `x.rar` is a RAR archive",
            "hint: pack the pictures as .zip or .tar instead",
        ),
    ),
    Case(
        5,
        "a zip cut off in the upload",
        file("set.zip", lambda: good_zip()[:-100]),
        REFUSED,
        (
            "error: `set.zip` starts like a zip archive but is cut off or damaged (…)",
            "hint: pack or upload it again",
        ),
    ),
    Case(
        6,
        "a zip whose entry leads out of it",
        zipped({"../../../tmp/evil.jpg": b"x"}),
        REFUSED,
        (
            (
                "error: `set.zip` contains the unsafe path `../../../tmp/evil.jpg` and is "
                "refused as a whole"
            ),
            "hint: pack the pictures with plain relative names",
        ),
    ),
    Case(
        7,
        "an absolute path in a tar",
        file("abs.tar", lambda: tar_bytes({**good_pictures(), "/etc/evil.jpg": b"x"})),
        REFUSED,
        (
            ("error: `abs.tar` contains the unsafe path `/etc/evil.jpg` and is refused as a whole"),
            "hint: pack the pictures with plain relative names",
        ),
    ),
    Case(
        8,
        "links in a tar and a zip: each is named, because it was meant to be a picture",
        each(
            file("link.tar", lambda: tar_bytes(good_pictures(), ("link.jpg",))),
            file("link.zip", zip_with_link),
        ),
        5,
        (
            "warning: `link.jpg` is left out, links and devices are not followed",
            "warning: `link.jpg` is left out, links in archives are not followed",
        ),
    ),
    Case(
        9,
        "a decompression bomb of zeros",
        zipped({"bomb.png": lambda: bytes(8 * 2**20)}),
        REFUSED,
        (
            (
                "error: `set.zip` is refused as a possible decompression bomb: `bomb.png` "
                "unpacks to more than 200 times its packed size"
            ),
            "hint: pack the pictures as they come from the camera",
        ),
    ),
    Case(
        10,
        "a bomb that lies about its size",
        file("bomb.zip", lying_zip),
        REFUSED,
        (
            (
                "error: no picture can be used: `bomb.bmp`: the file is damaged or cannot be "
                "read (…); copy or pack it again"
            ),
            (
                "hint: give pictures that open in an image viewer; accepted: JPEG, PNG, WebP, "
                "BMP, TIFF, GIF, AVIF, HEIC"
            ),
        ),
    ),
    Case(
        12,
        "a zip with a password",
        file("set.zip", locked_zip),
        REFUSED,
        (
            "error: `set.zip` is password-protected (`a.jpg`)",
            "hint: pack it without a password",
        ),
    ),
    Case(
        13,
        "one entry with a wrong checksum",
        file("set.zip", zip_with_damage),
        5,
        (
            (
                "warning: `bad.jpg` is left out: the file is damaged or cannot be read (…); "
                "copy or pack it again"
            ),
        ),
    ),
    Case(
        14,
        "nothing but what macOS leaves behind",
        file(
            "set.zip",
            lambda: zip_bytes({"__MACOSX/._a.jpg": b"x", "._b.jpg": b"x", ".DS_Store": b"x"}),
        ),
        REFUSED,
        (
            "error: `set.zip` holds no files",
            ("hint: put the training pictures into it; `__MACOSX` and hidden files do not count"),
        ),
    ),
    Case(
        15,
        "text and no picture",
        alone({"a.txt": "words", "b.md": "words"}),
        REFUSED,
        (
            "error: `set` holds 2 files but no picture",
            ("hint: put pictures into it; accepted: JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC"),
        ),
    ),
    Case(
        16,
        "an archive inside the archive",
        zipped({"inner.zip": good_zip}),
        5,
        ("warning: archives among the pictures are not opened: `inner.zip`",),
    ),
    Case(
        17,
        "capital letters, .jpeg, folders, no suffix",
        beside(
            {
                "sub/deep/IMG_1.JPG": lambda: another_picture(0),
                "photo.jpeg": lambda: another_picture(1),
                "photo": lambda: another_picture(2),
            }
        ),
        8,
        (),
    ),
    Case(
        47,
        "the same name twice in a zip",
        file("set.zip", zip_with_a_name_twice),
        5,
        ("warning: `g0.jpg` is in the archive twice; the first one is used",),
    ),
    Case(
        78,
        "a damaged data: URI",
        damaged_uri,
        REFUSED,
        (
            "error: the base64 text of the data: URI is damaged at character 48213",
            "hint: encode the file again with the standard alphabet",
        ),
    ),
    Case(
        79,
        "a download that breaks off, and one that is too large",
        lambda _: ("set.zip", "huge.zip"),
        REFUSED,
        (
            (
                "error: `http://127.0.0.1/set.zip` cannot be downloaded: the download stopped "
                "after 1.2 of 480 MB"
            ),
            "hint: try again, or download it and give the file",
            "error: `http://127.0.0.1/huge.zip` cannot be downloaded: it is larger than 4 GiB",
            "hint: give fewer or smaller files",
        ),
        door=behind_addresses,
    ),
    Case(
        82,
        "a disk that is full while a tar.gz is unpacked",
        file(
            "set.tar.gz",
            lambda: tar_bytes({"a.bmp": random.Random(0).randbytes(3 * 2**20)}, mode="w:gz"),
        ),
        REFUSED,
        (
            "error: no room in `…` for the unpacked pictures (needs 3.2 MB, … free)",
            "hint: make room there or set TMPDIR to another folder",
        ),
        door=on_a_full_disk,
    ),
)
