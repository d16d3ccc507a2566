"""Turns the user's pictures into `prepared/`: upright RGB files that cover the trained size.

Beside each picture lies its mask, where not the whole picture counts. Cropping, turning and
mirroring are drawn later, each time a picture is used. `prepared/prepared.json` says what each
file is; a second call with the same pictures and options does no work again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Note
from trainer.data import captioning, overview
from trainer.data.inventory import Inventory, given_mask_file
from trainer.data.masking import Masking
from trainer.data.means import Means, means_of, ready_means
from trainer.data.picture_set import PictureSet
from trainer.data.prepared import (
    INDEX,
    Example,
    Index,
    LeftOut,
    Prepared,
    PreparedMask,
    earlier_index,
    publish_index,
    read_rendering,
    sha256_of,
    write_mask,
    write_rendering,
)
from trainer.data.remarks import mask_problem, none_left, notes_on_the_set, told, told_of, warning
from trainer.data.store import Store
from trainer.data.views import Darkroom, Rendering, Scale, View
from trainer.durable import disk_errors
from trainer.errors import InputError, Problem
from trainer.events import Event, NoteEvent, StageEvent
from trainer.images.crop import (
    Mask,
    centre_of_mass,
    face_window,
    upper_window,
    window_around,
)
from trainer.images.faces import remarks_on_faces
from trainer.images.findings import Remark
from trainer.images.masks import BadMask
from trainer.images.pictures import BadPicture
from trainer.images.quality import remarks_on_quality
from trainer.sources.archive import FIELD, MAX_TOTAL_BYTES, BadEntry, Source
from trainer.sources.caption_files import FIELD as CAPTIONS
from trainer.sources.download import downloaded, remove_downloads, removed_if_refused
from trainer.sources.location import MAX_CAPTIONS_BYTES
from trainer.stages import retold

# What lies beside pictures and masks.
_OTHERS = (overview.REPORT, captioning.CAPTIONS, INDEX)
# More threads than this only wait for each other's memory.
_MOST_THREADS = 4
# Of more pictures than this, the contact sheet tells what is odd about them.
_MOST_REMARKED = 10


def prepare(
    wanted: PictureSet, folder: Path, store: Store, *, settled: bool = False
) -> Generator[Event, None, tuple[Example, ...]]:
    """Writes every usable picture and its mask into the folder; says what was left out and why.

    What an earlier call with the same options left in the folder stands, also where this machine
    could not have made it.

    Args:
        wanted: the pictures.
        folder: made when missing; belongs to this function.
        store: what was made before, for this folder or another.
        settled: a training has begun on what lies in the folder: what was makeshift there, for
            want of a detector or captioner, stands as well.

    Returns:
        Each picture at each of its sizes.

    Raises:
        InputError: pictures, given masks or captions cannot be used, or no picture is left.
        DiskError: the folder cannot be written.
    """
    earlier = earlier_index(folder)
    notes: list[Note] = []
    making = _index(wanted, folder, store, earlier, settled=settled)
    index = yield from _noted(making, notes)
    # Before the index, which says that all is done.
    if index != earlier or not overview.is_there(folder, wanted.data):
        overview.write(index, folder, of_class=wanted.of_class, data=wanted.data, notes=notes)
    publish_index(index, folder)
    store.prune()
    return tuple(
        example
        for picture in index.pictures
        for example in picture.examples(folder, is_class=wanted.of_class)
    )


def forget(folder: Path) -> None:
    """Removes what `prepare` left in a folder; anything else in it stays.

    Raises:
        DiskError: it cannot be written.
    """
    if not folder.is_dir():
        return
    publish_index(Index(), folder)
    remove_downloads(folder, keep=())
    with disk_errors(folder):
        for path in [*overview.sheets(folder), *(folder / name for name in _OTHERS)]:
            path.unlink(missing_ok=True)


def _index(
    wanted: PictureSet, folder: Path, store: Store, earlier: Index, *, settled: bool
) -> Generator[Event, None, Index]:
    """The prepared pictures with masks and captions."""
    with told_of(wanted.of_class):
        index = yield from _pictures(wanted, folder, store, earlier, settled=settled)
    index = yield from captioning.captioned(index, folder, wanted, earlier, store, settled=settled)
    digests = [(picture.name, picture.sha256) for picture in index.pictures]
    yield from _events(notes_on_the_set(digests, wanted.of_class), wanted.of_class)
    return index


def _noted(
    stage: Generator[Event, None, Index], notes: list[Note]
) -> Generator[Event, None, Index]:
    """A stage whose notes are kept."""

    def tell(event: Event) -> Iterator[Event]:
        if isinstance(event, NoteEvent):
            kind: Any = event.note
            notes.append(Note(kind=kind, field=event.field, message=event.message))
        yield event

    return retold(stage, tell)


def _pictures(
    wanted: PictureSet, folder: Path, store: Store, earlier: Index, *, settled: bool
) -> Generator[Event, None, Index]:
    """The pictures without what a captioner writes; models that see them are given up after it."""
    # What is not installed is told before anything is fetched.
    made = None if earlier.pictures else (yield from ready_means(wanted))
    file = yield from _fetched(wanted.data.images_data_url, folder, FIELD, MAX_TOTAL_BYTES)
    captions_file = yield from _fetched(
        wanted.data.captions_file_url, folder, CAPTIONS, MAX_CAPTIONS_BYTES
    )
    remove_downloads(folder, keep=(file, captions_file))
    with (
        removed_if_refused(pictures=file, captions=captions_file),
        wanted.opened(file, captions_file=captions_file) as (source, inventory),
    ):
        yield from _events(inventory.notes, wanted.of_class)
        work = _Preparation(wanted, source, inventory, earlier, folder, store)
        if not earlier.pictures:
            work.check()
        elif not work.all_known(settled=settled):
            made = yield from ready_means(wanted)
        if made is not None:
            yield from _events(made.notes, wanted.of_class)
            work.use(made, settled=settled)
        return (yield from work.index())


def _fetched(
    location: str | None, folder: Path, field: str, limit: int
) -> Generator[Event, None, Path | None]:
    """The file behind a web address; a note where it was there already."""
    steps: list[Event] = []

    def tell(event: Event) -> Iterator[Event]:
        steps.append(event)
        yield event

    file = yield from retold(downloaded(location, folder, field=field, limit=limit), tell)
    if file is not None and not steps:
        message = f"was downloaded earlier; to fetch it again, remove `{file}`"
        yield NoteEvent("warning", field, message)
    return file


@dataclass(frozen=True)
class _Item:
    """One file that should be a picture.

    Args:
        known: what an earlier call left of it in the folder, under whatever number.
        rendering: gives its pixels.
    """

    name: str
    sha256: str
    known: Prepared | None
    rendering: Callable[[], Rendering]


class _Preparation:
    """The work on the pictures of one set.

    Args:
        wanted: the pictures.
        source: the user's files.
        inventory: what they are.
        earlier: what an earlier call left in the folder.
        folder: where prepared files go.
        store: what was made before.
    """

    def __init__(
        self,
        wanted: PictureSet,
        source: Source,
        inventory: Inventory,
        earlier: Index,
        folder: Path,
        store: Store,
    ) -> None:
        self.wanted = wanted
        self.source = source
        self.inventory = inventory
        self.earlier = earlier
        self.folder = folder
        self.darkroom = Darkroom(wanted, cache(partial(means_of, wanted)), store)
        self.masking = Masking(
            wanted.mask,
            of_class=wanted.of_class,
            one_subject=not wanted.of_class and wanted.wants_faces,
            store=store,
        )
        self._makes_anew = False

    def check(self) -> None:
        """Refuses models that cannot be had, before any picture is decoded.

        Raises:
            InputError: a captioner that the user named, or the segmenter, cannot be used.
        """
        if any(c.origin == "instance_prompt" for c in self.inventory.captions.values()):
            captioning.check(self.wanted)
        # Other kinds of pictures may have masks of their own: their opacity.
        opaque = [n for n in self.inventory.names if n.lower().endswith((".jpg", ".jpeg"))]
        if any(name not in self.inventory.masks for name in opaque):
            self.masking.check()

    def all_known(self, *, settled: bool) -> bool:
        """Whether an earlier call left every picture, none of them makeshift unless settled."""
        return all(self._stands(name, settled=settled) for name in self.inventory.names)

    def _stands(self, name: str, *, settled: bool) -> bool:
        try:
            known = self._known(name, sha256_of(self.source.read(name)))
        except BadEntry:
            return True
        return known is not None and (settled or not known.view.is_makeshift)

    def use(self, means: Means, *, settled: bool) -> None:
        """Renders with these means from now on; what was makeshift anew, where they are not."""
        self.darkroom = replace(self.darkroom, means=lambda: means)
        self._makes_anew = not settled and not means.are_makeshift

    def index(self) -> Generator[Event, None, Index]:
        """Prepares every picture.

        Raises:
            InputError: given masks cannot be used, or no picture is left.
        """
        of_class = self.wanted.of_class
        stage = "prepare class images" if of_class else "prepare"
        pictures: list[Prepared] = []
        left_out: list[LeftOut] = []
        problems: list[Problem] = []
        remarked = 0
        names = self.inventory.names
        for done, (name, item) in enumerate(self._items(), start=1):
            try:
                picture = self._prepared(item(), len(pictures))
            except (BadEntry, BadPicture) as error:
                left_out.append(LeftOut(name=name, reason=str(error)))
                yield from _events([warning(f"`{name}` is left out: {error}")], of_class)
            except BadMask as error:
                problems.append(mask_problem(self.inventory.masks[name], error))
            else:
                pictures.append(picture)
                texts = [r.text for r in picture.all_remarks() if r.kind == "warning"]
                remarked += bool(texts)
                if remarked <= _MOST_REMARKED:
                    yield from _events([warning(f"`{name}` {text}") for text in texts], of_class)
            yield StageEvent(stage, done, len(names))
        if problems:
            raise InputError(problems)
        if not pictures:
            raise none_left([f"`{picture.name}`: {picture.reason}" for picture in left_out])
        if remarked > _MOST_REMARKED:
            more = remarked - _MOST_REMARKED
            message = f"{more} more pictures deserve a look: see {overview.SHEET.format(1)}"
            yield from _events([warning(message)], of_class)
        return Index(pictures=tuple(pictures), left_out=tuple(left_out))

    def _items(self) -> Iterator[tuple[str, Callable[[], _Item]]]:
        """Each file in order, rendered ahead by a few threads; errors come when it is asked for."""
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        ahead: deque[tuple[str, Callable[[], _Item]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for place, name in enumerate(self.inventory.names):
                ahead.append((name, self._item(place, name, pool)))
                if len(ahead) > threads:
                    yield ahead.popleft()
            yield from ahead

    def _item(self, place: int, name: str, pool: ThreadPoolExecutor) -> Callable[[], _Item]:
        """One file, whose rendering is begun unless it is not needed.

        Args:
            place: among all files: no picture gets a higher number.
        """
        try:
            content = self.source.read(name)
        except BadEntry as error:
            return partial(_raise, error)
        sha256 = sha256_of(content)
        known = self._known(name, sha256)
        if known is None or (self._makes_anew and known.view.is_makeshift):
            future = pool.submit(self.darkroom.rendering, content, sha256, name)
            return lambda: _Item(name, sha256, None, future.result)
        again = partial(self._rendering_again, name, known)
        if known.number != place:
            # Now: its files may be another picture's when it is its turn.
            rendering = again()
            return lambda: _Item(name, sha256, known, lambda: rendering)
        return lambda: _Item(name, sha256, known, again)

    def _known(self, name: str, sha256: str) -> Prepared | None:
        return self.earlier.known(name, self.darkroom.request(sha256, name), self.folder)

    def _rendering_again(self, name: str, known: Prepared) -> Rendering:
        """The rendering whose files lie in the folder."""
        return read_rendering(known, self.folder, lambda: self.source.read(name))

    def _prepared(self, item: _Item, number: int) -> Prepared:
        """The files of one picture, written unless they are there already.

        Raises:
            BadEntry: the file cannot be read.
            BadPicture: the picture cannot be used.
            BadMask: the mask that the user gave for it cannot be used.
        """
        prepared = item.known
        if prepared is None or prepared.number != number:
            prepared = write_rendering(
                item.rendering(), self.folder, number=number, name=item.name, sha256=item.sha256
            )
        given = given_mask_file(self.source, self.inventory, item.name, self.wanted.mask)
        mask, weights = self._mask(prepared, item, given)
        view = prepared.view
        window, *smaller_windows = (self._window(view, scale, weights) for scale in view.scales)
        caption = self.inventory.captions[item.name]
        update = {
            "name": item.name,
            "caption": caption.text,
            "caption_origin": caption.origin,
            "captioned_by": "",
            "lacks_captioner": False,
            "repeats": self.inventory.repeats.get(item.name, 1),
            "mask": mask,
            "window": window,
            "smaller_windows": tuple(smaller_windows),
            "remarks": self._remarks(view, mask),
        }
        return prepared.model_copy(update=update)

    def _mask(
        self, prepared: Prepared, item: _Item, given: bytes | None
    ) -> tuple[PreparedMask | None, Mask | None]:
        """The mask of a picture and its weights, written unless the same one is there already.

        Args:
            prepared: as it is, perhaps with the mask of an earlier call.
            given: the mask file that belongs to it, if it is wanted.
        """
        view = prepared.view
        origin = self.masking.origin(view, sha256_of(given) if given is not None else None)
        if origin is None:
            return None, None
        known = prepared.mask
        if known is not None and known.origin == origin and known.is_intact(self.folder):
            return known, np.load(self.folder / known.file) if known.file else None
        masked = self.masking.made(origin, view, given, item.rendering)
        described = PreparedMask(
            origin=origin,
            remarks=masked.remarks,
            without_other_faces=masked.without_other_faces,
        )
        if bool((masked.weights == 1).all()):
            return described, None
        written = write_mask(
            masked.weights, self.folder, number=prepared.number, described=described
        )
        return written, masked.weights

    def _window(self, view: View, scale: Scale, weights: Mask | None) -> tuple[int, int] | None:
        """(top, left) of the window over the face, else over what the mask keeps, else above."""
        if not self.wanted.data.face_aware_cropping:
            return None
        faces = view.faces_at(scale.size)
        if faces:
            window = face_window(scale.size, scale.target, faces[0].box)
        elif weights is not None:
            window = window_around(scale.size, scale.target, *centre_of_mass(weights))
        else:
            window = upper_window(scale.size, scale.target)
        return window.top, window.left

    def _remarks(self, view: View, mask: PreparedMask | None) -> tuple[Remark, ...]:
        """What is odd about a picture of the subject and the faces in it."""
        if self.wanted.of_class:
            return ()
        remarks = remarks_on_quality(view.measures, view.original_size, view.target)
        if not self.wanted.wants_faces:
            return remarks
        others_count = mask is None or not mask.without_other_faces
        on_faces = remarks_on_faces(
            view.faces_in_region(), view.region_size, others_count=others_count
        )
        return (*remarks, *on_faces)


def _raise(error: Exception) -> _Item:
    raise error


def _events(notes: Sequence[Note], of_class: bool) -> Iterator[NoteEvent]:
    for note in (told(note, of_class) for note in notes):
        yield NoteEvent(note.kind, note.field, note.message)
