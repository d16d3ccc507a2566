"""What `validate` says of the pictures and captions that the user gave.

Reads every picture and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.config import DataConfig, MaskConfig, Note
from trainer.data.archive import BadEntry
from trainer.data.captions import Origin
from trainer.data.crop import Size
from trainer.data.inventory import given_mask_file, opened
from trainer.data.masks import BadMask, given_mask, mask_origin
from trainer.data.pictures import BadPicture, Picture, decode
from trainer.data.prepared import sha256_of
from trainer.data.remarks import (
    mask_problem,
    none_left,
    notes_on_the_set,
    remarks_on,
    told,
    told_of,
)
from trainer.errors import InputError, Problem


@dataclass(frozen=True)
class PictureReport:
    """What `validate` says of one picture.

    Args:
        size: (height, width) upright, or nothing if it cannot be used.
        problem: why it cannot be used, or what is odd about it; empty if all is well.
    """

    name: str
    size: Size | None
    caption: str
    caption_origin: Origin
    problem: str


@dataclass(frozen=True)
class DataReport:
    """What `validate` says of the pictures and captions."""

    pictures: tuple[PictureReport, ...]
    notes: tuple[Note, ...]

    @property
    def num_usable(self) -> int:
        """Pictures that would be trained."""
        return sum(picture.size is not None for picture in self.pictures)

    @classmethod
    def joined(cls, reports: Sequence[DataReport]) -> DataReport:
        """What several sources of pictures hold together."""
        pictures = tuple(picture for report in reports for picture in report.pictures)
        notes = dict.fromkeys(note for report in reports for note in report.notes)
        return cls(pictures, tuple(notes))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "num_usable": self.num_usable,
            "pictures": [asdict(picture) for picture in self.pictures],
            "notes": [note.model_dump() for note in self.notes],
        }


def inspect(data: DataConfig, mask: MaskConfig, *, of_class: bool = False) -> DataReport:
    """What `prepare` would find, without writing anything or segmenting any picture.

    Raises:
        InputError: pictures, given masks or captions cannot be used, or no picture is usable.
    """
    pictures: list[PictureReport] = []
    digests: list[tuple[str, str]] = []
    problems: list[Problem] = []
    target = None
    if data.resolution_height is not None and data.resolution_width is not None:
        target = data.resolution_height, data.resolution_width
    with told_of(of_class), opened(data, of_class=of_class) as (source, inventory):
        for name in inventory.names:
            caption = inventory.captions[name]
            try:
                content = source.read(name)
                picture = decode(content)
                _check_mask(given_mask_file(source, inventory, name, mask), picture, mask, of_class)
            except (BadEntry, BadPicture) as error:
                report = PictureReport(name, None, caption.text, caption.origin, str(error))
            except BadMask as error:
                problems.append(mask_problem(inventory.masks[name], error))
                continue
            else:
                digests.append((name, sha256_of(content)))
                problem = "; ".join(remarks_on(picture, target))
                report = PictureReport(name, picture.size, caption.text, caption.origin, problem)
            pictures.append(report)
        if problems:
            raise InputError(problems)
        if not digests:
            raise none_left([f"`{picture.name}`: {picture.problem}" for picture in pictures])
    notes = (*inventory.notes, *notes_on_the_set(digests, of_class))
    return DataReport(tuple(pictures), tuple(told(note, of_class) for note in notes))


def _check_mask(given: bytes | None, picture: Picture, mask: MaskConfig, of_class: bool) -> None:
    """Refuses a mask file that cannot be used.

    Raises:
        BadMask: see `given_mask`.
    """
    origin = mask_origin(
        mask, of_class=of_class, given_sha256="" if given is not None else None, has_alpha=False
    )
    if given is not None and origin is not None:
        given_mask(given, picture.size, inverted=origin.inverted)
