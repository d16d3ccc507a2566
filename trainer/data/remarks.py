"""What users are told of their pictures: of one, of all together, of those of a class.

How pictures are found and prepared is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from trainer.config import Note
from trainer.data.archive import FIELD
from trainer.data.crop import Size, enlargement
from trainer.data.masks import BadMask
from trainer.data.pictures import ACCEPTED, Picture
from trainer.errors import InputError, Problem

# The fal documentation asks for at least ten pictures.
FEW_PICTURES = 10
# A picture enlarged more than this teaches blur.
LARGEST_ENLARGEMENT = 2.0
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


def remarks_on(picture: Picture, target: Size | None) -> tuple[str, ...]:
    """What is odd about a picture.

    Args:
        target: trained (height, width), if that is known.
    """
    if target is None or enlargement(picture.size, target) <= LARGEST_ENLARGEMENT:
        return picture.remarks
    height, width = picture.size
    times = enlargement(picture.size, target)
    small = f"({width}x{height}) is enlarged {times:.1f} times and teaches blur; use a larger one"
    return (*picture.remarks, small)


def notes_on_the_set(digests: Sequence[tuple[str, str]], of_class: bool) -> list[Note]:
    """Remarks on all usable pictures together, given as names and sha256."""
    notes = []
    if len(digests) < FEW_PICTURES and not of_class:
        message = f"only {len(digests)} pictures; at least {FEW_PICTURES} are recommended"
        notes.append(warning(message))
    first_with: dict[str, str] = {}
    for name, digest in digests:
        first = first_with.setdefault(digest, name)
        if first != name:
            notes.append(warning(f"`{name}` is the same picture as `{first}` and counts twice"))
    return notes


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
