"""Pictures prepared by the same steps in other orders: pixels, masks, faces and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grid import encoded, picture_set
from PIL import Image

from trainer.config import FaceConfig, MaskConfig
from trainer.data.masking import Masking
from trainer.data.means import Means
from trainer.data.store import Store
from trainer.data.views import Darkroom, Rendering
from trainer.fields import PREPARATION_STEPS
from trainer.images.crop import Box
from trainer.images.faces import Face
from trainer.images.masks import MaskOrigin
from trainer.images.pictures import BadPicture
from trainer.sections.data import in_order

SIDE = 96
RATIO, UPSCALE = 1.5, 2
# Off the middle, so that windows and squares are cut short at its sides.
FACE = Face(
    left=130,
    top=100,
    width=60,
    height=60,
    score=0.9,
    landmarks=((145, 120), (175, 120), (160, 132), (150, 145), (170, 145)),
)
ORDERS = list(permutations(PREPARATION_STEPS))
CUT_LATER = [o for o in ORDERS if o.index("resize") < o.index("face_crop_region")]


@dataclass
class OneFace:
    """Finds one face in pictures that are small enough to be looked at as they are."""

    face: Face = FACE
    identity: str = "one face"

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        return (self.face,)


def darkroom(root: Path, *, found: Face = FACE, **options: Any) -> Darkroom:
    """One that cuts to the face and redraws nothing in it but enlarges, in this order."""
    wishes: dict[str, Any] = {
        "width": SIDE,
        "height": SIDE,
        "face": FaceConfig(
            face_crop_region=RATIO, face_restore="gfpgan_1.4", face_restore_upscale=UPSCALE
        ),
        **options,
    }
    means = Means(OneFace(found), ("same", lambda aligned: aligned))
    return Darkroom(picture_set(root, **wishes), lambda: means, Store(root / "store"))


def noise(height: int = 240, width: int = 320) -> Image.Image:
    """Every pixel is another one: no two ways through sizes and cuts give the same."""
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


# The steps a second time, on a picture and the box of its face.
Seen = tuple[Image.Image, Box]


def by_hand_cut(seen: Seen) -> Seen:
    image, (left, top, width, height) = seen
    side = min(round(RATIO * max(width, height)), *image.size)
    x = min(max(round(left + width / 2 - side / 2), 0), image.width - side)
    y = min(max(round(top + height / 2 - side / 2), 0), image.height - side)
    return image.crop((x, y, x + side, y + side)), (left - x, top - y, width, height)


def by_hand_scaled(seen: Seen, width: int, height: int) -> Seen:
    image, box = seen
    factor = width / image.width
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top, across, down = (value * factor for value in box)
    return scaled, (left, top, across, down)


def by_hand_enlarged(seen: Seen) -> Seen:
    return by_hand_scaled(seen, UPSCALE * seen[0].width, UPSCALE * seen[0].height)


def by_hand_resized(seen: Seen, width: int = SIDE, height: int = SIDE) -> Seen:
    image = seen[0]
    factor = max(width / image.width, height / image.height)
    size = round(image.width * factor), round(image.height * factor)
    image, (left, top, across, down) = by_hand_scaled(seen, *size)
    x, y = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((x, y, x + width, y + height)), (left - x, top - y, across, down)


BY_HAND: Mapping[str, Callable[[Seen], Seen]] = {
    "face_crop_region": by_hand_cut,
    "face_restore": by_hand_enlarged,
    "resize": by_hand_resized,
}


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_the_steps_run_in_the_order_given(tmp_path: Path, order: tuple[str, ...]) -> None:
    seen: Seen = noise(), FACE.box
    for step in order:
        seen = BY_HAND[step](seen)
    expected, box = by_hand_resized(seen)

    rendering = darkroom(tmp_path, preparation_order=order).rendering(encoded(noise()), "s", "a")

    np.testing.assert_array_equal(rendering.image(), expected)
    view = rendering.view
    (face,) = view.faces_at(view.size)
    np.testing.assert_allclose(face.box, box, atol=0.5)
    assert "has its face redrawn" in [remark.text for remark in view.remarks]


def test_no_two_orders_give_the_same_picture(tmp_path: Path) -> None:
    content = encoded(noise())

    pictures = {
        darkroom(tmp_path, preparation_order=order).rendering(content, "s", "a").sha256
        for order in ORDERS
    }

    assert len(pictures) == len(ORDERS)


def test_a_step_that_is_left_out_takes_its_usual_place() -> None:
    cut, redraw, resize = PREPARATION_STEPS

    assert [in_order(steps) for steps in ((), (cut,), (redraw,), (resize,), (cut, resize))] == [
        PREPARATION_STEPS
    ] * 5
    assert in_order((resize, cut)) == (resize, cut, redraw)
    assert in_order((redraw, cut)) == (redraw, cut, resize)
    assert in_order((resize, redraw)) == (cut, resize, redraw)


def slope(height: int, width: int) -> Image.Image:
    """Red is six times the column, green is six times the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 6 * np.arange(width)
    pixels[..., 1] = 6 * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def given(rendering: Rendering, mask: Image.Image, root: Path) -> np.ndarray:
    """The weights of a mask file at the rendering's scale."""
    masking = Masking(MaskConfig(), of_class=False, one_subject=False, store=Store(root))
    origin = MaskOrigin(kind="given", inverted=False)
    return masking.made(origin, rendering.view, encoded(mask), lambda: rendering).weights


@pytest.mark.parametrize("order", CUT_LATER, ids=" ".join)
def test_masks_follow_a_picture_that_is_cut_between_two_of_its_pixels(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    # 36 x 42 pixels are enlarged to 96 x 112 before the square is cut.
    image = slope(36, 42)
    cut_out = image.copy()
    cut_out.putalpha(image.getchannel(0))
    room = darkroom(tmp_path, found=FACE.scaled(1 / 7), preparation_order=order)

    rendering = room.rendering(encoded(image), "sha", "a.png")
    alpha = room.rendering(encoded(cut_out), "other sha", "a.png").alpha

    red, green, _ = (np.asarray(band, float) for band in rendering.image().split())
    assert alpha is not None
    inner = slice(8, -8), slice(8, -8)
    np.testing.assert_allclose(255 * alpha[inner], red[inner], atol=2)
    for factor in (1, 2):
        size = factor * image.width, factor * image.height
        for band, values in ((0, red), (1, green)):
            mask = image.getchannel(band).resize(size, Image.Resampling.BILINEAR)
            weights = given(rendering, mask, tmp_path)
            np.testing.assert_allclose(255 * weights[inner], values[inner], atol=2)


def test_a_resize_to_another_size_cuts_to_its_shape_and_trains_the_usual_one(
    tmp_path: Path,
) -> None:
    order = ("face_crop_region", "resize", "face_restore")
    options = {"preparation_order": order, "resize_width": 40, "resize_height": 60}
    seen = by_hand_resized(by_hand_cut((noise(), FACE.box)), 40, 60)
    covering, _ = by_hand_scaled(by_hand_enlarged(seen), 96, 144)

    room = darkroom(tmp_path, **options)
    rendering = room.rendering(encoded(noise()), "s", "a")

    np.testing.assert_array_equal(rendering.image(), covering)
    assert (rendering.view.size, rendering.view.target) == ((144, 96), (96, 96))
    # Denoisers are told how few pixels it had.
    assert rendering.view.original_size == (60, 40)


def test_the_original_size_is_the_least_that_the_picture_ever_had(tmp_path: Path) -> None:
    def told(order: tuple[str, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        view = darkroom(tmp_path, preparation_order=order).rendering(content, "s", "a").view
        return view.original_size, view.region_size

    content = encoded(noise())

    # 240 rows become 96: the square of 1.5 * 60 * 0.4 pixels is one of 90 in the whole picture.
    assert told(("resize", "face_crop_region")) == ((36, 36), (90, 90))
    assert told(("face_crop_region", "resize", "face_restore")) == ((90, 90), (90, 90))
    assert told(()) == ((90, 90), (90, 90))


def test_a_window_over_the_face_keeps_it_where_the_middle_one_would_not(tmp_path: Path) -> None:
    beside = FACE.moved(-125, 0)
    order = ("resize", "face_crop_region")

    middle, over_the_face = (
        darkroom(
            tmp_path,
            found=beside,
            preparation_order=order,
            center_crop=False,
            face_aware_cropping=aware,
        )
        .rendering(encoded(noise()), "s", "a")
        .view
        for aware in (False, True)
    )

    assert (middle.faces_in_region(), middle.region) == ((), (40, 0, 240, 240))
    assert len(over_the_face.faces_in_region()) == 1
    assert over_the_face.region_size == (90, 90)


def test_a_strip_is_refused_before_it_is_enlarged(tmp_path: Path) -> None:
    strip = encoded(Image.new("RGB", (2000, 100), "red"))

    with pytest.raises(BadPicture, match="2000x100 pixels, 20:1"):
        darkroom(tmp_path, preparation_order=("resize", "face_crop_region")).rendering(
            strip, "s", "a"
        )


def test_what_is_kept_of_pictures_is_told_apart_by_what_changes_them_alone(tmp_path: Path) -> None:
    def request(**options: Any) -> str:
        return darkroom(tmp_path, **options).request("sha", "a.png")

    faceless = {"face": FaceConfig()}
    usual = request()
    others = {request(preparation_order=order) for order in ORDERS}

    assert len(others) == len(ORDERS)
    assert usual in others
    assert request(preparation_order=("resize",)) == usual
    assert request(resize_width=40) not in others
    assert request(resize_height=40) != request(resize_width=40)
    assert request(**faceless, preparation_order=ORDERS[-1]) == request(**faceless)
    assert request(of_class=True, preparation_order=ORDERS[-1], resize_width=40) == request(
        of_class=True
    )
