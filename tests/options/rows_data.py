"""Rows of the section data: pictures, their subjects and the captions that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options.bases import PRIOR, TOKENS, UNCACHED
from options.case import Case, chosen, near, pictures
from options.matrix import WITH_TEXT, Place, acts, refused
from options.probe import Probe
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
        near(step.passes[0].text, expected)
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
    near(case.after().seen.text, case.encoded(case.after().batch.captions))


def _uses(probe: Probe, step: int) -> list[tuple[str, int]]:
    return [pair for b in probe.dataset[step] for pair in zip(b.captions, b.numbers, strict=True)]


def is_shown_twice_as_often(case: Case) -> None:
    once, twice = case.before().dataset.plan, case.after().dataset.plan
    assert (once.num_examples, twice.num_examples) == (4, 6)
    uses = [n for s in range(3) for slots in twice.at(s) for n in (slot.number for slot in slots)]
    assert sorted(uses) == [0, 1, 2, 2, 3, 3]


def drops_every_instance_caption(case: Case) -> None:
    half = case.after().seen.is_class
    text = case.after().seen.text
    near(chosen(text, ~half), case.encoded(["", ""]))
    near(chosen(text, half), case.encoded(["a photo of a man"] * 2))
    near(chosen(case.before().seen.text, half), chosen(text, half))


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


def tells_every_picture_its(captions: dict[str, str]) -> Shows:
    return lambda case: sees_the_caption_of_each(case, case.after(), captions)


def takes_the_other_column(case: Case) -> None:
    sees_the_caption_of_each(case, case.before(), SHORT)
    sees_the_caption_of_each(case, case.after(), LONG)


def is_of_no_use(case: Case) -> None:
    reason = "there is no captions_file_url, and no `metadata.jsonl` among the pictures"
    assert case.after().ignored == {**case.before().ignored, "caption_column": reason}
    case.changes_nothing()


def trains_at(*sides: int) -> Shows:
    """Both pictures at each of these sides in an epoch, in batches of one size."""

    def shows(case: Case) -> None:
        assert _sides(case.before(), 1) == {64: {"landscape", "portrait"}}
        assert case.after().dataset.plan.num_examples == 2 * len(sides)
        both = {"landscape", "portrait"}
        assert _sides(case.after(), len(sides)) == dict.fromkeys(sides, both)
        first = case.after().seen.noisy_latents
        assert first.shape[-1] == first.shape[-2]
        assert first.shape[-1] * 8 in sides

    return shows


def _sides(probe: Probe, steps: int) -> dict[int, set[str]]:
    """The side of each batch of an epoch, with its pictures."""
    assert probe.dataset.plan.steps_per_epoch == steps
    batches = [batch for step in range(steps) for batch in probe.dataset[step]]
    found = {int(batch.geometry["target_size"][0, 0]): batch for batch in batches}
    assert len(found) == len(batches)
    return {side: set(pictures(batch.pixels)) for side, batch in found.items()}


CAPTIONS: dict[str, Any] = {"captions_file_url": Place("captions.jsonl")}
TWO_SUBJECTS: dict[str, Any] = {
    "images_data_url": ...,
    "concepts": [
        {"images_data_url": Place("pictures"), "instance_prompt": "a TOK"},
        {"images_data_url": Place("astronaut"), "instance_prompt": "a drawing of TOK1"},
    ],
}
# Squares at the base model's own size, 64, unless a priority says otherwise.
OWN_SIZE: dict[str, Any] = {
    "resolution_width": ...,
    "resolution_height": ...,
    "enable_bucket": False,
    **UNCACHED,
}
DATA = [
    *(
        acts(
            "priority",
            "batch",
            f"{priority}: an epoch shows each picture at {words} the base model's own side",
            trains_at(*sides),
            base=OWN_SIZE,
            flipped={"priority": priority},
        )
        for priority, words, sides in (
            ("speed", "half of", (32,)),
            ("quality", "half, three quarters and all of", (32, 48, 64)),
            ("high_res_only", "all of", (64,)),
        )
    ),
    refused(
        "priority",
        {"priority": "speed", "resolution_width": 64},
        "one of the two, the priority chooses sizes by the base model",
    ),
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
    acts(
        "caption_column",
        "conditioning",
        "captions in metadata.jsonl among the pictures come from the named key",
        takes_the_other_column,
        base={"images_data_url": Place("captioned pictures"), **UNCACHED},
        flipped={"caption_column": "long"},
    ),
    refused("caption_column", {"caption_column": "lang"}, "`lang`", base=CAPTIONS),
    acts(
        "caption_column",
        (),
        "does nothing where there is no table of captions, and is told of",
        is_of_no_use,
        flipped={"caption_column": "long"},
    ),
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
        families=WITH_TEXT,
        flipped={"caption_dropout": 1.0},
    ),
]
