"""Redrawing faces: alignment by hand arithmetic, and restorers simple enough to know the answer."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from skimage import data as photographs
from skimage.transform import SimilarityTransform
from torch.torch_version import TorchVersion

from trainer.config import FaceConfig
from trainer.errors import InputError
from trainer.events import StageEvent
from trainer.images import restore
from trainer.images.crop import Pixels
from trainer.images.faces import Face
from trainer.images.restore import (
    LICENCES,
    RESTORERS,
    SIDE,
    TEMPLATE,
    aligned_face,
    alignment,
    restored,
    restorer_from,
    restorer_of,
)

Made = TypeVar("Made")

# The astronaut's eyes, nose and corners of the mouth, by eye.
LANDMARKS = ((203.0, 100.0), (246.0, 103.0), (225.0, 124.0), (205.0, 143.0), (243.0, 142.0))


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(photographs.astronaut())


def face(factor: float = 1.0, **changes: object) -> Face:
    box = {"left": 178, "top": 75, "width": 94, "height": 115}
    values = {**box, "score": 1, "landmarks": LANDMARKS, **changes}
    return Face.model_validate(values).scaled(factor)


def same(pixels: Pixels) -> Pixels:
    return pixels


def inverted(pixels: Pixels) -> Pixels:
    return 255 - pixels


def blurred(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(12)))


def returned(making: Generator[StageEvent, None, Made]) -> tuple[Made, list[StageEvent]]:
    """What is made, and what is told on the way."""
    told = []
    while True:
        try:
            told.append(next(making))
        except StopIteration as end:
            return end.value, told


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return -10 * math.log10(max(((one.astype(float) - other) ** 2).mean() / 255**2, 1e-12))


def test_landmarks_of_the_template_need_no_move() -> None:
    np.testing.assert_allclose(alignment(TEMPLATE), np.eye(3), atol=1e-9)


def test_a_turned_scaled_and_moved_face_is_brought_back() -> None:
    turn = SimilarityTransform(scale=0.3, rotation=0.7, translation=(40, -15))

    found = alignment([(float(x), float(y)) for x, y in turn(np.array(TEMPLATE))])

    np.testing.assert_allclose(found @ turn.params, np.eye(3), atol=1e-9)


def test_the_alignment_is_that_of_scikit_image() -> None:
    # An independent implementation of Umeyama's estimate, for landmarks that fit only roughly.
    expected = SimilarityTransform.from_estimate(np.array(LANDMARKS), np.array(TEMPLATE))

    np.testing.assert_allclose(alignment(LANDMARKS), expected.params, atol=1e-6)


def test_the_aligned_face_has_its_eyes_on_the_template(astronaut: Image.Image) -> None:
    spots = np.zeros((512, 512, 3), np.uint8)
    spots[98:103, 201:206] = 255

    aligned = aligned_face(Image.fromarray(spots), alignment(LANDMARKS))

    assert aligned.shape == (SIDE, SIDE, 3)
    y, x = np.argwhere(aligned[..., 0] > 128).mean(axis=0)
    assert (x, y) == pytest.approx(TEMPLATE[0], abs=5)


def test_a_restorer_that_changes_nothing_leaves_every_pixel(astronaut: Image.Image) -> None:
    done, remarks = restored(astronaut, [face()], same, upscale=1)

    np.testing.assert_array_equal(np.asarray(done), np.asarray(astronaut))
    assert [remark.text for remark in remarks] == ["has its face redrawn"]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_what_is_redrawn_comes_back_to_where_it_was(astronaut: Image.Image, factor: float) -> None:
    size = (round(512 * factor), round(512 * factor))
    # Smooth, so that what the two resamplings lose is not what is measured.
    picture = astronaut.filter(ImageFilter.GaussianBlur(3)).resize(size)

    done, _ = restored(picture, [face(factor)], inverted, upscale=1)

    middle = tuple(slice(round(a * factor), round(b * factor)) for a, b in ((105, 165), (200, 250)))
    before, after = np.asarray(picture)[middle], np.asarray(done)[middle]
    assert psnr(255 - after, before) > 40


def test_only_the_face_changes(astronaut: Image.Image) -> None:
    done, _ = restored(astronaut, [face()], blurred, upscale=1)

    changed = (np.asarray(done) != np.asarray(astronaut)).any(axis=2)
    rows, columns = np.nonzero(changed)
    # The box is 178 … 272 and 75 … 190.
    assert rows.min() > 40
    assert rows.max() < 215
    assert columns.min() > 145
    assert columns.max() < 300
    assert changed[100:170, 205:245].mean() > 0.8


def test_the_change_fades_out(astronaut: Image.Image) -> None:
    flat = Image.new("RGB", astronaut.size, (100, 100, 100))

    done, _ = restored(flat, [face()], lambda pixels: pixels + 100, upscale=1)

    across = np.asarray(done)[135, :, 0].astype(int)
    assert across[225] == 200
    assert across[100] == 100
    # Over about a quarter of the radius, 100 levels: no step is an edge.
    assert np.abs(np.diff(across)).max() < 20


def test_every_face_that_can_be_is_redrawn(astronaut: Image.Image) -> None:
    both = Image.new("RGB", (1024, 512))
    both.paste(astronaut, (0, 0))
    both.paste(astronaut, (512, 0))

    done, remarks = restored(both, [face(), face().moved(512, 0)], inverted, upscale=1)

    pixels = np.asarray(done).astype(int)
    # Sums of other numbers are rounded elsewhere.
    np.testing.assert_allclose(pixels[:, :512], pixels[:, 512:], atol=1)
    assert psnr(pixels[:, :512], np.asarray(astronaut)) < 30
    assert [remark.text for remark in remarks] == ["has 2 faces redrawn"]


def test_a_picture_with_a_redrawn_face_is_enlarged(astronaut: Image.Image) -> None:
    done, _ = restored(astronaut, [face()], inverted, upscale=1.5)

    large = astronaut.resize((768, 768), Image.Resampling.LANCZOS)
    assert done.size == (768, 768)
    np.testing.assert_array_equal(np.asarray(done)[400:], np.asarray(large)[400:])
    # The middle of the nose and cheeks.
    after = np.asarray(done)[180:240, 310:370]
    assert psnr(255 - after, np.asarray(large)[180:240, 310:370]) > 30


def test_a_face_at_the_edge_is_redrawn_as_far_as_it_is_there(astronaut: Image.Image) -> None:
    cut = astronaut.crop((225, 0, 512, 512))

    done, _ = restored(cut, [face().moved(-225, 0)], inverted, upscale=1)

    assert (np.asarray(done)[135, 2] != np.asarray(cut)[135, 2]).any()
    np.testing.assert_array_equal(np.asarray(done)[300:], np.asarray(cut)[300:])


def test_a_face_outside_the_picture_is_neither_redrawn_nor_spoken_of(
    astronaut: Image.Image,
) -> None:
    outside = [face().moved(2000, -3000), face(landmarks=None).moved(-240, 0)]

    assert restored(astronaut, outside, inverted, upscale=2) == (astronaut, ())
    _, remarks = restored(astronaut, [face(), *outside], same, upscale=1)
    assert [remark.text for remark in remarks] == ["has its face redrawn"]


def test_where_faces_overlap_the_change_is_no_greater() -> None:
    flat = Image.new("RGB", (512, 512), (100, 100, 100))
    near = [face(), face().moved(20, 8), face().moved(-20, 0)]

    one, three = (
        np.asarray(restored(flat, faces, lambda pixels: pixels + 100, upscale=1)[0])[..., 0]
        for faces in (near[:1], near)
    )

    assert one.max() == 200
    # Each of the three is rounded.
    assert three.max() <= 202
    assert three[135, 225] == pytest.approx(200, abs=2)
    assert (three.astype(int) >= one.astype(int) - 2).all()


@pytest.mark.parametrize(
    ("found", "kind", "text"),
    [
        (
            face(landmarks=None),
            "warning",
            "keeps its face as it is: face_restore needs the face detector YuNet",
        ),
        (face(0.1), "info", "has a face too small to be redrawn"),
        (
            face(5).moved(-870, -410),
            "info",
            "has a face large enough not to be redrawn",
        ),
    ],
)
def test_a_face_that_cannot_gain_is_left_alone(
    astronaut: Image.Image, found: Face, kind: str, text: str
) -> None:
    done, remarks = restored(astronaut, [found, found], inverted, upscale=2)

    assert done is astronaut
    assert [(remark.kind, remark.text) for remark in remarks] == [(kind, text)]


def test_a_picture_without_faces_is_left_alone(astronaut: Image.Image) -> None:
    assert restored(astronaut, [], inverted, upscale=2) == (astronaut, ())


def test_a_network_sees_and_gives_values_from_minus_one_to_one() -> None:
    seen = []

    def negated(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return -values

    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0, :, 1] = np.arange(SIDE) // 2

    done = restorer_from(negated, "cpu")(pixels)

    np.testing.assert_array_equal(done, 255 - pixels)
    assert seen[0].shape == (1, 3, SIDE, SIDE)
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 1, 0, 0] == -1
    assert seen[0][0, 1, 0, -1] == 1


def test_a_convolution_restores_only_the_face(astronaut: Image.Image) -> None:
    blur = torch.nn.Conv2d(3, 3, 9, padding=4, groups=3, bias=False)
    torch.nn.init.constant_(blur.weight, 1 / 81)

    done, _ = restored(astronaut, [face()], restorer_from(blur, "cpu"), upscale=1)

    changed = (np.asarray(done) != np.asarray(astronaut)).any(axis=2)
    assert changed[90:180, 195:255].mean() > 0.3
    assert not changed[:, :140].any()
    assert not changed[220:].any()


def test_every_restorer_has_its_licence_told() -> None:
    assert set(RESTORERS) == set(LICENCES)


def test_a_restorer_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)

    with pytest.raises(InputError) as caught:
        returned(restorer_of(FaceConfig(face_restore="gfpgan_1.4")))

    (problem,) = caught.value.problems
    assert problem.field == "face_restore"
    assert "`gfpgan_1.4` needs spandrel and torchvision" in problem.message
    assert "pip install 'tok-trainer[restore]'" in problem.hint


class Web:
    """Stands in for the way to outside addresses, and counts how often it is taken."""

    def __init__(self, content: bytes, refusal: InputError | None = None) -> None:
        self.content = content
        self.refusal = refusal
        self.asked: list[str] = []

    def download(
        self, url: str, field: str, target: BinaryIO, *, limit: int
    ) -> Iterator[tuple[int, int | None]]:
        self.asked.append(url)
        assert len(self.content) <= limit
        target.write(self.content[:3])
        yield 3, None
        if self.refusal is not None:
            raise self.refusal
        target.write(self.content[3:])


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """One file behind every address, and an empty cache."""
    content = b"the official weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(restore, "GFPGAN_SHA256", hashlib.sha256(content).hexdigest())
    web = Web(content)
    monkeypatch.setattr(restore, "download", web.download)
    return web


def test_weights_are_downloaded_once_and_kept(web: Web, tmp_path: Path) -> None:
    first, _ = returned(restore._gfpgan_weights(FaceConfig()))
    second, told = returned(restore._gfpgan_weights(FaceConfig()))

    assert (
        first == second == (tmp_path / "tok-trainer/weights/GFPGANv1.4.pth", restore.GFPGAN_SHA256)
    )
    assert first[0].read_bytes() == web.content
    assert web.asked == [restore.GFPGAN_URL]
    assert told == []


def test_a_download_of_weights_tells_how_far_it_is(web: Web) -> None:
    _, told = returned(restore._gfpgan_weights(FaceConfig()))

    # 348,632,874 bytes.
    assert told == [StageEvent("download", 0, 332)]


def test_weights_with_another_checksum_are_deleted(web: Web, tmp_path: Path) -> None:
    web.content = b"something else"

    with pytest.raises(InputError, match="`GFPGANv1.4.pth`: its checksum differs") as caught:
        returned(restore._gfpgan_weights(FaceConfig()))

    assert caught.value.problems[0].field == "face_restore"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_that_stops_leaves_nothing_and_says_what_to_do(web: Web, tmp_path: Path) -> None:
    web.refusal = InputError.of("face_restore", "it stopped after 3 bytes", "try again")

    with pytest.raises(InputError, match="it stopped after 3 bytes") as caught:
        returned(restore._gfpgan_weights(FaceConfig()))

    assert "face_restorer_path" in caught.value.problems[0].hint
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_weights_of_ones_own_are_taken_as_they_are(web: Web, tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"mine")

    found, _ = returned(restore._gfpgan_weights(FaceConfig(face_restorer_path=str(path))))

    assert found == (path, hashlib.sha256(b"mine").hexdigest())
    assert web.asked == []


def test_weights_that_are_not_there_are_refused(web: Web) -> None:
    with pytest.raises(InputError, match="`gone.pth` cannot be used: No such file") as caught:
        returned(restore._gfpgan_weights(FaceConfig(face_restorer_path="gone.pth")))

    assert caught.value.problems[0].field == "face_restorer_path"


class _Program:
    """What no file of weights may hold."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("a pickle ran",)


@pytest.mark.parametrize("name", ["mine.pth", "mine.safetensors"])
def test_weights_that_are_no_weights_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not weights at all")

    with pytest.raises(InputError, match=f"`{path}` cannot be used") as caught:
        restore._tensors(path, "")

    assert caught.value.problems[0].field == "face_restorer_path"


def test_a_pickle_that_runs_programs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.pth"
    torch.save({"params_ema": _Program()}, path)

    with pytest.raises(InputError, match="cannot be used"):
        restore._tensors(path, "")

    assert "a pickle ran" not in capsys.readouterr().out


def test_weights_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    tensors = {"one": torch.arange(3.0)}
    torch.save({"params_ema": tensors}, tmp_path / "mine.pth")
    save_file(tensors, tmp_path / "mine.safetensors")

    pickled = restore._tensors(tmp_path / "mine.pth", "")["params_ema"]
    plain = restore._tensors(tmp_path / "mine.safetensors", "")

    assert torch.equal(pickled["one"], plain["one"])


def test_a_path_of_weights_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pth").write_bytes(b"mine")

    (path, _), _ = returned(restore._gfpgan_weights(FaceConfig(face_restorer_path="~/mine.pth")))

    assert path == tmp_path / "mine.pth"


@pytest.mark.parametrize(("version", "is_read"), [("2.9.1", False), ("2.10.0", True)])
def test_pickles_of_unknown_make_are_read_only_by_a_torch_that_can_do_so_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_read: bool
) -> None:
    """CVE-2026-24747: before torch 2.10 a pickle could run code though only tensors were asked."""
    path = tmp_path / "mine.pth"
    torch.save({"one": torch.arange(3.0)}, path)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))

    assert "one" in restore._tensors(path, restore.GFPGAN_SHA256)
    if is_read:
        assert "one" in restore._tensors(path, "another checksum")
    else:
        with pytest.raises(InputError, match=f"torch {version} cannot read safely") as caught:
            restore._tensors(path, "another checksum")
        assert "install torch>=2.10" in caught.value.problems[0].hint
