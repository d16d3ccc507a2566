"""Pictures of a prompt library with one run's result, at several strengths.

What is left is `grid.png`, the pictures, and `pictures.json`, which says what each of them is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.events import Event, NoteEvent
from trainer.generation import Trained, column_text, strength_text
from trainer.inference import Stop, Worker
from trainer.job import RunFolder
from trainer.lineup import Column, Lineup, Look
from trainer.picture_folder import PictureFolder
from trainer.prompt_library import Library, LibraryPrompt, library, of_one_kind, shipped
from trainer.run_likeness import RunLikeness, likeness_captions
from trainer.run_subjects import (
    SAY_SUBJECT,
    SUBJECT,
    RunSubject,
    own_prompts,
    public_name,
    refuse_idle_subject,
    run_subject,
    subjects_of_run,
    unnamed,
)
from trainer.sections.subjects import put_down_to
from trainer.strength import FinishedRun, finished_run

INDEX = "pictures.json"


@dataclass(frozen=True)
class Sampling:
    """What is asked for.

    Args:
        run: folder of a finished run.
        strengths: of the run, each once; 0 is the base model.
        prompts: a library's file or name. None: the run's own prompts, and scenes that fit it.
        subject: what `{subject}` stands for. None: what the run's captions call its subject.
        look: how all pictures are made.
        likeness_model: folder or hub id of a CLIP. None: likeness is not measured.
        output: folder for the pictures. None: `pictures` in the run.
    """

    run: str
    strengths: Sequence[float]
    prompts: str | None = None
    subject: str | None = None
    look: Look = Look()
    likeness_model: str | None = None
    output: Path | None = None

    @property
    def folder(self) -> PictureFolder:
        """Where the pictures go."""
        return PictureFolder(self.output or RunFolder(Path(self.run)).pictures, INDEX)


def sample(asked: Sampling, worker: Worker, stop: Stop) -> Iterator[Event]:
    """Makes the pictures, and puts them in the place of an earlier sampling.

    Args:
        asked: what is wanted.
        worker: makes them, and loads the base model once.
        stop: asked before every picture; true ends it and leaves the earlier ones.

    Raises:
        InputError: the run, a prompt or a model cannot be used.
        TrainerError: as for `Worker.draw`.
        DiskError: the folder cannot be written.
    """
    with put_down_to({"trained": "RUN"}):
        run = finished_run(Trained(run=asked.run))
    prompts, subject, notes = _prompts(asked, run)
    yield from notes
    lineup = Lineup(prompts, _columns(asked, subject), asked.look)
    width, height = lineup.judged()
    paths = [cell.path for cell in lineup.cells()]
    asked.folder.refuse_strangers(paths)
    measure = None
    if asked.likeness_model is not None:
        measure = RunLikeness(asked.likeness_model, [run])
        yield from measure.learn(stop)
    with asked.folder.making() as folder:
        yield from lineup.pictures(worker, folder, stop)
        measured: Mapping[str, float] = {}
        if measure is not None:
            measured = yield from measure.of(folder, dict.fromkeys(paths, 0), stop)
        subtitle = " · ".join([public_name(run.config), *lineup.seeds(), f"{width}×{height}"])
        title = run.folder.root.resolve().name
        lineup.draw_grid(
            folder, title=title, subtitle=subtitle, captions=likeness_captions(measured)
        )
        asked.folder.publish(_index(asked, lineup, measured))


def _prompts(asked: Sampling, run: FinishedRun) -> tuple[Library, str | None, Sequence[NoteEvent]]:
    """The prompts, what `{subject}` in them stands for, and what to know of them."""
    subjects = subjects_of_run(run.folder, run.config)
    if asked.prompts is not None:
        prompts = library(asked.prompts)
        refuse_idle_subject(prompts, asked.subject)
        if not any(prompt.has_subject for prompt in prompts.values()):
            return prompts, None, []
        return prompts, run_subject(run, subjects, asked.subject), _of_many(asked, subjects)
    own = {name: LibraryPrompt(prompt=text) for name, text in own_prompts(subjects).items()}
    phrase = asked.subject or subjects[0].phrase
    if phrase is None:
        message = f"is missing, and {unnamed(run, subjects)}: {SAY_SUBJECT}, to see it in scenes"
        return own, None, [NoteEvent("warning", SUBJECT, message)]
    said = {prompt.prompt for prompt in own.values()}
    scenes = {
        name: scene
        for name, scene in shipped(of_one_kind(run.config)).items()
        if scene.about(phrase).prompt not in said
    }
    return own | scenes, phrase, _of_many(asked, subjects)


def _of_many(asked: Sampling, subjects: Sequence[RunSubject]) -> Sequence[NoteEvent]:
    """A note where prompts speak of the first of several subjects because nobody chose one."""
    if asked.subject is not None or len(subjects) == 1:
        return []
    message = f"is not given: `{{subject}}` is `{subjects[0].phrase}`, the first of {len(subjects)}"
    return [NoteEvent("warning", SUBJECT, message)]


def _columns(asked: Sampling, subject: str | None) -> list[Column]:
    return [
        Column(
            name=column_text(strength),
            short=strength_text(strength),
            trained=Trained(run=asked.run, strength=strength),
            base="",
            subject=subject,
        )
        for strength in asked.strengths
    ]


def _index(asked: Sampling, lineup: Lineup, measured: Mapping[str, float]) -> dict[str, Any]:
    """What `pictures.json` says."""
    cells = sorted(lineup.cells(), key=lambda cell: (cell.row, cell.column))
    return {
        "prompts": [lineup.told(name, lineup.columns[0].subject) for name in lineup.library],
        "strengths": [float(strength) for strength in asked.strengths],
        "likeness_model": asked.likeness_model,
        "pictures": [
            {
                "prompt": cell.row,
                "strength": float(asked.strengths[cell.column]),
                "path": cell.path,
                "likeness": measured.get(cell.path),
            }
            for cell in cells
        ],
    }
