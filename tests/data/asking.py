"""Bad inputs as rows of a table, the doors that they are brought to, and what users are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grid
from grid import encoded, write_folder, zip_bytes
from PIL import Image
from pytest import MonkeyPatch
from skimage import data as photographs

from trainer.data.overview import REPORT
from trainer.data.picture_set import PictureSet
from trainer.data.report import inspect
from trainer.errors import InputError, TrainerError
from trainer.events import Event, NoteEvent

# Where nothing is left because all is refused.
REFUSED = -1
_NOT_OWN = ("instance_prompt", "generated")
_COUNTED = re.compile(r"warning: only [5-9] pictures; at least 10, better 20 to 30")

Content = bytes | str | Callable[[], bytes]


@dataclass(frozen=True)
class Place:
    """Where a case takes place.

    Args:
        folder: empty.
        machine: what is changed of this machine, for the case alone.
        base_model: folder of a tiny SD1.5.
    """

    folder: Path
    machine: MonkeyPatch
    base_model: Path


@dataclass(frozen=True)
class Answer:
    """What a bad input leads to.

    Args:
        left: pictures that are trained, or `REFUSED`.
        captions: pictures with a caption of the user's own.
        said: what the user is told, line by line.
    """

    left: int
    said: tuple[str, ...] = ()
    captions: int = 0


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        number: of the row.
        what: the bad input, and why it is treated so where that is not plain.
        make: brings it about.
        left: see `Answer`.
        says: everything that the user is told, in its order; `…` stands for any text, such as
            what a library calls the damage.
        captions: see `Answer`.
        door: where it is brought to.
    """

    number: int
    what: str
    make: Callable[[Place], Any]
    left: int
    says: tuple[str, ...] = ()
    captions: int = 0
    door: Callable[[Any, Place], Answer] = field(default_factory=lambda: prepared)

    def is_said_by(self, answer: Answer) -> bool:
        """Whether an answer says what this row does, line by line."""
        patterns = [".*".join(map(re.escape, line.split("…"))) for line in self.says]
        return len(patterns) == len(answer.said) and all(
            re.fullmatch(pattern, line) for pattern, line in zip(patterns, answer.said, strict=True)
        )


# What is asked for


@cache
def photograph(left: int, top: int, width: int, height: int) -> Image.Image:
    """A part of a photograph of a woman, whose face is at (177, 66, 96, 110)."""
    return Image.fromarray(photographs.astronaut()).crop((left, top, left + width, top + height))


@cache
def good_pictures() -> Mapping[str, bytes]:
    """Five pictures of which there is nothing to say."""
    places = ((0, 0), (150, 50), (310, 0), (350, 250), (100, 300))
    return {
        f"g{number}.jpg": encoded(photograph(*place, 130, 130), "JPEG", quality=92)
        for number, place in enumerate(places)
    }


def another_picture(number: int) -> bytes:
    """One that is none of the good pictures and nearly none of them."""
    place = ((20, 120), (200, 300), (330, 130))[number]
    return encoded(photograph(*place, 130, 130), "JPEG", quality=92)


def folder_of(**options: Any) -> Callable[[Place], PictureSet]:
    """Good pictures in a folder, trained with these options, see `grid.picture_set`."""
    return beside({}, **options)


def beside(files: Mapping[str, Content], **options: Any) -> Callable[[Place], PictureSet]:
    """Good pictures in a folder with these files beside them."""

    def make(place: Place) -> PictureSet:
        folder = write_folder(place.folder / "set", {**good_pictures(), **_made(files)})
        return grid.picture_set(folder, **options)

    return make


def alone(files: Mapping[str, Content], **options: Any) -> Callable[[Place], PictureSet]:
    """Nothing but these files in a folder."""
    return lambda place: grid.picture_set(
        write_folder(place.folder / "set", _made(files)), **options
    )


def zipped(files: Mapping[str, Content], **options: Any) -> Callable[[Place], PictureSet]:
    """Good pictures and these files in a zip."""
    return file("set.zip", lambda: zip_bytes({**good_pictures(), **_made(files)}), **options)


def file(name: str, content: Content, **options: Any) -> Callable[[Place], PictureSet]:
    """One file, which should be an archive."""

    def make(place: Place) -> PictureSet:
        write_folder(place.folder, _made({name: content}))
        return grid.picture_set(place.folder / name, **options)

    return make


def each(*makers: Callable[[Place], PictureSet]) -> Callable[[Place], list[PictureSet]]:
    """Several that are treated alike."""
    return lambda place: [
        make(Place(place.folder / str(number), place.machine, place.base_model))
        for number, make in enumerate(makers)
    ]


def _made(files: Mapping[str, Content]) -> dict[str, bytes]:
    made = {name: content() if callable(content) else content for name, content in files.items()}
    return {n: text.encode() if isinstance(text, str) else text for n, text in made.items()}


# Doors


def prepared(wanted: PictureSet | list[PictureSet], place: Place) -> Answer:
    """What preparing pictures leads to; what `validate` says of them must agree."""
    sets = wanted if isinstance(wanted, list) else [wanted]
    answers = [_prepared(one, place, number) for number, one in enumerate(sets)]
    assert len({(answer.left, answer.captions) for answer in answers}) == 1
    said = tuple(line for answer in answers for line in answer.said)
    return Answer(answers[0].left, said, answers[0].captions)


def _prepared(wanted: PictureSet, place: Place, number: int) -> Answer:
    folder = place.folder / f"prepared-{number}"
    with refusals(place) as refused:
        events, examples = grid.prepared(wanted, folder)
    if refused:
        assert _validated(wanted, place) == refused
        return Answer(REFUSED, tuple(refused))
    told = said_in(events, place)
    assert set(_validated(wanted, place)) <= set(told)
    said = [line for line in (*told, *_infos(folder)) if not _COUNTED.fullmatch(line)]
    captions = sum(example.caption_origin not in _NOT_OWN for example in examples)
    return Answer(len(examples), tuple(said), captions)


def _validated(wanted: PictureSet, place: Place) -> list[str]:
    """What `validate` says of the set as a whole, and of the pictures that are left out."""
    with refusals(place) as refused:
        report = inspect(wanted)
        notes = [
            NoteEvent(note.kind, note.field, note.message)
            for note in report.notes
            # Only who looks for no faces has to say so.
            if note.field != "face_crop_region"
        ]
        left_out = [picture for picture in report.pictures if picture.size is None]
        notes += [
            NoteEvent("warning", "images_data_url", f"`{p.name}` is left out: {p.problem}")
            for p in left_out
        ]
        return said_in(notes, place)
    return refused


@contextmanager
def refusals(place: Place) -> Iterator[list[str]]:
    """Collects what an error tells the user; stays empty where there is none."""
    lines: list[str] = []
    try:
        yield lines
    except InputError as error:
        for problem in error.problems:
            lines += [_line("error", problem.field, problem.message), f"hint: {problem.hint}"]
    except TrainerError as error:
        lines += [f"error: {error.message}", f"hint: {error.hint}"]
    lines[:] = _shortened(lines, place)


def said_in(events: Sequence[Event], place: Place) -> list[str]:
    """The notes among events as lines."""
    notes = [event for event in events if isinstance(event, NoteEvent)]
    return _shortened([_line(note.note, note.field, note.message) for note in notes], place)


def _line(kind: str, field: str, message: str) -> str:
    return f"{kind}: {message}" if field == "images_data_url" else f"{kind} of {field}: {message}"


def _shortened(lines: list[str], place: Place) -> list[str]:
    return [line.replace(f"{place.folder}/", "") for line in lines]


def _infos(folder: Path) -> list[str]:
    """What the report alone says: remarks that are no warnings, and near copies."""
    report = json.loads((folder / REPORT).read_text())
    near = [line for line in report["advice"]["lines"] if line["topic"] == "near copies"]
    return [
        f"info: `{picture['name']}` {remark['text']}"
        for picture in report["pictures"]
        for remark in picture["remarks"]
        if remark["kind"] == "info"
    ] + [f"info: {line['found']}; {line['advice']}" for line in near if line["level"] != "ok"]
