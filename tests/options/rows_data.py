"""Rows of the section data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options.bases import CLEAN, PRIOR, TOKENS, UNCACHED
from options.case import Case, columns, near, pictures, rows
from options.matrix import Place, acts, idle, refused
from options.probe import Probe
from options.sums import clean_latents, loss_is_the_sum, min_snr
from options.world import SIDE
from PIL import Image

MANY = 40  # steps that are looked at without being trained
Shows = Callable[[Case], None]


def sees_exactly_these_pictures(case: Case) -> None:
    folder = Path(case.world.path("astronaut"))
    files = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    whole = torch.tensor(np.stack(files)).permute(0, 3, 1, 2) / 127.5 - 1
    for step in case.after().steps:
        (pixels,) = step.pixels
        assert len(pixels) == len(files) == 2
        matches = [[torch.allclose(seen, one, atol=1e-5) for one in whole] for seen in pixels]
        assert sorted(matches) == [[False, True], [True, False]]
    assert set(pictures(case.before().first.pixels[0])) == {"landscape", "portrait"}


def sees_the_caption_of_each(case: Case, probe: Probe, captions: dict[str, str]) -> None:
    for step in probe.steps:
        names = pictures(step.pixels[0])
        expected = case.encoded([captions[name] for name in names])
        near(step.passes[0].hidden_states, expected["hidden_states"])
    assert {name for step in probe.steps for name in pictures(step.pixels[0])} == set(captions)


PLAIN = dict.fromkeys(("landscape", "portrait"), "A photograph of a TOK")
SHORT = {name: f"{name} TOK" for name in PLAIN}
LONG = {name: f"TOK, {name}, at length" for name in PLAIN}


def both_subjects_have_their_own(case: Case) -> None:
    seen = {
        (caption, int(number)) for step in range(4) for caption, number in _uses(case.after(), step)
    }
    assert {caption for caption, _ in seen} == {"a TOK", "a drawing of TOK1"}
    numbers = {c: {n for caption, n in seen if caption == c} for c, _ in seen}
    assert numbers["a TOK"] == {0, 1}
    assert numbers["a drawing of TOK1"] == {2, 3}
    near(
        case.after().seen.hidden_states,
        case.encoded(case.after().batch.captions)["hidden_states"],
    )


def _uses(probe: Probe, step: int) -> list[tuple[str, int]]:
    return [pair for b in probe.dataset[step] for pair in zip(b.captions, b.numbers, strict=True)]


def is_shown_twice_as_often(case: Case) -> None:
    once, twice = case.before().dataset.plan, case.after().dataset.plan
    assert (once.num_examples, twice.num_examples) == (4, 6)
    uses = [n for s in range(3) for slots in twice.at(s) for n in (slot.number for slot in slots)]
    assert sorted(uses) == [0, 1, 2, 2, 3, 3]


def drops_every_instance_caption(case: Case) -> None:
    half = case.after().seen.is_class
    states = case.after().seen.hidden_states
    near(states[~half], case.encoded(["", ""])["hidden_states"])
    near(states[half], case.encoded(["a photo of a man"] * 2)["hidden_states"])
    near(case.before().seen.hidden_states[half], states[half])


def drops_half_of_the_captions(case: Case) -> None:
    data = case.after().dataset
    captions = [c for step in range(100) for b in data[step] for c in b.captions]
    assert 0.4 < captions.count("") / len(captions) < 0.6
    assert captions[:2] == list(case.after().batch.captions)


def a_dropped_caption_teaches_no_token(case: Case) -> None:
    assert any(float(g.abs().max()) > 0 for g in _token_gradients(case.before()))
    assert all(float(g.abs().max()) == 0 for g in _token_gradients(case.after()))


def _token_gradients(probe: Probe) -> list[torch.Tensor]:
    found = [g for name, g in probe.first.gradients.items() if name.startswith("tokens.")]
    assert found
    return found


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
    loss_is_the_sum(case, case.after(), min_snr(5.0))
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


def tells_every_picture_its(captions: dict[str, str]) -> Shows:
    return lambda case: sees_the_caption_of_each(case, case.after(), captions)


def takes_the_other_column(case: Case) -> None:
    sees_the_caption_of_each(case, case.before(), SHORT)
    sees_the_caption_of_each(case, case.after(), LONG)


CAPTIONS: dict[str, Any] = {"captions_file_url": Place("captions.jsonl")}
TWO_SUBJECTS: dict[str, Any] = {
    "images_data_url": ...,
    "concepts": [
        {"images_data_url": Place("pictures"), "instance_prompt": "a TOK"},
        {"images_data_url": Place("astronaut"), "instance_prompt": "a drawing of TOK1"},
    ],
}
DATA = [
    acts(
        "images_data_url",
        "batch",
        "the VAE is given exactly the pictures of the other folder",
        sees_exactly_these_pictures,
        base=UNCACHED,
        flipped={"images_data_url": Place("astronaut")},
    ),
    acts(
        "concepts",
        ("batch", "conditioning"),
        "each subject's pictures go with its own prompt",
        both_subjects_have_their_own,
        flipped=TWO_SUBJECTS,
    ),
    acts(
        "concepts",
        "batch",
        "a subject with two repeats is shown twice in an epoch",
        is_shown_twice_as_often,
        base=TWO_SUBJECTS,
        flipped={
            "concepts": [
                TWO_SUBJECTS["concepts"][0],
                {**TWO_SUBJECTS["concepts"][1], "repeats": 2},
            ]
        },
    ),
    acts(
        "captions_file_url",
        "conditioning",
        "each picture goes with its own row, whatever their order",
        tells_every_picture_its(SHORT),
        base=UNCACHED,
        flipped=CAPTIONS,
    ),
    acts(
        "caption_column",
        "conditioning",
        "captions come from the named key",
        takes_the_other_column,
        base={**CAPTIONS, **UNCACHED},
        flipped={"caption_column": "long"},
    ),
    *idle("there is no captions_file_url", caption_column="long"),
    acts(
        "instance_prompt",
        "conditioning",
        "pictures without a caption go with the prompt",
        tells_every_picture_its(dict.fromkeys(PLAIN, "TOK by the sea")),
        base=UNCACHED,
        flipped={"instance_prompt": "TOK by the sea"},
    ),
    acts(
        "instance_prompt",
        (),
        "changes nothing where every picture has a caption",
        Case.changes_nothing,
        base=CAPTIONS,
        flipped={"instance_prompt": "TOK by the sea"},
    ),
    refused(
        "skip_caption_generation",
        {"skip_caption_generation": False},
        "captioning is not available yet",
    ),
    acts(
        "skip_caption_generation",
        (),
        "changes nothing where every picture has a caption",
        Case.changes_nothing,
        base=CAPTIONS,
        flipped={"skip_caption_generation": False},
    ),
    acts(
        "caption_dropout",
        "conditioning",
        "1: instance pictures go with the empty caption, class pictures keep theirs",
        drops_every_instance_caption,
        base=PRIOR,
        flipped={"caption_dropout": 1.0},
    ),
    acts(
        "caption_dropout",
        "conditioning",
        "0.5: about half of 200 draws are empty",
        drops_half_of_the_captions,
        flipped={"caption_dropout": 0.5},
    ),
    acts(
        "caption_dropout",
        "gradient",
        "a dropped caption gives new tokens no gradient",
        a_dropped_caption_teaches_no_token,
        base=TOKENS,
        flipped={"caption_dropout": 1.0},
    ),
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
        "center_crop",
        ("batch", "conditioning"),
        "false: windows are drawn anew each time; true: always the middle one",
        the_window_is_drawn_anew,
        base=UNCACHED,
        flipped={"center_crop": False},
    ),
    refused("face_aware_cropping", {"face_aware_cropping": True}, "finding faces"),
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
