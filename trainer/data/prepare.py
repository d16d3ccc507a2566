"""Turns the user's pictures into `prepared/`: upright RGB files that cover the trained size.

Beside each picture lies its mask, where not the whole picture counts. Cropping, turning and
mirroring are drawn later, each time a picture is used. `prepared/prepared.json` says what each
file is; a second call with the same pictures and masks decodes nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config import DataConfig, MaskConfig, Note
from trainer.data.archive import FIELD, BadEntry, Source, open_source
from trainer.data.captions import Origin
from trainer.data.crop import Mask, Size, enlargement, resize_to_cover
from trainer.data.inventory import Inventory, take_inventory
from trainer.data.masks import (
    SEGMENTERS,
    BadMask,
    MaskOrigin,
    Segmenter,
    alpha_mask,
    given_mask,
    is_faint,
    mask_of,
    mask_origin,
    resized_mask,
)
from trainer.data.pictures import ACCEPTED, BadPicture, Picture, decode
from trainer.data.prepared import (
    Example,
    Index,
    Prepared,
    PreparedMask,
    earlier_index,
    publish_index,
    sha256_of,
)
from trainer.durable import write_bytes
from trainer.errors import InputError, Problem
from trainer.events import Event, NoteEvent, StageEvent

__all__ = ["DataReport", "Example", "PictureReport", "inspect", "prepare"]

# The fal documentation asks for at least ten pictures.
FEW_PICTURES = 10
# A picture enlarged more than this teaches blur.
LARGEST_ENLARGEMENT = 2.0
# What the user calls the options of pictures when they are class pictures.
CLASS_FIELDS: Mapping[str, str] = {FIELD: "class_images_url", "instance_prompt": "class_prompt"}

_SHOWN_REASONS = 10


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


def prepare(
    data: DataConfig,
    mask: MaskConfig,
    folder: Path,
    *,
    width: int,
    height: int,
    of_class: bool = False,
) -> Generator[Event, None, tuple[Example, ...]]:
    """Writes every usable picture and its mask into the folder; says what was left out and why.

    Args:
        data: where pictures and captions are; for class pictures theirs, under the same names.
        mask: what counts in them.
        folder: made when missing; belongs to this function.
        width: trained width in pixels.
        height: trained height in pixels.
        of_class: the pictures show the class, not the subject.

    Raises:
        InputError: pictures, given masks or captions cannot be used, or no picture is left.
        DiskError: the folder cannot be written.
    """
    stage = "prepare class images" if of_class else "prepare"
    earlier = earlier_index(folder, (height, width))
    pictures: list[Prepared] = []
    reasons: list[str] = []
    problems: list[Problem] = []
    with _told_of(of_class), _opened(data, of_class) as (source, inventory):
        yield from _events(inventory.notes, of_class)
        work = _Preparation(source, inventory, earlier, folder, mask, of_class, cache(_segmenter))
        for done, name in enumerate(inventory.names, start=1):
            try:
                picture = work.prepared(name, len(pictures))
            except (BadEntry, BadPicture) as error:
                reasons.append(f"`{name}`: {error}")
                yield from _events([_warning(f"`{name}` is left out: {error}")], of_class)
            except BadMask as error:
                message = f"the mask `{inventory.masks[name]}` {error}"
                problems.append(Problem(FIELD, message, error.hint))
            else:
                pictures.append(picture)
                remarks = [_warning(f"`{name}` {remark}") for remark in picture.all_remarks()]
                yield from _events(remarks, of_class)
            yield StageEvent(stage, done, len(inventory.names))
        if problems:
            raise InputError(problems)
        if not pictures:
            raise _none_left(reasons)
    digests = [(picture.name, picture.sha256) for picture in pictures]
    yield from _events(_notes_on_the_set(digests, of_class), of_class)
    publish_index(Index(target=(height, width), pictures=tuple(pictures)), folder)
    return tuple(picture.example(folder, is_class=of_class) for picture in pictures)


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
    with _told_of(of_class), _opened(data, of_class) as (source, inventory):
        for name in inventory.names:
            caption = inventory.captions[name]
            try:
                content = source.read(name)
                picture = decode(content)
                _check_mask(_given(source, inventory, name, mask), picture, mask, of_class)
            except (BadEntry, BadPicture) as error:
                report = PictureReport(name, None, caption.text, caption.origin, str(error))
            except BadMask as error:
                message = f"the mask `{inventory.masks[name]}` {error}"
                problems.append(Problem(FIELD, message, error.hint))
                continue
            else:
                digests.append((name, sha256_of(content)))
                problem = "; ".join(_remarks(picture, target))
                report = PictureReport(name, picture.size, caption.text, caption.origin, problem)
            pictures.append(report)
        if problems:
            raise InputError(problems)
        if not digests:
            raise _none_left([f"`{picture.name}`: {picture.problem}" for picture in pictures])
    notes = (*inventory.notes, *_notes_on_the_set(digests, of_class))
    return DataReport(tuple(pictures), tuple(_told(note, of_class) for note in notes))


@dataclass(frozen=True)
class _Preparation:
    """What is needed to prepare a picture of a source.

    Args:
        source: the user's files.
        inventory: what they are.
        earlier: what an earlier call left in the folder.
        folder: where prepared files go.
        mask: what counts in the pictures.
        of_class: whether they are class pictures.
        segmenter: gives the segmenter of a name, made ready once.
    """

    source: Source
    inventory: Inventory
    earlier: Index
    folder: Path
    mask: MaskConfig
    of_class: bool
    segmenter: Callable[[str], Segmenter]

    def prepared(self, name: str, number: int) -> Prepared:
        """The files of one picture, written unless they are there already.

        Raises:
            BadEntry: the file cannot be read.
            BadPicture: the picture cannot be used.
            BadMask: the mask that the user gave for it cannot be used.
        """
        content = self.source.read(name)
        digest = sha256_of(content)
        picture = None
        prepared = self.earlier.known(number, digest, self.folder)
        if prepared is None:
            picture = decode(content)
            prepared = self._written(picture, number, digest)
        caption = self.inventory.captions[name]
        update = {
            "name": name,
            "caption": caption.text,
            "caption_origin": caption.origin,
            "mask": self._mask(name, prepared, picture, content),
        }
        return prepared.model_copy(update=update)

    def _written(self, picture: Picture, number: int, digest: str) -> Prepared:
        """The prepared file of a decoded picture, not yet named."""
        target = self.earlier.target
        resized = resize_to_cover(picture.image, target)
        encoded = _png(resized)
        file = f"{number:03d}.png"
        write_bytes(self.folder / file, encoded)
        return Prepared(
            number=number,
            name="",
            caption="",
            caption_origin="instance_prompt",
            file=file,
            sha256=digest,
            file_sha256=sha256_of(encoded),
            original_size=picture.size,
            size=(resized.height, resized.width),
            has_alpha=picture.alpha is not None,
            remarks=_remarks(picture, target),
        )

    def _mask(
        self, name: str, prepared: Prepared, picture: Picture | None, content: bytes
    ) -> PreparedMask | None:
        """The mask of a picture, written unless the same one is there already.

        Args:
            name: of the picture.
            prepared: as it is, perhaps with the mask of an earlier call.
            picture: decoded, if that was necessary.
            content: of the picture's file.
        """
        given = _given(self.source, self.inventory, name, self.mask)
        origin = mask_origin(
            self.mask,
            of_class=self.of_class,
            given_sha256=sha256_of(given) if given is not None else None,
            has_alpha=prepared.has_alpha,
        )
        if origin is None:
            return None
        known = prepared.mask
        if known is not None and known.origin == origin and known.is_intact(self.folder):
            return known
        remarks: tuple[str, ...] = ()
        if origin.kind == "given":
            assert given is not None
            mask = given_mask(given, prepared.original_size, inverted=origin.inverted)
        else:
            picture = picture or decode(content)
            mask, remarks = self._seen(origin, picture)
        resized = resized_mask(mask, prepared.size)
        return self._written_mask(
            resized, prepared.number, PreparedMask(origin=origin, remarks=remarks)
        )

    def _seen(self, origin: MaskOrigin, picture: Picture) -> tuple[Mask, tuple[str, ...]]:
        """The mask that a picture itself gives, by its opacity or by a segmenter; remarks."""
        if origin.kind == "alpha":
            assert picture.alpha is not None
            return alpha_mask(picture.alpha, inverted=origin.inverted), ()
        logits = self.segmenter(origin.segmenter)(picture.image, origin.prompt)
        mask = mask_of(
            logits, temperature=origin.temperature, bias=origin.bias, inverted=origin.inverted
        )
        # Class pictures need not show everything that the subject's do.
        if self.of_class or not is_faint(logits, temperature=origin.temperature):
            return mask, ()
        return mask, (f"shows hardly any `{origin.prompt}`, its mask may be at random",)

    def _written_mask(self, mask: Mask, number: int, described: PreparedMask) -> PreparedMask:
        if bool((mask == 1).all()):
            return described
        encoded = BytesIO()
        np.save(encoded, mask)
        file, view = f"{number:03d}.mask.npy", f"{number:03d}.mask.png"
        write_bytes(self.folder / view, _png(Image.fromarray(np.rint(mask * 255).astype(np.uint8))))
        write_bytes(self.folder / file, encoded.getvalue())
        update = {"file": file, "sha256": sha256_of(encoded.getvalue()), "view": view}
        return described.model_copy(update=update)


def _segmenter(name: str) -> Segmenter:
    return SEGMENTERS[name]()


def _png(image: Image.Image) -> bytes:
    encoded = BytesIO()
    # Level 1 is several times faster than the default and a tenth larger.
    image.save(encoded, format="PNG", compress_level=1)
    return encoded.getvalue()


@contextmanager
def _opened(data: DataConfig, of_class: bool) -> Iterator[tuple[Source, Inventory]]:
    """The files of the pictures, and what they are."""
    # Class pictures without a caption of their own get the class prompt.
    if of_class:
        data = data.model_copy(update={"skip_caption_generation": True})
    with open_source(data.images_data_url) as source:
        inventory = take_inventory(source, data)
        if of_class:
            # There is no option for a captions file of class pictures.
            notes = tuple(n for n in inventory.notes if n.field != "captions_file_url")
            inventory = replace(inventory, notes=notes)
        yield source, inventory


def _given(source: Source, inventory: Inventory, name: str, mask: MaskConfig) -> bytes | None:
    """The content of the mask file that the user gave for a picture, if it is wanted.

    Raises:
        BadMask: it cannot be read.
    """
    if not mask.use_given_masks or name not in inventory.masks:
        return None
    try:
        return source.read(inventory.masks[name])
    except BadEntry as error:
        raise BadMask(f"cannot be used: {error}", "save it as a greyscale PNG") from error


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


@contextmanager
def _told_of(of_class: bool) -> Iterator[None]:
    """Puts errors down to the options of class pictures where it is about those."""
    try:
        yield
    except InputError as error:
        if not of_class:
            raise
        raise InputError(
            [replace(p, field=CLASS_FIELDS.get(p.field, p.field)) for p in error.problems]
        ) from error


def _told(note: Note, of_class: bool) -> Note:
    """A note, put down to the options of class pictures where it is about those."""
    field = CLASS_FIELDS.get(note.field, note.field) if of_class else note.field
    return note.model_copy(update={"field": field})


def _remarks(picture: Picture, target: Size | None) -> tuple[str, ...]:
    if target is None or enlargement(picture.size, target) <= LARGEST_ENLARGEMENT:
        return picture.remarks
    height, width = picture.size
    times = enlargement(picture.size, target)
    small = f"({width}x{height}) is enlarged {times:.1f} times and teaches blur; use a larger one"
    return (*picture.remarks, small)


def _notes_on_the_set(digests: Sequence[tuple[str, str]], of_class: bool) -> list[Note]:
    """Remarks on all usable pictures together, given as names and sha256."""
    notes = []
    if len(digests) < FEW_PICTURES and not of_class:
        message = f"only {len(digests)} pictures; at least {FEW_PICTURES} are recommended"
        notes.append(_warning(message))
    first_with: dict[str, str] = {}
    for name, digest in digests:
        first = first_with.setdefault(digest, name)
        if first != name:
            notes.append(_warning(f"`{name}` is the same picture as `{first}` and counts twice"))
    return notes


def _none_left(reasons: Sequence[str]) -> InputError:
    shown = "; ".join(reasons[:_SHOWN_REASONS])
    more = len(reasons) - _SHOWN_REASONS
    return InputError.of(
        FIELD,
        f"no picture can be used: {shown}" + (f"; and {more} more" if more > 0 else ""),
        f"give pictures that open in an image viewer; accepted: {ACCEPTED}",
    )


def _warning(message: str) -> Note:
    return Note(kind="warning", field=FIELD, message=message)


def _events(notes: Sequence[Note], of_class: bool) -> Iterator[NoteEvent]:
    for note in notes:
        told = _told(note, of_class)
        yield NoteEvent(told.kind, told.field, told.message)
