"""Face detectors: YuNet's way of working by a network that sees coloured squares, cascades on
photographs, and what is said where a detector cannot be had.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image, ImageDraw
from skimage import data as photographs

from trainer.config import FaceConfig
from trainer.errors import InputError
from trainer.images import detector_files
from trainer.images.detectors import (
    DETECTORS,
    YUNET_FILE,
    YUNET_HUB,
    FaceDetector,
    YuNet,
    detector_of,
)
from trainer.images.faces import Face

SQUARES = Path(__file__).parent.parent / "samples" / "red_square_yunet.onnx"

# The photographs are used at this share of their size: cascades take their time.
SHARE = 0.6
# Where the astronaut has her face, by eye: left, top, right, bottom.
ASTRONAUT_FACE = (107, 45, 163, 114)


@pytest.fixture(scope="module")
def yunet() -> FaceDetector:
    return detector_of(FaceConfig(face_detector="yunet", face_detector_path=str(SQUARES)))[0]


@pytest.fixture(scope="module")
def haar() -> FaceDetector:
    return detector_of(FaceConfig(face_detector="haar"))[0]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return photograph("astronaut")


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; the hub itself is out of reach in tests."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_cache(hub: Path, content: bytes) -> Path:
    """The path under which the hub's client finds a file of YuNet's name."""
    repository = hub / f"models--{YUNET_HUB.replace('/', '--')}"
    snapshot = repository / "snapshots" / "a-commit"
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    (repository / "blobs" / "content").write_bytes(content)
    (snapshot / YUNET_FILE).symlink_to(Path("..", "..", "blobs", "content"))
    return snapshot / YUNET_FILE


def people(width: int, height: int, *squares: tuple[int, int, int]) -> Image.Image:
    """Red heads on blue shoulders, given as left, top and side of the head."""
    image = Image.new("RGB", (width, height), (120, 120, 120))
    draw = ImageDraw.Draw(image)
    for left, top, side in squares:
        draw.rectangle((left, top, left + side - 1, top + side - 1), (255, 0, 0))
        draw.rectangle((left, top + side, left + side - 1, top + 2 * side - 1), (0, 0, 255))
    return image


def photograph(name: str) -> Image.Image:
    image = Image.fromarray(getattr(photographs, name)())
    return image.resize((round(SHARE * image.width), round(SHARE * image.height)))


def is_over(face: Face, box: tuple[float, float, float, float]) -> bool:
    left, top, right, bottom = box
    x, y = face.centre
    return left < x < right and top < y < bottom and 0.5 < face.width / (right - left) < 2


def turned_box(image: Image.Image, turned: Image.Image, angle: float) -> tuple[float, ...]:
    """The astronaut's face in the turned picture: a square as wide as it was."""
    left, top, right, bottom = ASTRONAUT_FACE
    x, y = (left + right) / 2 - image.width / 2, (top + bottom) / 2 - image.height / 2
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = x * cosine + y * sine + turned.width / 2, y * cosine - x * sine + turned.height / 2
    half = (right - left) / 2
    return x - half, y - half, x + half, y + half


def test_yunet_gives_boxes_and_landmarks_in_pixels_of_the_picture(yunet: FaceDetector) -> None:
    (face,) = yunet.find(people(500, 380, (100, 50, 60)))

    assert face.box == pytest.approx((100, 50, 60, 60), abs=1)
    assert face.score > 0.9
    assert face.turned == 0
    assert face.landmarks is not None
    # In the drawn head: the eyes 0.2 sides beside its middle and 0.15 above.
    expected = [(118, 71), (142, 71), (130, 83), (121, 95), (139, 95)]
    np.testing.assert_allclose(face.landmarks, expected, atol=1)


def test_yunet_sees_red_and_not_blue(yunet: FaceDetector) -> None:
    upside_down = people(200, 300, (70, 50, 60)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    blue_heads = Image.fromarray(np.asarray(people(200, 300, (70, 50, 60)))[..., ::-1])

    assert yunet.find(upside_down)[0].turned == 180
    assert yunet.find(blue_heads)[0].turned == 180


def test_a_large_picture_is_made_small_and_its_faces_large_again(yunet: FaceDetector) -> None:
    (face,) = yunet.find(people(2000, 1200, (400, 200, 300)))

    assert face.box == pytest.approx((400, 200, 300, 300), abs=4)


def test_a_face_too_large_for_the_network_is_found_in_a_smaller_picture(
    yunet: FaceDetector,
) -> None:
    # 256 of 640 pixels are more than five of its largest cells, 128 of 320 are not.
    (face,) = yunet.find(people(1500, 1500, (400, 100, 600)))

    assert face.box == pytest.approx((400, 100, 600, 600), abs=12)


def test_the_largest_of_several_faces_comes_first(yunet: FaceDetector) -> None:
    faces = yunet.find(people(600, 380, (60, 50, 30), (200, 100, 80), (450, 60, 50)))

    assert [round(face.width, -1) for face in faces] == [80, 50, 30]


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_a_head_on_its_side_is_found_where_it_is(yunet: FaceDetector, angle: int) -> None:
    upright = people(500, 380, (100, 50, 60))
    lying = upright.rotate(angle, expand=True)

    (face,) = yunet.find(lying)

    assert math.cos(math.radians(face.turned + angle)) == pytest.approx(1)
    # By PIL's own turn of a picture with a spot at the head's middle, and one at the right eye.
    for place, expected in ((face.centre, (129, 79)), ((face.landmarks or ())[0], (117, 70))):
        spot = Image.new("L", upright.size)
        spot.putpixel(expected, 255)
        y, x = np.argwhere(np.asarray(spot.rotate(angle, expand=True)))[0]
        assert place == pytest.approx((x, y), abs=2.5)


@pytest.mark.parametrize("size", [(16, 16), (33, 17), (20, 3000), (3000, 20)])
def test_odd_sizes_are_no_trouble(
    yunet: FaceDetector, haar: FaceDetector, size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (120, 120, 120))

    assert yunet.find(image) == haar.find(image) == ()


def test_equal_pictures_have_equal_faces_on_any_number_of_threads(
    yunet: FaceDetector, haar: FaceDetector, astronaut: Image.Image
) -> None:
    before = cv2.getNumThreads()
    drawn = people(500, 380, (100, 50, 60), (300, 100, 30))
    try:
        answers = set()
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            answers.add((yunet.find(drawn), haar.find(astronaut)))
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)

    assert len(answers) == 1


def test_cascades_find_an_upright_face(haar: FaceDetector, astronaut: Image.Image) -> None:
    (face,) = haar.find(astronaut)

    assert is_over(face, ASTRONAUT_FACE)
    assert face.landmarks is None
    assert face.turned == 0


@pytest.mark.parametrize("angle", [30, -30, 45])
def test_cascades_find_a_tilted_face(
    haar: FaceDetector, astronaut: Image.Image, angle: int
) -> None:
    tilted = astronaut.rotate(angle, Image.Resampling.BICUBIC, expand=True)

    face = haar.find(tilted)[0]

    assert is_over(face, turned_box(astronaut, tilted, angle))
    assert face.turned * angle < 0


@pytest.mark.parametrize("angle", [90, -90, 180])
def test_cascades_find_a_head_on_its_side(
    haar: FaceDetector, astronaut: Image.Image, angle: int
) -> None:
    lying = astronaut.rotate(angle, expand=True)

    face = haar.find(lying)[0]

    assert is_over(face, turned_box(astronaut, lying, angle))
    assert math.cos(math.radians(face.turned + angle)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["coffee", "cat", "rocket"])
def test_cascades_find_no_face_where_there_is_none(haar: FaceDetector, name: str) -> None:
    assert haar.find(photograph(name)) == ()


def test_cascades_find_two_people_the_larger_first(
    haar: FaceDetector, astronaut: Image.Image
) -> None:
    # The face is at 35, 39 … 91, 108 of what is cut out.
    head = astronaut.crop((72, 6, 198, 168))
    both = Image.new("RGB", (400, 240), (90, 110, 130))
    both.paste(head, (10, 40))
    both.paste(head.resize((164, 211)), (200, 15))

    larger, smaller = haar.find(both)

    assert is_over(larger, (200 + 35 * 1.3, 15 + 39 * 1.3, 200 + 91 * 1.3, 15 + 108 * 1.3))
    assert is_over(smaller, (10 + 35, 40 + 39, 10 + 91, 40 + 108))


def test_every_detector_that_can_be_asked_for_is_known() -> None:
    asked_for = FaceConfig.model_fields["face_detector"].annotation

    assert {"auto", *DETECTORS} == set(getattr(asked_for, "__args__", ()))


def test_identities_tell_weights_apart(yunet: FaceDetector, haar: FaceDetector) -> None:
    other = YuNet(SQUARES.read_bytes() + b"\x2a\x00")

    assert len({yunet.identity, haar.identity, other.identity}) == 3
    assert YuNet(SQUARES.read_bytes()).identity == yunet.identity


def test_yunet_of_ones_own_is_used_as_it_is() -> None:
    for asked_for in ("auto", "yunet"):
        settings = FaceConfig(face_detector=asked_for, face_detector_path=str(SQUARES))

        detector, warnings = detector_of(settings)

        assert detector.identity.startswith("yunet")
        assert warnings == ()


def test_cascades_need_no_file(empty_hub: Path) -> None:
    detector, warnings = detector_of(FaceConfig(face_detector="haar"))

    assert detector.identity.startswith("haar")
    assert warnings == ()


def test_without_its_file_cascades_stand_in_for_yunet_and_that_is_said(empty_hub: Path) -> None:
    detector, (warning,) = detector_of(FaceConfig())

    assert detector.identity.startswith("haar")
    assert warning.startswith(
        "the face detector YuNet cannot be used: its file (0.2 MB) could not be downloaded ("
    )
    assert "OpenCV's own cascades are used, which miss tilted and small faces" in warning
    assert "face_detector_path" in warning
    assert "\n" not in warning


def test_without_its_file_yunet_that_is_asked_for_is_an_error(empty_hub: Path) -> None:
    with pytest.raises(InputError) as caught:
        detector_of(FaceConfig(face_detector="yunet"))

    (problem,) = caught.value.problems
    assert problem.field == "face_detector"
    assert "could not be downloaded" in problem.message
    assert f"huggingface.co/{YUNET_HUB}" in problem.hint


@pytest.mark.parametrize("asked_for", ["auto", "yunet"])
def test_a_downloaded_file_with_another_checksum_is_deleted(
    empty_hub: Path, asked_for: str
) -> None:
    path = put_into_cache(empty_hub, SQUARES.read_bytes())
    blob = path.resolve()
    said = f"`{YUNET_FILE}`: its checksum differs (got "

    if asked_for == "auto":
        detector, (warning,) = detector_of(FaceConfig())
        assert detector.identity.startswith("haar")
        assert said in warning
    else:
        with pytest.raises(InputError, match=re.escape(said)):
            detector_of(FaceConfig(face_detector="yunet"))

    assert not os.path.lexists(path)
    assert not blob.exists()


def test_a_downloaded_file_with_the_right_checksum_is_used(
    empty_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = SQUARES.read_bytes()
    put_into_cache(empty_hub, content)
    monkeypatch.setattr(detector_files, "YUNET_SHA256", hashlib.sha256(content).hexdigest())

    detector, warnings = detector_of(FaceConfig())

    assert detector.identity == f"yunet-{hashlib.sha256(content).hexdigest()}"
    assert warnings == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a network",
        b"\x08" * 4000,
        SQUARES.read_bytes()[:3000],
        # Another network: without the outputs that YuNet has.
        SQUARES.read_bytes().replace(b"kps_8", b"xps_8"),
    ],
    ids=["empty", "text", "bytes", "cut off", "another network"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(content)

    for asked_for in ("auto", "yunet"):
        with pytest.raises(InputError) as caught:
            detector_of(FaceConfig(face_detector=asked_for, face_detector_path=str(path)))
        (problem,) = caught.value.problems
        assert problem.field == "face_detector_path"
        assert problem.message.startswith(f"`{path}` is not YuNet's file (")
        assert problem.hint == f"give {YUNET_FILE}"


@pytest.mark.parametrize("path", ["missing.onnx", "."])
def test_a_path_that_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match=f"`{path}` cannot be read") as caught:
        detector_of(FaceConfig(face_detector_path=path))

    assert caught.value.problems[0].field == "face_detector_path"


def test_a_path_of_a_detector_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "faces.onnx").write_bytes(SQUARES.read_bytes())

    detector, _ = detector_of(FaceConfig(face_detector_path="~/faces.onnx"))

    assert detector.identity == f"yunet-{hashlib.sha256(SQUARES.read_bytes()).hexdigest()}"


def test_an_opencv_without_cascades_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "CascadeClassifier")

    with pytest.raises(InputError, match="has no cascades") as caught:
        detector_of(FaceConfig(face_detector="haar"))

    assert "opencv-python-headless>=4.13,<5" in caught.value.problems[0].hint
    assert detector_of(FaceConfig(face_detector_path=str(SQUARES)))[0].identity.startswith("yunet")


def test_an_opencv_without_files_of_cascades_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2.data, "haarcascades", str(tmp_path))

    with pytest.raises(InputError, match="has no file `haarcascade_frontalface_default.xml`"):
        detector_of(FaceConfig(face_detector="haar"))


def test_an_opencv_that_cannot_run_yunet_falls_back_or_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(cv2, "FaceDetectorYN")
    settings = FaceConfig(face_detector_path=str(SQUARES))

    detector, (warning,) = detector_of(settings)
    with pytest.raises(InputError, match="does not run it"):
        detector_of(settings.model_copy(update={"face_detector": "yunet"}))

    assert detector.identity.startswith("haar")
    assert "does not run it" in warning


def test_both_detectors_are_used_alike(yunet: FaceDetector, haar: FaceDetector) -> None:
    both: list[FaceDetector] = [yunet, haar]

    assert all(detector.identity for detector in both)
