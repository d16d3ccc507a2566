"""Prompt libraries: the guide's form, what is refused in it, and what their words stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import Concept, TrainingConfig
from trainer.errors import InputError
from trainer.prompt_library import (
    LibraryPrompt,
    class_phrase,
    library,
    library_names,
    of_one_kind,
    shipped,
    subject_phrase,
)
from trainer.resolve import Layer, resolve

# As the guide writes it.
GUIDE = """
professional-headshot:
  prompt: "Photo of SIDAI, professional LinkedIn headshot, navy blazer..."
  guidance_scale: 7.5
  steps: 30

casual-outdoor:
  prompt: "Photo of SIDAI, casual outdoor portrait, denim jacket..."
  negative_prompt: blurry
  seed: 7
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def refused(given: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        library(given)
    return [f"{problem.field}: {problem.message}" for problem in caught.value.problems]


def concept(**given: Any) -> Concept:
    """The one subject of a configuration."""
    values = {"images_data_url": "photos", **given}
    (subject,) = resolve([Layer("test", values, explicit=True)]).subjects()
    return subject


def configuration(**given: Any) -> TrainingConfig:
    return resolve([Layer("test", {"images_data_url": "photos", **given}, explicit=True)])


def test_a_library_in_the_guides_form_is_read_in_its_order(tmp_path: Path) -> None:
    prompts = library(written(tmp_path, GUIDE))

    assert list(prompts) == ["professional-headshot", "casual-outdoor"]
    assert prompts["professional-headshot"] == LibraryPrompt(
        prompt="Photo of SIDAI, professional LinkedIn headshot, navy blazer...",
        guidance_scale=7.5,
        steps=30,
    )
    assert prompts["casual-outdoor"].seed == 7
    assert prompts["casual-outdoor"].negative_prompt == "blurry"


def test_everything_wrong_in_a_library_is_told_with_file_name_field_and_what_is_allowed(
    tmp_path: Path,
) -> None:
    text = (
        "one: {prompt: 7, steps: 0}\ntwo: {prompt: a cat, stepz: 3}\nthree: {steps: 3}\n"
        "four: a dog\nfive: {prompt: a bird, guidance_scale: high, seed: -1}\n"
    )
    given = written(tmp_path, text)

    assert refused(given) == [
        f"{given}: one.prompt: got 7; allowed: text, not empty",
        f"{given}: one.steps: got 0; allowed: a whole number, at least 1, or null",
        f"{given}: two.stepz: there is no such field; allowed: prompt, negative_prompt, "
        "guidance_scale, steps, seed",
        f"{given}: three.prompt: is missing",
        f'{given}: four: got "a dog"; allowed: prompt, negative_prompt, guidance_scale, steps, '
        "seed",
        f'{given}: five.guidance_scale: got "high"; allowed: a number, or null',
        f"{given}: five.seed: got -1; allowed: a whole number, at least 0, at most "
        "9223372036854775807, or null",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no prompt"),
        ("one: {prompt: a}\none: {prompt: b}\n", "line 2"),
        ("- a cat\n", "allowed: option names with their values"),
        ('" ": {prompt: a}\n', "a prompt has no name"),
    ],
    ids=["empty", "twice", "list", "nameless"],
)
def test_what_is_no_library_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (problem,) = refused(written(tmp_path, text))

    assert "mine.yaml" in problem
    assert reason in problem


def test_an_unknown_library_is_refused_with_those_that_ship() -> None:
    assert refused("persn") == [
        "--prompts: got `persn`; allowed: a .yaml file, or one of default, person, product, style"
    ]


def test_a_missing_file_is_refused() -> None:
    (problem,) = refused("nowhere.yaml")

    assert "cannot be read" in problem


@pytest.mark.parametrize("name", library_names())
def test_a_shipped_library_speaks_of_the_subject_in_every_prompt(name: str) -> None:
    prompts = library(name)

    assert len(prompts) == 5
    assert all(prompt.has_subject for prompt in prompts.values())
    # What guidance is right differs with the base model.
    assert all(prompt.guidance_scale is None for prompt in prompts.values())


def test_the_subject_takes_its_place_in_prompt_and_negative_prompt() -> None:
    prompt = LibraryPrompt(prompt="a {subject}, {other}", negative_prompt="no {subject}")

    about = prompt.about("TOK man")

    assert (about.prompt, about.negative_prompt) == ("a TOK man, {other}", "no TOK man")
    assert not about.has_subject


@pytest.mark.parametrize(
    ("captions", "given", "phrase"),
    [
        (["A photograph of a TOK"], {}, "a TOK"),
        (["a photo of TOK man"], {"photo_class": "Man"}, "TOK man"),
        (["a photo of TOK man"], {}, "TOK"),
        (["A TOK on a hill"], {}, "a TOK"),
        (["a photo of the sks dog"], {"class_prompt": "a photo of a dog"}, "the sks dog"),
        (["TOK mane"], {"photo_class": "Man"}, "TOK"),
        (["TOK, smiling", "a TOK", "TOK asleep"], {}, "TOK"),
        (["TOKYO at night"], {}, None),
        (["a photo of zwx man"], {}, None),
    ],
)
def test_a_subject_is_called_what_its_captions_call_it(
    captions: list[str], given: dict[str, Any], phrase: str | None
) -> None:
    token = "sks" if "sks" in captions[0] else "TOK"

    called = subject_phrase(concept(token_abstraction=token, **given), captions)

    assert called == phrase


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ({"photo_class": "Woman"}, "a woman"),
        ({"class_prompt": "a photo of an old dog"}, "an old dog"),
        ({"class_prompt": "dogs"}, None),
        ({}, None),
    ],
)
def test_a_class_is_called_what_its_pictures_show(given: dict[str, Any], phrase: str) -> None:
    assert class_phrase(concept(**given)) == phrase


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "default"),
        ({"photo_class": "Baby"}, "person"),
        ({"caption_mode": "character"}, "person"),
        ({"caption_mode": "product"}, "product"),
        ({"caption_mode": "style"}, "style"),
    ],
)
def test_scenes_fit_what_was_trained(given: dict[str, Any], name: str) -> None:
    assert of_one_kind(configuration(**given)) == name
    assert shipped(name)
