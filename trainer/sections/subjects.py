"""What each subject of a training is: a concept with everything it takes from the run filled in.

Its words, its class pictures, and what the user calls its options. Works on flat leaves, so that
rules can ask while a configuration is still in the making.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import InputError
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
OF_THE_CLASS: Mapping[str, tuple[str, ...]] = {
    "class_prompt": ("photo_class",),
    "class_images_url": ("photo_class", "class_prompt"),
}


@dataclass(frozen=True)
class ClassSource:
    """Where class pictures come from; concepts with the same one share them.

    Args:
        prompt: their caption, and what they are made with.
        url: pictures of the user's own. None: the base model makes them.
        count: how many are made; 0 where the user gives them.
    """

    prompt: str
    url: str | None
    count: int

    @classmethod
    def of(cls, concept: Concept) -> ClassSource | None:
        """The source of a concept whose options are all filled in; None without prior."""
        if not concept.with_prior_preservation:
            return None
        assert concept.class_prompt is not None
        assert concept.num_class_images is not None
        count = concept.num_class_images if concept.class_images_url is None else 0
        return cls(concept.class_prompt, concept.class_images_url, count)


def class_sources(concepts: Sequence[Concept]) -> tuple[ClassSource, ...]:
    """The class pictures that a run wants: each source once, in the order of the concepts.

    Args:
        concepts: with all their options.
    """
    sources = [ClassSource.of(concept) for concept in concepts]
    return tuple(dict.fromkeys(source for source in sources if source is not None))


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
    return all(own[name] in (None, values[name]) for name in OF_THE_CLASS.get(leaf, ()))


def data_of(concept: Concept, data: DataConfig) -> DataConfig:
    """The data section as it is for the pictures of one concept, whose options are filled in."""
    return data.model_copy(
        update={
            "images_data_url": concept.images_data_url,
            "captions_file_url": concept.captions_file_url,
            "instance_prompt": concept.instance_prompt,
        }
    )


def class_data_of(source: ClassSource, url: str, data: DataConfig) -> DataConfig:
    """The data section as it is for class pictures.

    As everywhere, a .txt file beside a picture is its caption; the others have the prompt.

    Args:
        source: what the pictures show.
        url: where they are.
        data: the run's.
    """
    return data.model_copy(
        update={
            "images_data_url": url,
            "captions_file_url": None,
            "instance_prompt": source.prompt,
            "skip_caption_generation": True,
        }
    )


def fields_of_concept(concepts: Sequence[Concept] | None, place: int) -> Mapping[str, str]:
    """What the user calls the options of one concept: `concepts[1].repeats`.

    Args:
        concepts: as they were given. None: pictures without concepts, whose options are the run's.
        place: of the concept, from 0.
    """
    if concepts is None:
        return {}
    return {leaf: f"concepts[{place}].{leaf}" for leaf in Concept.model_fields}


def fields_of_class(
    source: ClassSource, concepts: Sequence[Concept] | None, subjects: Sequence[Concept]
) -> Mapping[str, str]:
    """What the user calls the options of class pictures where a concept has them of its own.

    Args:
        source: of the pictures.
        concepts: as they were given, or None.
        subjects: the same with all their options.
    """
    fields: dict[str, str] = {}
    for place, concept in enumerate(concepts or ()):
        if ClassSource.of(subjects[place]) == source:
            own = {leaf for leaf, value in dict(concept).items() if value is not None}
            names = fields_of_concept(concepts, place)
            fields = {leaf: names[leaf] for leaf in OF_THE_CLASS if leaf in own} | fields
    return fields


@contextmanager
def put_down_to(fields: Mapping[str, str]) -> Iterator[None]:
    """Puts errors down to what the user calls the options.

    Args:
        fields: leaf to name; others keep theirs.
    """
    try:
        yield
    except InputError as error:
        raise InputError(
            [replace(p, field=fields.get(p.field, p.field)) for p in error.problems]
        ) from error


def words(identifiers: Sequence[str]) -> re.Pattern[str]:
    """Finds identifiers in a text, where they stand as words.

    As they are written: `TOK` is neither in `TOK1` nor `TOKYO` nor `tok`. Of several that fit at
    one place the longest is found.
    """
    longest_first = sorted(identifiers, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def renamed(prompt: str, old: str, new: str) -> str:
    """A prompt in which one identifier, where it stands as a word, is another."""
    return words([old]).sub(lambda _: new, prompt)


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
