"""Turns the user's pictures into `prepared/`: upright RGB files that cover the trained size.

Beside each picture lies its mask, where not the whole picture counts. Cropping, turning and
mirroring are drawn later, each time a picture is used. `prepared/prepared.json` says what each
file is; a second call with the same pictures and masks decodes nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config import DataConfig, MaskConfig, Note
from trainer.data.archive import BadEntry, Source
from trainer.data.crop import Mask, resize_to_cover
from trainer.data.inventory import Inventory, given_mask_file, opened
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
from trainer.data.pictures import BadPicture, Picture, decode
from trainer.data.prepared import (
    Example,
    Index,
    Prepared,
    PreparedMask,
    earlier_index,
    publish_index,
    sha256_of,
)
from trainer.data.remarks import (
    mask_problem,
    none_left,
    notes_on_the_set,
    remarks_on,
    told,
    told_of,
    warning,
)
from trainer.durable import write_bytes
from trainer.errors import InputError, Problem
from trainer.events import Event, NoteEvent, StageEvent


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
    with told_of(of_class), opened(data, of_class=of_class) as (source, inventory):
        yield from _events(inventory.notes, of_class)
        work = _Preparation(source, inventory, earlier, folder, mask, of_class, cache(_segmenter))
        for done, name in enumerate(inventory.names, start=1):
            try:
                picture = work.prepared(name, len(pictures))
            except (BadEntry, BadPicture) as error:
                reasons.append(f"`{name}`: {error}")
                yield from _events([warning(f"`{name}` is left out: {error}")], of_class)
            except BadMask as error:
                problems.append(mask_problem(inventory.masks[name], error))
            else:
                pictures.append(picture)
                remarks = [warning(f"`{name}` {remark}") for remark in picture.all_remarks()]
                yield from _events(remarks, of_class)
            yield StageEvent(stage, done, len(inventory.names))
        if problems:
            raise InputError(problems)
        if not pictures:
            raise none_left(reasons)
    digests = [(picture.name, picture.sha256) for picture in pictures]
    yield from _events(notes_on_the_set(digests, of_class), of_class)
    publish_index(Index(target=(height, width), pictures=tuple(pictures)), folder)
    return tuple(picture.example(folder, is_class=of_class) for picture in pictures)


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
            remarks=remarks_on(picture, target),
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
        given = given_mask_file(self.source, self.inventory, name, self.mask)
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


def _events(notes: Sequence[Note], of_class: bool) -> Iterator[NoteEvent]:
    for note in (told(note, of_class) for note in notes):
        yield NoteEvent(note.kind, note.field, note.message)
