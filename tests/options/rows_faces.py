"""Rows of the section face: how faces are found, cut out and restored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from options.bases import FACES
from options.case import Case, near, pictures
from options.matrix import Leaves, Place, acts, idle, refused
from options.onlookers import SHADES
from options.probe import Probe
from options.rows_windows import OVER_HEADS, UPPER_MIDDLE, windows_are
from options.world import HEAD, HEADS, SHAPES, SIDE, person
from PIL import Image

Shows = Callable[[Case], None]

AWARE: Leaves = {**FACES, "face_aware_cropping": True}
RESTORED: Leaves = {**FACES, "face_restorer_path": Place("restorer"), "face_restore": "gfpgan_1.4"}
# Twice the side of the pictures' shorter side: they are enlarged.
ENLARGED: Leaves = {**RESTORED, "resolution_width": 128, "resolution_height": 128}
# How far from the middle of a face its halves are looked at, and how far a redrawn one reaches:
# the ellipse's 216 of 512 pixels, at 126 pixels for the 0.4 sides between the eyes.
BESIDE, REACH = 4, 18


def seen(probe: Probe) -> dict[str, torch.Tensor]:
    """The pixels (3, H, W) of each picture in the first step."""
    (pixels,) = probe.first.pixels
    return dict(zip(pictures(pixels), pixels, strict=True))


def middle_of_face(factor: int = 1) -> tuple[int, int]:
    """(row, column) in the middle window of the portrait, in which its face is whole.

    Args:
        factor: by which the picture is enlarged.
    """
    (left, top), (height, width) = HEADS["portrait"], SHAPES["portrait"]
    row, column = top + HEAD // 2 - (height - width) // 2, left + HEAD // 2
    return row * factor, column * factor


def is_cut_to(ratio: int) -> Shows:
    """Asserts that pictures are the squares about their faces, as far as they reach."""

    def shows(case: Case) -> None:
        side = ratio * HEAD
        for name, pixels in seen(case.after()).items():
            (left, top), (height, width) = HEADS[name], SHAPES[name]
            left = min(max(left + (HEAD - side) // 2, 0), width - side)
            top = min(max(top + (HEAD - side) // 2, 0), height - side)
            region = Image.fromarray(person(name)).crop((left, top, left + side, top + side))
            whole = np.asarray(region.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            near(pixels, torch.tensor(whole).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
        whole_sizes = {(SIDE, 2 * SIDE), (2 * SIDE, SIDE)}
        for probe, sizes in ((case.before(), whole_sizes), (case.after(), {(side, side)})):
            told = probe.seen.time_ids
            if told is not None:
                assert {tuple(size) for size in told[:, :2].int().tolist()} == sizes

    return shows


def is_cut_out_of_the_middle_window(ratio: int) -> Shows:
    """Asserts that pictures are squares about their faces as far as the middle window reaches."""

    def shows(case: Case) -> None:
        side = ratio * HEAD
        for name, pixels in seen(case.after()).items():
            (left, top), (height, width) = HEADS[name], SHAPES[name]
            # The pictures' shorter side is as long as the window's.
            first_row, first_column = (height - SIDE) // 2, (width - SIDE) // 2
            left = min(max(left + (HEAD - side) // 2, first_column), first_column + SIDE - side)
            top = min(max(top + (HEAD - side) // 2, first_row), first_row + SIDE - side)
            region = Image.fromarray(person(name)).crop((left, top, left + side, top + side))
            whole = np.asarray(region.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            near(pixels, torch.tensor(whole).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)

    return shows


def middle_window(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture that was resized to cover a window."""
    factor = max(width / image.width, height / image.height)
    size = round(image.width * factor), round(image.height * factor)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = image.resize(size, Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


def comes_through(width: int, height: int) -> Shows:
    """Asserts that pictures are cut to a window of this size, and that to what is trained."""

    def shows(case: Case) -> None:
        for name, pixels in seen(case.after()).items():
            window = middle_window(Image.fromarray(person(name)), width, height)
            trained = np.asarray(middle_window(window, SIDE, SIDE))
            near(pixels, torch.tensor(trained).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
        told = case.after().seen.time_ids
        if told is not None:
            assert told[:, :2].int().tolist() == [[height, width]] * 2

    return shows


def is_redrawn_in(place: str) -> Shows:
    """Asserts that each half of a face has its shade of a restorer, and the rest is as it was."""

    def shows(case: Case) -> None:
        before, after = (seen(probe)["portrait"] for probe in (case.before(), case.after()))
        row, column = middle_of_face()
        for shade, beside in zip(SHADES[place], (-BESIDE, BESIDE), strict=True):
            half = after[:, row, column + beside]
            near(half, torch.full((3,), shade), rtol=0, atol=0.05)
            assert not torch.allclose(half, before[:, row, column + beside], atol=0.05)
        assert torch.equal(after[:, : row - REACH], before[:, : row - REACH])

    return shows


def keeps_finer_detail(case: Case) -> None:
    row, column = middle_of_face(2)
    before, after = (seen(probe)["portrait"] for probe in (case.before(), case.after()))
    near(after[:, : row - 2 * REACH], before[:, : row - 2 * REACH], rtol=0, atol=1e-6)
    # Where the two shades of the restorer meet.
    beside = slice(column - 2 * BESIDE, column + 2 * BESIDE)
    coarse, fine = (pixels[:, row, beside].diff().abs().max() for pixels in (before, after))
    assert fine > 1.5 * coarse


FACE = [
    acts(
        "face_detector",
        ("batch", "conditioning"),
        "haar: drawn squares are no faces to it; auto: YuNet, where its file is given",
        windows_are(UPPER_MIDDLE, OVER_HEADS),
        base=AWARE,
        flipped={"face_detector": "haar"},
    ),
    acts(
        "face_detector",
        ("batch", "conditioning"),
        "yunet: it sees the squares",
        windows_are(OVER_HEADS, UPPER_MIDDLE),
        base={**AWARE, "face_detector": "haar"},
        flipped={"face_detector": "yunet"},
    ),
    refused(
        "face_detector",
        {"face_detector": "yunet"},
        "`yunet` cannot be used: its file .* could not be downloaded",
        base={**AWARE, "face_detector_path": ...},
    ),
    refused("face_detector", {"face_detector": "retina"}, "auto, yunet, haar"),
    acts(
        "face_detector_path",
        ("batch", "conditioning"),
        "YuNet's file is this one; without it and the hub, the cascades look for faces",
        windows_are(OVER_HEADS, UPPER_MIDDLE),
        base={**AWARE, "face_detector_path": ...},
        flipped={"face_detector_path": Place("squares")},
    ),
    refused(
        "face_detector_path",
        {"face_detector_path": Place("restorer")},
        "is not YuNet's file",
        base=AWARE,
    ),
    refused("face_detector_path", {"face_detector_path": "/nowhere"}, "/nowhere", base=AWARE),
    *idle(
        "nothing asks for faces",
        base={"images_data_url": Place("people")},
        face_detector="haar",
        face_detector_path=Place("squares"),
    ),
    *idle(
        "face_detector is haar",
        base={**AWARE, "face_detector": "haar", "face_detector_path": ...},
        face_detector_path=Place("squares"),
    ),
    acts(
        "face_crop_region",
        ("batch", "conditioning"),
        "2: a picture is the square of twice its face",
        is_cut_to(2),
        base=FACES,
        flipped={"face_crop_region": 2.0},
    ),
    acts(
        "face_crop_region",
        (),
        "changes nothing where no face is found",
        Case.changes_nothing,
        base={**FACES, "images_data_url": Place("pictures")},
        flipped={"face_crop_region": 2.0},
    ),
    refused("face_crop_region", {"face_crop_region": 0.0}, "above 0"),
    acts(
        "preparation_order",
        "batch",
        "resize first: the square about the face reaches no further than the middle window",
        is_cut_out_of_the_middle_window(2),
        base={**FACES, "face_crop_region": 2.0},
        flipped={"preparation_order": ["resize", "face_crop_region"]},
    ),
    refused(
        "preparation_order",
        {"preparation_order": ["blur"]},
        "face_crop_region, face_restore, resize, as a list",
    ),
    *idle(
        "pictures are only resized",
        base={"images_data_url": Place("people")},
        preparation_order=["resize", "face_restore"],
    ),
    acts(
        "resize_width",
        ("batch", "conditioning"),
        "32: pictures are cut to a window of half the width first",
        comes_through(SIDE // 2, SIDE),
        base=FACES,
        flipped={"resize_width": SIDE // 2},
    ),
    refused("resize_width", {"resize_width": 16}, "at least 32"),
    acts(
        "resize_height",
        ("batch", "conditioning"),
        "32: pictures are cut to a window of half the height first",
        comes_through(SIDE, SIDE // 2),
        base=FACES,
        flipped={"resize_height": SIDE // 2},
    ),
    refused("resize_height", {"resize_height": 16}, "at least 32"),
    acts(
        "face_restore",
        "batch",
        "faces are redrawn by the restorer, and the rest of the picture is not",
        is_redrawn_in("restorer"),
        base={**RESTORED, "face_restore": None},
        flipped={"face_restore": "gfpgan_1.4"},
    ),
    refused(
        "face_restore",
        {"face_restore": "gfpgan_1.4"},
        r"needs spandrel(.|\n)*pip install 'tok-trainer\[restore\]'",
        base=FACES,
    ),
    refused("face_restore", {"face_restore": "codeformer"}, "gfpgan_1.4"),
    acts(
        "face_restore_upscale",
        "batch",
        "a picture is enlarged before its faces are put back, which then keep finer detail",
        keeps_finer_detail,
        base=ENLARGED,
        flipped={"face_restore_upscale": 2.0},
    ),
    refused("face_restore_upscale", {"face_restore_upscale": 0.5}, "at least 1"),
    refused("face_restore_upscale", {"face_restore_upscale": 4.5}, "at most 4"),
    acts(
        "face_restorer_path",
        "batch",
        "faces are redrawn with the weights in the other file",
        is_redrawn_in("other restorer"),
        base=RESTORED,
        flipped={"face_restorer_path": Place("other restorer")},
    ),
    *idle(
        "no faces are restored",
        base=FACES,
        face_restore_upscale=2.0,
        face_restorer_path=Place("restorer"),
    ),
]
