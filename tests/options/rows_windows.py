"""Rows of the section data: trained sizes, windows, turns and mirrors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from options.bases import CLEAN, FACES, UNCACHED
from options.case import Case, columns, near, pictures, rows
from options.matrix import Place, acts
from options.probe import Probe
from options.sums import clean_latents, loss_is_the_sum
from options.world import SIDE

MANY = 40  # steps that are looked at without being trained
Shows = Callable[[Case], None]


def is_as_wide_and_high_as(width: int, height: int) -> Shows:
    def shows(case: Case) -> None:
        assert case.before().seen.noisy_latents.shape[-2:] == (8, 8)
        assert case.after().seen.noisy_latents.shape[-2:] == (height // 8, width // 8)
        sizes = case.after().seen.time_ids
        if sizes is not None:
            assert sizes[:, 4:].tolist() == [[height, width]] * 2

    return shows


def windows(probe: Probe, steps: int = MANY) -> list[tuple[str, int, int]]:
    """Picture, column and row of each window; corners told to the denoiser must agree."""
    found = []
    for step in range(steps):
        for batch in probe.dataset[step]:
            assert batch.pixels is not None
            names = pictures(batch.pixels)
            seen = list(zip(rows(batch.pixels), columns(batch.pixels), strict=True))
            assert [tuple(c) for c in batch.geometry["crop_top_left"].tolist()] == seen
            found += [(n, left, top) for n, (top, left) in zip(names, seen, strict=True)]
    return found


def corners_reach_the_denoiser(probe: Probe) -> None:
    for step in probe.steps:
        sizes, (pixels,) = step.passes[0].time_ids, step.pixels
        corners = torch.tensor([rows(pixels), columns(pixels)]).T
        originals = [[64, 128] if n == "landscape" else [128, 64] for n in pictures(pixels)]
        if sizes is not None:
            assert torch.equal(sizes[:, 2:4].long(), corners)
            assert sizes[:, :2].tolist() == originals


def the_window_is_drawn_anew(case: Case) -> None:
    middle = {("landscape", 32, 0), ("portrait", 0, 32)}
    assert set(windows(case.before())) == middle
    moving = windows(case.after())
    for name, axis in (("landscape", 1), ("portrait", 2)):
        places = [window[axis] for window in moving if window[0] == name]
        assert len(set(places)) > 15
        assert min(places) >= 0
        assert max(places) <= SIDE
    corners_reach_the_denoiser(case.before())
    corners_reach_the_denoiser(case.after())


def moves_along(axis: int, name: str) -> Shows:
    def shows(case: Case) -> None:
        moving, still = windows(case.after()), windows(case.before())
        places = {window[axis] for window in moving if window[0] == name}
        assert min(places) in range(12, 18)
        assert max(places) in range(47, 53)
        assert {w for w in moving if w[0] != name} == {w for w in still if w[0] != name}
        corners_reach_the_denoiser(case.after())

    return shows


def half_are_mirrored(case: Case) -> None:
    flips = []
    for step in range(MANY):
        (plain,), (flipped,) = case.before().dataset[step], case.after().dataset[step]
        assert plain.pixels is not None
        assert flipped.pixels is not None
        for one, other, flip in zip(plain.pixels, flipped.pixels, flipped.flipped, strict=True):
            assert torch.equal(other, one.flip(-1) if flip else one)
            flips.append(flip)
    assert 0.3 < sum(flips) / len(flips) < 0.7
    trained = case.after(6)
    uncached = torch.cat([one.noisy_latents for one in trained.passes])
    cached = torch.cat([o.noisy_latents for o in case.probe(_FLIPPED_TWINS, 6).passes])
    near(cached, uncached, rtol=1e-4, atol=1e-5)
    assert {flip for step in range(6) for b in trained.dataset[step] for flip in b.flipped} == {
        True,
        False,
    }


_FLIPPED_TWINS = {"random_flip": True, "cache_latents": True}


def is_a_quarter_turn(case: Case) -> None:
    for step in range(3):
        (upright,) = case.probe({"random_rotation_start": 0, "random_rotation_end": 0}).dataset[
            step
        ]
        (turned,) = case.after().dataset[step]
        assert upright.pixels is not None
        assert turned.pixels is not None
        near(turned.pixels, torch.rot90(upright.pixels, 1, (-2, -1)), atol=1e-5)
        assert turned.angles == (90.0, 90.0)
    drawn = {
        angle for step in range(MANY) for b in case.before().dataset[step] for angle in b.angles
    }
    assert len(drawn) > MANY
    assert near_pixels_of_the_batch(case.after())


def near_pixels_of_the_batch(probe: Probe) -> bool:
    """Whether the VAE is given what the dataset shows."""
    (batch,) = probe.dataset[0]
    assert batch.pixels is not None
    return torch.equal(probe.first.pixels[0], batch.pixels)


def turns_up_to_the_end_and_never_trains_the_fill(case: Case) -> None:
    angles = [a for step in range(MANY) for b in case.after().dataset[step] for a in b.angles]
    assert 0 <= min(angles) < 15
    assert 75 < max(angles) <= 90
    assert case.before().seen.mask is None
    mask = case.after().seen.mask
    assert mask is not None
    for row, (angle, name) in enumerate(
        zip(case.after().batch.angles, pictures(case.after().first.pixels[0]), strict=True)
    ):
        near(mask[row, 0], _inside(name, angle), atol=1e-3)
    loss_is_the_sum(case, case.after())
    assert near_pixels_of_the_batch(case.after())


def _inside(name: str, angle: float) -> torch.Tensor:
    """1 where a turned middle window shows the picture: a rotation written out."""
    height, width = (SIDE, 2 * SIDE) if name == "landscape" else (2 * SIDE, SIDE)
    away = np.arange(SIDE) - (SIDE - 1) / 2
    right, down = np.meshgrid(away, away)
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    across, along = cosine * right - sine * down, sine * right + cosine * down
    inside = (np.abs(across) <= width / 2 + 1e-6) & (np.abs(along) <= height / 2 + 1e-6)
    return torch.tensor(inside, dtype=torch.float32)


def each_picture_is_encoded_once(case: Case) -> None:
    cached, live = case.after(), case.before()
    assert (cached.encoded, live.encoded) == (2, 0)
    assert [len(step.pixels) for step in cached.steps] == [0, 0]
    assert [len(step.pixels) for step in live.steps] == [1, 1]
    for one, other in zip(cached.passes, live.passes, strict=True):
        near(one.noisy_latents, other.noisy_latents, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.hidden_states, other.hidden_states)
        if one.time_ids is not None and other.time_ids is not None:
            assert torch.equal(one.time_ids, other.time_ids)
    # Sampled from the posterior in each step: the same picture is not the same latents.
    by_number = [
        clean_latents(case, one)[list(b.numbers).index(0)]
        for one, b in zip(cached.passes, (cached.dataset[s][0] for s in range(2)), strict=True)
    ]
    assert not torch.allclose(by_number[0], by_number[1], atol=1e-2)


def trains_each_at_its_own_aspect(case: Case) -> None:
    # 48 x 80 is the size of kohya's list, of an area of 64 x 64 and in steps of 16, whose aspect
    # is nearest to 1:2; a picture covers it with 48 x 96, of which the middle is seen.
    own = {"landscape": (48, 80), "portrait": (80, 48)}
    corners = {"landscape": (0, 8), "portrait": (8, 0)}
    for step in case.before().steps:
        assert step.passes[0].noisy_latents.shape[-2:] == (8, 8)
    seen = []
    for step in case.after().steps:
        (pixels,), (one,) = step.pixels, step.passes
        name, again = pictures(pixels)
        assert name == again
        height, width = own[name]
        assert pixels.shape[-2:] == (height, width)
        assert one.noisy_latents.shape[-2:] == (height // 8, width // 8)
        if one.time_ids is not None:
            assert one.time_ids[:, 2:].tolist() == [[*corners[name], height, width]] * 2
        seen.append(name)
    assert sorted(seen) == ["landscape", "portrait"]


def all_have_one_size(case: Case) -> None:
    assert {b.pixels.shape[-2:] for b in _batches(case.before())} == {(48, 80), (80, 48)}
    assert {b.pixels.shape[-2:] for b in _batches(case.after())} == {(64, 64)}
    assert case.after().seen.noisy_latents.shape[-2:] == (8, 8)


def _batches(probe: Probe) -> list[Any]:
    return [batch for step in range(2) for batch in probe.dataset[step]]


# Left and top of the windows of people, in whole pixels: a head has its middle in that of the
# window and 0.38 of it down, as far as the picture goes.
OVER_HEADS = {("landscape", 4, 0), ("portrait", 0, 52)}
# Without a face: the middle, of an upright picture a little higher.
UPPER_MIDDLE = {("landscape", 32, 0), ("portrait", 0, 22)}


def windows_are(places: set[tuple[str, int, int]], others: set[tuple[str, int, int]]) -> Shows:
    """Asserts where windows lie after the flip and before, give or take a pixel of the detector."""

    def shows(case: Case) -> None:
        for probe, expected in ((case.before(), others), (case.after(), places)):
            found = windows(probe, steps=2)
            for name, left, top in expected:
                away = {max(abs(a - left), abs(b - top)) for n, a, b in found if n == name}
                assert away <= {0, 1}, found
            corners_reach_the_denoiser(probe)

    return shows


def looks_at_faces(case: Case) -> None:
    windows_are(OVER_HEADS, {("landscape", 32, 0), ("portrait", 0, 32)})(case)
    cached = case.probe({"face_aware_cropping": True, "cache_latents": True})
    assert cached.encoded == 2
    for one, other in zip(cached.passes, case.after().passes, strict=True):
        near(one.noisy_latents, other.noisy_latents, rtol=1e-4, atol=1e-5)


WINDOWS = [
    acts(
        "resolution_width",
        ("batch", "conditioning"),
        "latents are an eighth as wide, and the target size says so after the height",
        is_as_wide_and_high_as(128, 64),
        base={"resolution_height": 64, "resolution_width": 64},
        flipped={"resolution_width": 128},
    ),
    acts(
        "resolution_height",
        ("batch", "conditioning"),
        "latents are an eighth as high, and the target size says so first",
        is_as_wide_and_high_as(64, 128),
        base={"resolution_height": 64, "resolution_width": 64},
        flipped={"resolution_height": 128},
    ),
    acts(
        "enable_bucket",
        ("batch", "conditioning"),
        "each picture is trained at the size nearest to its own aspect",
        trains_each_at_its_own_aspect,
        base=UNCACHED,
        flipped={"enable_bucket": True},
    ),
    acts(
        "enable_bucket",
        "batch",
        "on where no size is given; false: all are trained at the base model's own",
        all_have_one_size,
        base={"resolution_width": ..., "resolution_height": ..., **UNCACHED},
        flipped={"enable_bucket": False},
    ),
    acts(
        "center_crop",
        ("batch", "conditioning"),
        "false: windows are drawn anew each time; true: always the middle one",
        the_window_is_drawn_anew,
        base=UNCACHED,
        flipped={"center_crop": False},
    ),
    acts(
        "face_aware_cropping",
        ("batch", "conditioning"),
        "windows lie over the faces, in the cache too",
        looks_at_faces,
        base=FACES,
        flipped={"face_aware_cropping": True},
    ),
    acts(
        "face_aware_cropping",
        ("batch", "conditioning"),
        "without a face windows lie in the middle, of upright pictures a little higher",
        windows_are(UPPER_MIDDLE, {("landscape", 32, 0), ("portrait", 0, 32)}),
        base={**FACES, "images_data_url": Place("pictures")},
        flipped={"face_aware_cropping": True},
    ),
    acts(
        "random_flip",
        "batch",
        "about half of the uses are mirrored, from the cache too",
        half_are_mirrored,
        base={**UNCACHED, **CLEAN},
        flipped={"random_flip": True},
    ),
    acts(
        "random_crop_offset_x",
        ("batch", "conditioning"),
        "the window moves up to so far to both sides, and not up or down",
        moves_along(1, "landscape"),
        base=UNCACHED,
        flipped={"random_crop_offset_x": 20},
    ),
    acts(
        "random_crop_offset_y",
        ("batch", "conditioning"),
        "the window moves up to so far up and down, and not to the sides",
        moves_along(2, "portrait"),
        base=UNCACHED,
        flipped={"random_crop_offset_y": 20},
    ),
    acts(
        "random_rotation_start",
        "batch",
        "as large as the end: every picture is turned by exactly that",
        is_a_quarter_turn,
        base={**UNCACHED, "random_rotation_end": 90},
        flipped={"random_rotation_start": 90},
    ),
    acts(
        "random_rotation_end",
        "batch",
        "angles lie between start and end, and the mask leaves out what is outside the picture",
        turns_up_to_the_end_and_never_trains_the_fill,
        base=UNCACHED,
        flipped={"random_rotation_end": 90},
    ),
    acts(
        "cache_latents",
        "batch",
        "each picture is encoded once, and the denoiser is given the same",
        each_picture_is_encoded_once,
        base={**UNCACHED, **CLEAN},
        flipped={"cache_latents": True},
    ),
]
