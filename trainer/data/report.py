"""What `validate` says of the pictures and captions that the user gave.

Reads every picture and writes nothing; looks for no faces and no subject, so what depends on
them is told as if every picture showed them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import MaskConfig, Note
from trainer.data.advice import Advice, Subject, advise, recommended_size
from trainer.data.inventory import given_mask_file
from trainer.data.picture_set import PictureSet
from trainer.data.prepared import sha256_of
from trainer.data.remarks import mask_problem, none_left, notes_on_the_set, told, told_of
from trainer.errors import InputError, Problem
from trainer.images.crop import Size
from trainer.images.findings import Remark
from trainer.images.masks import BadMask, given_mask, mask_origin
from trainer.images.pictures import BadPicture, Picture, decode
from trainer.images.quality import measure, remarks_on_quality
from trainer.sources.archive import BadEntry
from trainer.sources.caption_files import FIELD as CAPTIONS
from trainer.sources.captions import Origin
from trainer.sources.download import downloaded
from trainer.sources.location import MAX_CAPTIONS_BYTES
from trainer.stages import drained

_FACES_NOT_SOUGHT = (
    "faces are looked for by `prepare` and `train` only; sizes are told as if every picture showed "
    "one, and it filled the picture"
)


@dataclass(frozen=True)
class PictureReport:
    """What `validate` says of one picture.

    Args:
        size: (height, width) upright, or nothing if it cannot be used.
        target: trained (height, width), the largest of several, if that is known.
        smaller: other trained (height, width), the larger first.
        repeats: times that an epoch shows it.
        problem: why it cannot be used, or what is odd about it; empty if all is well.
    """

    name: str
    size: Size | None
    target: Size | None
    caption: str
    caption_origin: Origin
    repeats: int
    problem: str
    smaller: tuple[Size, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What `validate` says of the pictures and captions.

    Args:
        advice: on each set of pictures of a subject.
    """

    pictures: tuple[PictureReport, ...]
    notes: tuple[Note, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def usable(self) -> tuple[PictureReport, ...]:
        """Pictures that would be trained."""
        return tuple(picture for picture in self.pictures if picture.size is not None)

    @property
    def num_usable(self) -> int:
        """How many pictures would be trained."""
        return len(self.usable)

    @classmethod
    def joined(cls, reports: Sequence[DataReport]) -> DataReport:
        """What several sources of pictures hold together."""
        pictures = tuple(picture for report in reports for picture in report.pictures)
        notes = dict.fromkeys(note for report in reports for note in report.notes)
        advice = tuple(one for report in reports for one in report.advice)
        return cls(pictures, tuple(notes), advice)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "num_usable": self.num_usable,
            "pictures": [asdict(picture) for picture in self.pictures],
            "notes": [note.model_dump() for note in self.notes],
            "advice": [one.as_dict() for one in self.advice],
        }


def inspect(wanted: PictureSet) -> DataReport:
    """What `prepare` would find, without writing anything or segmenting any picture.

    Raises:
        InputError: pictures, given masks or captions cannot be used, or no picture is usable.
    """
    with told_of(wanted.of_class), tempfile.TemporaryDirectory() as folder:
        data, place = wanted.data, Path(folder)
        pictures = drained(downloaded(data.images_data_url, place))
        captions = drained(
            downloaded(data.captions_file_url, place, field=CAPTIONS, limit=MAX_CAPTIONS_BYTES)
        )
        return _inspected(wanted, pictures, captions)


def _inspected(
    wanted: PictureSet, pictures_file: Path | None, captions_file: Path | None
) -> DataReport:
    pictures: list[PictureReport] = []
    subjects: list[Subject] = []
    problems: list[Problem] = []
    of_class = wanted.of_class
    with wanted.opened(pictures_file, captions_file=captions_file) as (source, inventory):
        for name in inventory.names:
            caption = inventory.captions[name]
            repeats = inventory.repeats.get(name, 1)
            size: Size | None = None
            targets: tuple[Size, ...] = ()
            remarks = ""
            try:
                content = source.read(name)
                picture = decode(content, name)
                given_file = given_mask_file(source, inventory, name, wanted.mask)
                _check_mask(given_file, picture, wanted.mask, of_class)
            except (BadEntry, BadPicture) as error:
                remarks = str(error)
            except BadMask as error:
                problems.append(mask_problem(inventory.masks[name], error))
                continue
            else:
                subject = _subject(name, content, picture, wanted)
                subjects.append(subject)
                size, targets = picture.size, wanted.targets(subject.size)
                remarks = "; ".join(remark.text for remark in subject.remarks)
            pictures.append(
                PictureReport(
                    name=name,
                    size=size,
                    target=next(iter(targets), None),
                    caption=caption.text,
                    caption_origin=caption.origin,
                    repeats=repeats,
                    problem=remarks,
                    smaller=targets[1:],
                )
            )
        if problems:
            raise InputError(problems)
        if not subjects:
            raise none_left([f"`{picture.name}`: {picture.problem}" for picture in pictures])
    advice = () if of_class else (advise(subjects),)
    notes = (*inventory.notes, *_notes(wanted, subjects))
    return DataReport(tuple(pictures), tuple(told(note, of_class) for note in notes), advice)


def _notes(wanted: PictureSet, subjects: Sequence[Subject]) -> Iterator[Note]:
    """What there is to say of all pictures beside the advice, which class pictures get none of."""
    if wanted.of_class:
        digests = [(subject.name, subject.sha256) for subject in subjects]
        yield from notes_on_the_set(digests, wanted.of_class)
    if wanted.cuts:
        yield Note(kind="warning", field="face_crop_region", message=_FACES_NOT_SOUGHT)


def _subject(name: str, content: bytes, picture: Picture, wanted: PictureSet) -> Subject:
    measures = measure(picture.image)
    size = picture.size
    if wanted.cuts:
        # The largest square about a face: how large it is only the face tells.
        size = min(size), min(size)
    target = next(iter(wanted.targets(size)), None)
    remarks: tuple[Remark, ...] = picture.remarks
    if not wanted.of_class:
        remarks += remarks_on_quality(measures, size, None if wanted.cuts else target)
    return Subject(
        name=name,
        size=size,
        sha256=sha256_of(content),
        measures=measures,
        remarks=remarks,
        target=target,
        recommended=recommended_size(wanted.data.priority),
    )


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
