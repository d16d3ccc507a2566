"""Prompt libraries: named prompts to look at what a training learnt by, in a YAML file.

The form is that of the guide's prompt library: name → `prompt`, `guidance_scale`, `steps`; and
beside it `negative_prompt` and `seed`. Libraries of scenes ship in `configs/prompts`. Says what a
prompt is and what its words stand for; nothing is made here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from trainer.config import TrainingConfig
from trainer.config_files import parse_yaml, read_mapping
from trainer.errors import InputError, Missing, Problem
from trainer.fields import Section
from trainer.leaves import in_words, nearest, shown
from trainer.presets import folder
from trainer.sections.data import Concept
from trainer.sections.subjects import words

FIELD = "--prompts"
# Stands in a prompt for what a run calls its subject.
SUBJECT = "{subject}"

_ENDING = ".yaml"
# Which shipped library fits what captions were made to tell.
_OF_MODES = {"character": "person", "product": "product", "style": "style"}
_ARTICLE = re.compile(r"^(?:an?|the) ", re.IGNORECASE)
_PHOTO_OF = re.compile(r"^(?:an? |the )?(?:photo|photograph|picture|image) of ", re.IGNORECASE)


class LibraryPrompt(Section):
    """One prompt, and how its picture is made where that is not as the base model has it.

    Args:
        prompt: what the picture shows; `{subject}` in it stands for what a run calls its subject.
        negative_prompt: what guidance leads away from. None: as the pipeline has it.
        guidance_scale: of classifier-free guidance. None: as the pipeline has it.
        steps: of denoising. None: as the pipeline has it.
        seed: of its noise. None: the one of the whole library.
    """

    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    steps: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)

    @property
    def has_subject(self) -> bool:
        """Whether it speaks of what a run calls its subject."""
        return any(SUBJECT in text for text in (self.prompt, self.negative_prompt or ""))

    def about(self, subject: str) -> LibraryPrompt:
        """The same prompt about this subject."""
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        named = {name: text and text.replace(SUBJECT, subject) for name, text in texts.items()}
        return self.model_copy(update=named)


Library = Mapping[str, LibraryPrompt]


def library(given: str) -> Library:
    """The prompts of a file, or of a library that ships.

    Args:
        given: a path, or the name of a library.

    Raises:
        InputError: there is no such file or library, or with everything that is wrong in it.
    """
    known = library_names()
    if given in known:
        return shipped(given)
    if not Path(given).suffix and not Path(given).exists():
        message = f"got `{given}`; allowed: a .yaml file, or one of {', '.join(known)}"
        raise InputError.of(FIELD, message, nearest(given, tuple(known)))
    return parsed(read_mapping(Path(given)), given)


def library_names() -> list[str]:
    """The libraries that ship."""
    entries = [entry.name for entry in folder().joinpath("prompts").iterdir()]
    return sorted(name.removesuffix(_ENDING) for name in entries if name.endswith(_ENDING))


def shipped(name: str) -> Library:
    """A library that ships, by its name."""
    text = folder().joinpath("prompts", name + _ENDING).read_text(encoding="utf-8")
    return parsed(parse_yaml(text, name), name)


def parsed(content: Mapping[str, Any], source: str) -> Library:
    """The prompts in the content of a file.

    Args:
        content: as it was read.
        source: the file's name, for messages.

    Raises:
        InputError: with everything that is wrong in it.
    """
    if not content:
        hint = 'write a name with its prompt: `portrait: {prompt: "a photo of TOK"}`'
        raise InputError.of(source, "holds no prompt", hint)
    prompts: dict[str, LibraryPrompt] = {}
    problems: list[Problem] = []
    for name, fields in content.items():
        try:
            if not name.strip():
                raise InputError.of(source, "a prompt has no name", "give each prompt a name")
            if not isinstance(fields, dict):
                message = f"got {shown(fields)}; allowed: {', '.join(LibraryPrompt.model_fields)}"
                raise InputError.of(_place(source, name), message, "write its text as `prompt: …`")
            prompts[name] = LibraryPrompt.model_validate(fields)
        except ValidationError as error:
            problems += _problems(error, _place(source, name))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return prompts


def of_one_kind(config: TrainingConfig) -> str:
    """The shipped library whose scenes fit what a run was trained on."""
    kind = _OF_MODES.get(config.caption.caption_mode)
    if kind is None and any(subject.photo_class for subject in config.subjects()):
        return "person"
    return kind or "default"


def subject_phrase(subject: Concept, captions: Iterable[str]) -> str | None:
    """What captions call a subject: `TOK`, `a TOK`, `TOK man`; of several the most frequent.

    That is its identifier, the article before it, and the word of its class behind it.

    Args:
        subject: with all its options.
        captions: that it was trained with.

    Returns:
        Nothing where no caption has its identifier.
    """
    assert subject.token is not None
    kinds = {kind for kind in (subject.photo_class, class_phrase(subject)) if kind}
    behind = "|".join(re.escape(_ARTICLE.sub("", kind)) for kind in sorted(kinds))
    behind = rf"(?: (?:{behind})(?!\w))?" if behind else ""
    pattern = re.compile(rf"(\b(?i:an?|the) )?({words([subject.token]).pattern}(?i:{behind}))")
    found = Counter(
        (match[1] or "").lower() + match[2]
        for caption in captions
        for match in pattern.finditer(caption)
    )
    return found.most_common(1)[0][0] if found else None


def class_phrase(subject: Concept) -> str | None:
    """What a subject's class is called: `a man` of `a photo of a man`; nothing where none is said.

    Args:
        subject: with all its options.
    """
    prompt = subject.class_prompt
    if prompt is None or not _PHOTO_OF.match(prompt):
        return None
    return _PHOTO_OF.sub("", prompt)


def _place(source: str, name: str) -> str:
    return f"{source}: {name}"


def _problems(error: ValidationError, place: str) -> Sequence[Problem]:
    """What pydantic found wrong with a prompt, in our own words."""
    schemas = LibraryPrompt.model_json_schema()["properties"]
    problems: list[Problem] = []
    for detail in error.errors(include_url=False, include_context=False):
        name = str(detail["loc"][0])
        field = f"{place}.{name}"
        if detail["type"] == "missing":
            problems.append(Missing(field, "is missing", f"give its text as `{name}: …`"))
        elif name not in schemas:
            message = f"there is no such field; allowed: {', '.join(schemas)}"
            problems.append(Problem(field, message, nearest(name, schemas)))
        elif field not in {problem.field for problem in problems}:
            allowed = in_words(schemas[name])
            message = f"got {shown(detail['input'])}; allowed: {allowed}"
            problems.append(Problem(field, message))
    return problems
