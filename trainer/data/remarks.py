"""What users are told of their pictures: of one, of all together, of those of a class.

How pictures are found and prepared is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from trainer.config import Note
from trainer.data.advice import on_copies, on_count
from trainer.errors import InputError, Problem
from trainer.images.masks import BadMask
from trainer.images.pictures import ACCEPTED
from trainer.sources.archive import FIELD

# What the user calls the options of pictures when they are class pictures.
CLASS_FIELDS: Mapping[str, str] = {FIELD: "class_images_url", "instance_prompt": "class_prompt"}

_SHOWN_REASONS = 10


@contextmanager
def told_of(of_class: bool) -> Iterator[None]:
    """Puts errors down to the options of class pictures where it is about those."""
    try:
        yield
    except InputError as error:
        if not of_class:
            raise
        raise InputError(
            [replace(p, field=CLASS_FIELDS.get(p.field, p.field)) for p in error.problems]
        ) from error


def told(note: Note, of_class: bool) -> Note:
    """A note, put down to the options of class pictures where it is about those."""
    field = CLASS_FIELDS.get(note.field, note.field) if of_class else note.field
    return note.model_copy(update={"field": field})


def notes_on_the_set(digests: Sequence[tuple[str, str]], of_class: bool) -> list[Note]:
    """The urgent advice on all usable pictures that no single one's remarks give.

    Args:
        digests: name and sha256 of each picture.
        of_class: the pictures show the class: of them a few are enough.
    """
    lines = [on_copies(digests)] if of_class else [on_count(len(digests)), on_copies(digests)]
    return [warning(f"{line.found}; {line.advice}") for line in lines if line.level == "act"]


def mask_problem(name: str, error: BadMask) -> Problem:
    """That a given mask, by its name, cannot be used."""
    return Problem(FIELD, f"the mask `{name}` {error}", error.hint)


def none_left(reasons: Sequence[str]) -> InputError:
    """The error that no picture can be used, for these reasons."""
    shown = "; ".join(reasons[:_SHOWN_REASONS])
    more = len(reasons) - _SHOWN_REASONS
    return InputError.of(
        FIELD,
        f"no picture can be used: {shown}" + (f"; and {more} more" if more > 0 else ""),
        f"give pictures that open in an image viewer; accepted: {ACCEPTED}",
    )


def warning(message: str) -> Note:
    """A warning about the pictures."""
    return Note(kind="warning", field=FIELD, message=message)
