"""Faces: their arithmetic, the masks of other people's heads, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.images.faces import Face, largest_first, others_removed, remarks_on_faces


def face(left: float, top: float, side: float, **changes: object) -> Face:
    return Face(**{"left": left, "top": top, "width": side, "height": side, "score": 1, **changes})


def texts(*faces: Face, others_count: bool = False) -> list[str]:
    remarks = remarks_on_faces(faces, (400, 600), others_count=others_count)
    return [remark.text for remark in remarks]


def upright_landmarks(turns: int = 0) -> tuple[tuple[float, float], ...]:
    """Those of a face about (100, 100), turned clockwise by so many quarters."""
    points = [(-10, -10), (10, -10), (0, 0), (-8, 12), (8, 12)]
    for _ in range(turns):
        points = [(-y, x) for x, y in points]
    return tuple((100.0 + x, 100.0 + y) for x, y in points)


def test_a_face_has_a_middle_and_an_area() -> None:
    wide = face(10, 20, 30, width=40)

    assert wide.centre == (30, 35)
    assert wide.area == 1200


def test_a_face_is_resized_and_moved_with_its_landmarks() -> None:
    known = face(10, 20, 30, landmarks=((12, 24), (30, 24), (20, 30), (14, 40), (28, 40)))

    resized, moved = known.scaled(2), known.moved(-5, 7)

    assert resized.box == (20, 40, 60, 60)
    assert resized.landmarks is not None
    assert resized.landmarks[0] == (24, 48)
    assert moved.box == (5, 27, 30, 30)
    assert moved.landmarks is not None
    assert moved.landmarks[4] == (23, 47)
    assert face(1, 2, 3).scaled(2).landmarks is None


def test_the_largest_face_comes_first_whatever_the_order() -> None:
    small, middle, large = face(0, 0, 10), face(50, 0, 20), face(0, 90, 30, score=0.1)

    assert largest_first([small, large, middle]) == (large, middle, small)
    assert largest_first([middle, small, large]) == (large, middle, small)


@pytest.mark.parametrize(("quarters", "lean"), [(0, 0), (1, 90), (2, 180), (3, -90)])
def test_eyes_and_mouth_say_how_a_head_leans(quarters: int, lean: float) -> None:
    found = face(80, 80, 40, landmarks=upright_landmarks(quarters))

    assert math.cos(math.radians(found.lean - lean)) == pytest.approx(1)


def test_other_heads_are_taken_out_of_the_mask_and_the_first_is_kept_whole() -> None:
    mask = np.ones((200, 300), np.float32)
    main, other = face(40, 80, 40), face(200, 80, 30)

    kept = others_removed(mask, [main, other], (200, 300))

    assert kept.dtype == np.float32
    # The other's middle, hair and ears; not what lies beside its head.
    assert kept[95, 215] == kept[95 - 26, 215] == kept[95, 215 - 21] == 0
    assert kept[95, 215 - 25] == kept[95 + 24, 215] == kept[40, 215] == 1
    # By hand: an ellipse of 0.75 and 0.825 sides.
    assert (kept == 0).sum() == pytest.approx(math.pi * 22.5 * 24.75, rel=0.02)
    assert mask.min() == 1


def test_a_head_beside_another_loses_nothing_to_it() -> None:
    mask = np.full((200, 200), 0.5, np.float32)
    main, other = face(60, 80, 50), face(100, 80, 40)

    kept = others_removed(mask, [main, other], (200, 200))

    alone = others_removed(mask, [face(900, 900, 1), main], (200, 200)) == 0
    assert (kept[alone] == 0.5).all()
    assert (kept == 0).any()


@pytest.mark.parametrize("shape", [(50, 75), (400, 600), (64, 64)])
def test_a_mask_of_any_resolution_loses_the_same_share(shape: tuple[int, int]) -> None:
    faces = [face(40, 80, 40), face(200, 80, 40)]

    kept = others_removed(np.ones(shape, np.float32), faces, (200, 300))

    assert (kept == 0).mean() == pytest.approx(math.pi * 30 * 33 / 60000, rel=0.06)


def test_hair_is_beside_a_head_that_lies_on_its_side() -> None:
    # Turned counter-clockwise it becomes upright: its hair is on the right.
    lying = face(100, 100, 40, turned=90)

    kept = others_removed(np.ones((300, 300), np.float32), [face(5, 5, 5), lying], (300, 300))

    assert kept[120, 120 + 37] == 0
    assert kept[120, 120 - 37] == 1


def test_one_face_or_none_takes_nothing_out() -> None:
    mask = np.full((20, 20), 0.3, np.float32)

    assert others_removed(mask, [], (20, 20)) is mask
    assert others_removed(mask, [face(0, 0, 10)], (20, 20)) is mask


@pytest.mark.parametrize("background", [0, 0.001, 0.04, 0.5])
def test_a_mask_that_shows_the_subject_in_other_heads_alone_is_not_taken(background: float) -> None:
    """Where nothing of the subject is, a mask has the weight that its bias gives to all pixels."""
    mask = np.full((200, 300), background, np.float32)
    mask[90:100, 210:220] = 1

    assert others_removed(mask, [face(40, 80, 40), face(200, 80, 40)], (200, 300)) is None


def test_without_a_stronger_head_the_first_has_the_largest_weight() -> None:
    mask = np.full((200, 300), 0.1, np.float32)
    mask[90:100, 210:220] = 1
    mask[90:100, 50:60] = 0.4

    kept = others_removed(mask, [face(40, 80, 40), face(200, 80, 40)], (200, 300))

    assert kept is not None
    assert kept.dtype == np.float32
    assert kept[95, 215] == 0
    assert kept[95, 55] == kept.max() == 1
    assert kept[5, 5] == pytest.approx(0.25)


def test_a_good_portrait_is_not_spoken_of() -> None:
    assert texts(face(200, 100, 150)) == []


def test_a_picture_without_a_face_is_spoken_of() -> None:
    assert texts() == ["shows no face that can be found; crop it by hand, or leave it out"]


def test_several_faces_are_counted() -> None:
    (text,) = texts(face(200, 100, 150), face(50, 50, 60), face(400, 50, 50))

    assert text == (
        "shows 3 faces: the largest is used, the others are left out of the loss; crop it to one "
        "person"
    )


def test_a_small_face_is_measured_against_the_shorter_side() -> None:
    # 48 of 400 is 12 %.
    assert texts(face(200, 100, 48)) == []
    (text,) = texts(face(200, 100, 46))

    assert text == (
        "shows a face of only 46 pixels, under 12% of its shorter side; crop it closer, or use a "
        "larger original"
    )


@pytest.mark.parametrize("turned", [90, -90])
def test_a_head_on_its_side_is_spoken_of(turned: float) -> None:
    assert texts(face(200, 100, 150, turned=turned)) == ["shows a head on its side; turn the photo"]
    assert texts(face(200, 100, 150, turned=turned / 3)) == []


def test_a_head_upside_down_is_spoken_of() -> None:
    expected = ["shows a head upside down; turn the photo"]
    assert texts(face(200, 100, 150, turned=180)) == expected
    assert texts(face(80, 80, 60, landmarks=upright_landmarks(2))) == expected


@pytest.mark.parametrize(
    ("left", "top"), [(-3, 100), (0.5, 100), (200, 0), (450, 100), (460, 100), (200, 249.5)]
)
def test_a_face_at_the_edge_is_spoken_of(left: float, top: float) -> None:
    assert texts(face(left, top, 150)) == ["shows a face that touches the edge of the picture"]


def test_other_faces_that_no_mask_takes_out_are_learned_too() -> None:
    two = face(200, 100, 150), face(400, 100, 120)
    assert "the others are left out of the loss" in texts(*two)[0]
    assert "the others are learned too" in texts(*two, others_count=True)[0]
