"""Pictures at the trained scale, with what was found on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grid import encoded, grid_bytes, grid_image, picture_set
from PIL import Image

from trainer.config import FaceConfig
from trainer.data import views
from trainer.data.means import Means
from trainer.data.store import Store
from trainer.data.views import Darkroom, Rendering, has_room
from trainer.images.crop import Pixels, Size
from trainer.images.faces import Face, Point
from trainer.images.pictures import BadPicture
from trainer.images.restore import Restorer

# Right and left eye, nose, corners of the mouth of a face 40 pixels wide at (100, 60).
LANDMARKS: tuple[Point, ...] = ((112, 75), (128, 75), (120, 82), (114, 90), (126, 90))
FACE = Face(left=100, top=60, width=40, height=40, score=0.9, landmarks=LANDMARKS)


@dataclass
class Detector:
    """Finds what it was told to find."""

    faces: tuple[Face, ...] = (FACE,)
    identity: str = "detector"
    asked: list[Size] = field(default_factory=list)

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        self.asked.append((image.height, image.width))
        return self.faces


def darkroom(
    root: Path,
    *,
    detector: Detector | None = None,
    restorer: tuple[str, Restorer] | None = None,
    **wishes: Any,
) -> Darkroom:
    """One that trains 64 x 64 and looks for no faces, unless told otherwise."""
    options = {"face_aware_cropping": detector is not None, "center_crop": False, **wishes}
    means = Means(detector, restorer)
    return Darkroom(picture_set(root, **options), lambda: means, Store(root / "store"))


def close(ratio: float, **options: Any) -> FaceConfig:
    return FaceConfig(face_crop_region=ratio, **options)


def test_without_faces_the_whole_picture_is_at_the_trained_scale(tmp_path: Path) -> None:
    rendering = darkroom(tmp_path).rendering(grid_bytes(80, 120), "sha", "a.png")

    view = rendering.view
    assert (view.picture_size, view.region) == ((80, 120), (0, 0, 120, 80))
    assert (view.size, view.target, view.original_size) == ((64, 96), (64, 64), (80, 120))
    assert (view.has_alpha, view.faces_sought, view.faces) == (False, False, ())
    assert (rendering.image().mode, rendering.image().size) == ("RGB", (96, 64))
    with Image.open(BytesIO(rendering.thumbnail)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (120, 80))


def test_the_trained_size_is_the_one_nearest_in_shape(tmp_path: Path) -> None:
    room = darkroom(tmp_path, enable_bucket=True)

    targets = [
        room.rendering(grid_bytes(*size), f"{size}", "a.png").view.target
        for size in ((100, 100), (60, 100), (100, 60))
    ]

    # Of about 64 x 64 pixels, in steps of 16.
    assert targets == [(64, 64), (48, 80), (80, 48)]


def test_a_picture_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BadPicture):
        darkroom(tmp_path).rendering(b"text", "sha", "a.png")

    assert not (tmp_path / "store").exists()


def test_a_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = darkroom(tmp_path).rendering(grid_bytes(80, 80), "sha", "a.png")
    monkeypatch.delattr(views, "decode")

    again = darkroom(tmp_path).rendering(b"not looked at", "sha", "b.png")

    assert (again.view, again.picture, again.thumbnail) == (
        *(first.view, first.picture, first.thumbnail),
    )


def test_a_rendering_is_the_same_bytes_packed_and_unpacked(tmp_path: Path) -> None:
    cut_out = grid_image(80, 80)
    cut_out.putalpha(grid_image(80, 80).getchannel("R"))
    restorer = "name", lambda aligned: aligned // 2
    room = darkroom(
        tmp_path, detector=Detector(), restorer=restorer, face=close(2, face_restore="gfpgan_1.4")
    )
    for content in (encoded(cut_out), grid_bytes(200, 256)):
        rendering = room.rendering(content, f"{len(content)}", "a.png")

        packed = rendering.packed()

        unpacked = Rendering.unpacked(packed)
        assert unpacked.packed() == packed
        assert (unpacked.view, unpacked.restored) == (rendering.view, rendering.restored)
        assert (unpacked.alpha is None) == (rendering.alpha is None)
        if rendering.alpha is not None:
            np.testing.assert_array_equal(unpacked.alpha, rendering.alpha)


def test_the_request_holds_what_is_wanted_and_not_what_this_machine_has(tmp_path: Path) -> None:
    one, other = Detector(), Detector(faces=(), identity="another detector")
    room = darkroom(tmp_path, detector=one)

    changes: tuple[dict[str, Any], ...] = (
        {"detector": one, "height": 96},
        {"detector": one, "face": close(1.4)},
        {"detector": one, "of_class": True},
        {"detector": None},
    )

    same = darkroom(tmp_path, detector=other)
    assert same.request("sha", "a.png") == room.request("sha", "b.png")
    requests = {darkroom(tmp_path, **change).request("sha", "a.png") for change in changes}
    others = {
        room.request("sha", "a.png"),
        room.request("sha", "a.jpg"),
        room.request("x", "a.png"),
    }
    assert len(requests | others) == 7
    # But what one detector found is not taken for what another would find.
    assert len(room.rendering(grid_bytes(200, 256), "sha", "a.png").view.faces) == 1
    assert len(same.rendering(grid_bytes(200, 256), "sha", "a.png").view.faces) == 0


def test_faces_are_told_in_pixels_of_the_whole_picture_and_of_the_trained_scale(
    tmp_path: Path,
) -> None:
    view = darkroom(tmp_path, detector=Detector()).rendering(grid_bytes(128, 256), "s", "a").view

    assert view.faces == (FACE,)
    # 128 rows become 64.
    assert [face.box for face in view.faces_at(view.size)] == [(50, 30, 20, 20)]


def test_faces_are_sought_in_a_smaller_copy_of_a_large_picture(tmp_path: Path) -> None:
    detector = Detector()
    large = Image.new("RGB", (3200, 1600), "red")

    view = darkroom(tmp_path, detector=detector).rendering(encoded(large), "s", "a.png").view

    assert detector.asked == [(640, 1280)]
    assert [face.box for face in view.faces] == [(250, 150, 100, 100)]


@pytest.mark.parametrize(
    ("size", "asked"), [((80, 80), 0), ((80, 120), 1), ((120, 80), 1)], ids=str
)
def test_where_only_windows_are_at_stake_a_picture_without_room_is_not_looked_at(
    tmp_path: Path, size: Size, asked: int
) -> None:
    detector = Detector()

    room = darkroom(tmp_path, detector=detector, of_class=True)
    room.rendering(grid_bytes(*size), "s", "a.png")

    assert len(detector.asked) == asked
    assert has_room(size, (64, 64)) == bool(asked)


def test_a_picture_is_cut_to_a_square_around_its_largest_face(tmp_path: Path) -> None:
    room = darkroom(tmp_path, detector=Detector(), face=close(2))

    rendering = room.rendering(grid_bytes(200, 256), "sha", "a.png")

    # Twice the face's 40 pixels, about its middle at (120, 80).
    view = rendering.view
    assert (view.region, view.original_size) == ((80, 40, 80, 80), (80, 80))
    assert (view.picture_size, view.size) == ((200, 256), (64, 64))
    assert [face.box for face in view.faces_at(view.size)] == [(16, 16, 32, 32)]
    red, green, _ = rendering.image().getpixel((0, 0))
    assert (abs(red - 80) <= 1, abs(green - 40) <= 1) == (True, True)


def test_the_opacity_is_cut_along(tmp_path: Path) -> None:
    image = grid_image(200, 256).convert("RGBA")
    opacity = Image.new("L", image.size)
    opacity.paste(255, (120, 0, 256, 200))
    image.putalpha(opacity)
    room = darkroom(tmp_path, detector=Detector(), face=close(2))

    alpha = room.rendering(encoded(image), "sha", "a.png").alpha

    # Columns 80 to 160 of the picture are kept, opaque from 120 on.
    assert alpha is not None
    assert alpha.shape == (64, 64)
    assert alpha[:, :30].max() == 0
    assert alpha[:, 34:].min() == 1


def test_a_picture_without_a_face_is_not_cut(tmp_path: Path) -> None:
    room = darkroom(tmp_path, detector=Detector(faces=()), face=close(2))

    view = room.rendering(grid_bytes(200, 256), "sha", "a.png").view

    assert view.region == (0, 0, 256, 200)


def test_faces_are_restored_in_what_is_used_and_shown_before_and_after(tmp_path: Path) -> None:
    seen = []

    def black(aligned: Pixels) -> Pixels:
        seen.append(aligned.shape)
        return np.zeros_like(aligned)

    face = close(2, face_restore="gfpgan_1.4", face_restore_upscale=2)
    room = darkroom(tmp_path, detector=Detector(), face=face, restorer=("black", black))

    rendering = room.rendering(grid_bytes(200, 256, blue=200), "sha", "a.png")

    assert seen == [(512, 512, 3)]
    assert rendering.restored is not None
    before, after = (
        np.asarray(Image.open(BytesIO(face)).convert("L"), float).mean()
        for face in rendering.restored
    )
    assert after < before - 30
    # What is trained was enlarged to 160 pixels before it came to its 64.
    assert rendering.view.region == (80, 40, 80, 80)
    assert rendering.view.size == (64, 64)
    assert rendering.image().getpixel((32, 32)) == (0, 0, 0)
    assert "has its face redrawn" in [remark.text for remark in rendering.view.remarks]


def test_a_strip_that_would_cover_many_windows_is_left_out(tmp_path: Path) -> None:
    strip = encoded(Image.new("RGB", (2000, 100), "red"))

    with pytest.raises(BadPicture, match="2000x100 pixels, 20:1; cut it"):
        darkroom(tmp_path).rendering(strip, "sha", "a.png")
    panorama = encoded(Image.new("RGB", (1000, 100), "red"))
    assert darkroom(tmp_path).rendering(panorama, "sha", "a.png").view.size == (64, 640)


def test_a_face_that_needs_no_redrawing_is_not_shown_before_and_after(tmp_path: Path) -> None:
    large = FACE.scaled(20)
    room = darkroom(
        tmp_path,
        detector=Detector(faces=(large,)),
        restorer=("black", np.zeros_like),
        face=FaceConfig(face_restore="gfpgan_1.4"),
    )

    rendering = room.rendering(encoded(Image.new("RGB", (3000, 3000), "red")), "s", "a.png")

    assert rendering.restored is None


def test_faces_beside_the_cut_count_no_more(tmp_path: Path) -> None:
    beside = FACE.moved(-90, -50)
    room = darkroom(tmp_path, detector=Detector(faces=(FACE, beside)), face=close(2))

    view = room.rendering(grid_bytes(200, 256), "sha", "a.png").view

    assert view.faces == (FACE, beside)
    assert len(view.faces_in_region()) == 1


def test_what_a_makeshift_detector_found_is_marked(tmp_path: Path) -> None:
    wanted = picture_set(tmp_path, face_aware_cropping=True, center_crop=False)
    for makeshift in (False, True):
        means = Means(Detector(identity=f"{makeshift}"), are_makeshift=makeshift)
        room = Darkroom(wanted, lambda means=means: means, Store(tmp_path / "store"))

        view = room.rendering(grid_bytes(200, 256), "sha", "a.png").view

        assert view.is_makeshift == makeshift
