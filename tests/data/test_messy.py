"""The messy set is what it says it is, and reads as users' folders and zips do."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import cv2
import messy
import numpy as np
import pytest
from PIL import Image, ImageOps


def opened(name: str) -> Image.Image:
    return Image.open(BytesIO(messy.messy_files()[name]))


def upright(name: str) -> Image.Image:
    return ImageOps.exif_transpose(opened(name)).convert("RGB")


def found_by_cascade(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Faces that OpenCV's frontal cascade finds: a second opinion on where they are."""
    cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")
    grey = np.asarray(image.convert("L"))
    return [tuple(box) for box in cascade.detectMultiScale(grey, 1.1, 4, minSize=(24, 24))]


def overlap(first: messy.Box, second: messy.Box) -> float:
    """The area that two boxes share over that which either covers."""
    across = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    along = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = max(across, 0) * max(along, 0)
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


@pytest.mark.parametrize("name", messy.USABLE)
def test_a_usable_picture_has_the_upright_size_it_is_said_to_have(name: str) -> None:
    image = upright(name)

    assert (image.height, image.width) == messy.SIZES[name]
    assert 600 <= max(image.size) <= 1400


def test_the_set_holds_one_of_each_oddity() -> None:
    assert opened(messy.SIDEWAYS).getexif()[0x0112] == 6
    assert opened(messy.SIDEWAYS).size == messy.SIZES[messy.SIDEWAYS]
    assert opened(messy.CUT_OUT).getchannel("A").getextrema() == (0, 255)
    assert opened(messy.DISTANT).format == "WEBP"
    assert opened(messy.CMYK).mode == "CMYK"
    files = messy.messy_files()
    assert files[messy.DUPLICATE] == files[messy.NO_FACE]
    assert files[messy.CAPTION_FILE].decode() == messy.CAPTION + "\n"
    with pytest.raises(OSError, match="truncated"):
        opened(messy.TRUNCATED).load()


@pytest.mark.parametrize("name", [messy.SIDEWAYS, messy.CUT_OUT, messy.DISTANT, messy.THREE_FACES])
def test_faces_are_where_they_are_said_to_be(name: str) -> None:
    found = found_by_cascade(upright(name))

    for face in messy.faces()[name]:
        assert max(overlap(face, box) for box in found) > 0.5


def test_a_tilted_face_is_there_once_the_picture_is_turned_back() -> None:
    (face,) = messy.faces()[messy.TILTED]
    middle = face[0] + face[2] / 2, face[1] + face[3] / 2
    image = upright(messy.TILTED)

    turned_back = image.rotate(-messy.TILT, Image.Resampling.BICUBIC, center=middle)

    assert max(overlap(face, box) for box in found_by_cascade(turned_back)) > 0.5
    assert not any(overlap(face, box) > 0.5 for box in found_by_cascade(image))


def test_the_largest_face_comes_first() -> None:
    largest, second, third = messy.faces()[messy.THREE_FACES]

    assert largest[2] > second[2] > third[2]


def test_the_folder_holds_the_same_files_as_the_zip(tmp_path: Path) -> None:
    folder = messy.messy_folder(tmp_path / "set")
    file = messy.messy_zip(tmp_path / "set.zip")

    with zipfile.ZipFile(file) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert packed == found == messy.messy_files()
    assert set(packed) == {
        *messy.USABLE,
        *messy.JUNK,
        messy.TRUNCATED,
        messy.CAPTION_FILE,
    }


def test_two_zips_are_the_same_bytes(tmp_path: Path) -> None:
    first = messy.messy_zip(tmp_path / "a.zip").read_bytes()
    messy.messy_files.cache_clear()

    assert messy.messy_zip(tmp_path / "b.zip").read_bytes() == first
