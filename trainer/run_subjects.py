"""What a run was shown and told: its subjects' names, its own prompts, its training pictures.

Captions are those that the pictures were trained with, whoever wrote them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.concepts import prepared_folders
from trainer.config import TrainingConfig
from trainer.data.prepared import earlier_index
from trainer.errors import InputError
from trainer.job import RunFolder
from trainer.prompt_library import Library, class_phrase, subject_phrase
from trainer.sections.data import Concept
from trainer.strength import FinishedRun

SUBJECT = "--subject"
SAY_SUBJECT = f'give what its captions call it, such as {SUBJECT} "sks man"'


@dataclass(frozen=True)
class RunSubject:
    """One subject of a run.

    Args:
        identifier: as it was configured, such as `TOK`.
        phrase: what captions call it. None: they do not name the identifier.
        of_class: what its class is called, such as `a man`. None: nothing says it.
        prompt: its instance prompt, or where no picture has that, the most frequent caption.
        is_instance_prompt: whether it is the instance prompt.
    """

    identifier: str
    phrase: str | None
    of_class: str | None
    prompt: str
    is_instance_prompt: bool


def subjects_of_run(folder: RunFolder, config: TrainingConfig) -> Sequence[RunSubject]:
    """A run's subjects; sets of pictures that share an identifier are one subject."""
    captions: dict[str, list[str]] = {}
    concepts: dict[str, Concept] = {}
    places = prepared_folders(config, folder)
    for concept, place in zip(config.subjects(), places, strict=True):
        assert concept.token is not None
        assert concept.instance_prompt is not None
        concepts.setdefault(concept.token, concept)
        found = [picture.caption for picture in earlier_index(place).pictures]
        captions.setdefault(concept.token, []).extend(found or [concept.instance_prompt])
    return [_subject(concepts[token], captions[token]) for token in concepts]


def training_pictures(folder: RunFolder, config: TrainingConfig) -> list[Path]:
    """The prepared pictures of all subjects that are still there; none of their classes."""
    paths = [
        place / picture.file
        for place in prepared_folders(config, folder)
        for picture in earlier_index(place).pictures
    ]
    return [path for path in paths if path.is_file()]


def own_prompts(subjects: Sequence[RunSubject]) -> Mapping[str, str]:
    """What a run's pictures are called, by names to show it under."""
    prompts: dict[str, str] = {}
    for subject in subjects:
        name = "instance-prompt" if subject.is_instance_prompt else "caption"
        prompts[name if len(subjects) == 1 else f"{name} {subject.identifier}"] = subject.prompt
    return prompts


def public_name(config: TrainingConfig) -> str:
    """What a base model is called: its hub id, or the last part of its path."""
    url = config.model.model_url
    name = Path(url).name if Path(url).exists() else url
    return name if config.model.revision is None else f"{name} at {config.model.revision}"


def run_subject(run: FinishedRun, subjects: Sequence[RunSubject], given: str | None) -> str:
    """What `{subject}` stands for in the prompts of a run.

    Args:
        given: by the user.

    Raises:
        InputError: nobody says it.
    """
    phrase = given or subjects[0].phrase
    if phrase is None:
        raise InputError.of(SUBJECT, f"is missing, and {unnamed(run, subjects)}", SAY_SUBJECT)
    return phrase


def refuse_idle_subject(prompts: Library, given: str | None) -> None:
    """Refuses a subject that no prompt speaks of.

    Raises:
        InputError: there is such a one.
    """
    if given is not None and not any(prompt.has_subject for prompt in prompts.values()):
        message = "no prompt has `{subject}`, which it would stand for"
        raise InputError.of(SUBJECT, message, f"leave {SUBJECT} out")


def unnamed(run: FinishedRun, subjects: Sequence[RunSubject]) -> str:
    """Why nothing stands for `{subject}`."""
    return f"no caption of run `{run.folder.root}` has its identifier `{subjects[0].identifier}`"


def _subject(concept: Concept, captions: Sequence[str]) -> RunSubject:
    token, prompt = concept.token, concept.instance_prompt
    assert token is not None
    assert prompt is not None
    written = [caption for caption in captions if caption.strip()]
    is_shown = prompt in captions or not written
    return RunSubject(
        identifier=token,
        phrase=subject_phrase(concept, captions),
        of_class=class_phrase(concept),
        prompt=prompt if is_shown else Counter(written).most_common(1)[0][0],
        is_instance_prompt=is_shown,
    )
