"""What each subject of a training is: a concept with everything it takes from the run filled in.

Works on flat leaves, so that rules can ask while a configuration is still in the making.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.sections.data import Concept, DataConfig

Values = Mapping[str, Any]

# Options of a concept that are the run's own where it leaves them open.
INHERITED = (
    "instance_prompt",
    "with_prior_preservation",
    "prior_loss_weight",
    "photo_class",
    "class_prompt",
    "class_images_url",
    "num_class_images",
)
# Those that speak of the run's class, with what must not name another class.
_OF_THE_CLASS: Mapping[str, tuple[str, ...]] = {
    "class_prompt": ("photo_class",),
    "class_images_url": ("photo_class", "class_prompt"),
}


def concepts_of(values: Values) -> tuple[Concept, ...]:
    """The concepts as they were given; pictures without concepts are one concept.

    Args:
        values: every leaf. Where no pictures are given yet, the one concept has none.
    """
    if values["concepts"] is not None:
        concepts: tuple[Concept, ...] = values["concepts"]
        return concepts
    pictures, captions = values["images_data_url"], values["captions_file_url"]
    return (Concept.model_construct(images_data_url=pictures, captions_file_url=captions),)


def subjects_of(values: Values) -> tuple[Concept, ...]:
    """Every concept with all its options; arguments as for `concepts_of`."""
    names = values["token_abstraction"]
    return tuple(
        _filled(concept, concept.token or names[min(place, len(names) - 1)], values)
        for place, concept in enumerate(concepts_of(values))
    )


def inherits(concept: Concept, leaf: str, values: Values) -> bool:
    """Whether a concept takes this option from the run.

    The run's prompt and pictures of a class say nothing of another class.
    """
    own = dict(concept)
    if own[leaf] is not None:
        return False
    return all(own[name] in (None, values[name]) for name in _OF_THE_CLASS.get(leaf, ()))


def data_of(concept: Concept, data: DataConfig) -> DataConfig:
    """The data section as it is for the pictures of one concept, whose options are filled in."""
    return data.model_copy(
        update={
            "images_data_url": concept.images_data_url,
            "captions_file_url": concept.captions_file_url,
            "instance_prompt": concept.instance_prompt,
        }
    )


def class_data_of(prompt: str, url: str, data: DataConfig) -> DataConfig:
    """The data section as it is for class pictures: each has the prompt for its caption."""
    return data.model_copy(
        update={
            "images_data_url": url,
            "captions_file_url": None,
            "instance_prompt": prompt,
            "skip_caption_generation": True,
        }
    )


def renamed(prompt: str, old: str, new: str) -> str:
    """A prompt in which one identifier, where it stands as a word, is another."""
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, prompt)


def _filled(concept: Concept, token: str, values: Values) -> Concept:
    taken = {leaf: values[leaf] for leaf in INHERITED if inherits(concept, leaf, values)}
    if "instance_prompt" in taken:
        first = values["token_abstraction"][0]
        taken["instance_prompt"] = renamed(taken["instance_prompt"], first, token)
    filled = concept.model_copy(update={"token": token, **taken})
    if filled.class_prompt is not None or filled.photo_class is None:
        return filled
    prompt = f"a photo of a {filled.photo_class.lower()}"
    return filled.model_copy(update={"class_prompt": prompt})
