"""Pictures of a prompt library with several runs' results, beside those of their base models.

What is left is `grid.png`, the pictures, and `comparison.json`, which says what each of them is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import InputError
from trainer.events import Event, NoteEvent
from trainer.generation import Trained, strength_text
from trainer.inference import Stop, Worker
from trainer.lineup import Column, Lineup, Look, in_a_file_name
from trainer.picture_folder import PictureFolder
from trainer.prompt_library import Library, library, of_one_kind, shipped
from trainer.run_likeness import RunLikeness, likeness_captions
from trainer.run_subjects import (
    public_name,
    refuse_idle_subject,
    run_subject,
    subjects_of_run,
)
from trainer.sections.subjects import put_down_to
from trainer.strength import FinishedRun, finished_run

INDEX = "comparison.json"

# What `{subject}` stands for with a run and with its base model; nothing where no prompt has it.
_Subject = tuple[str | None, str | None]
# What makes base models two: how their numbers are kept does not.
_PLACES = (
    *("model_url", "revision", "variant", "single_file_config", "vae_url"),
    "max_sequence_length",
)


@dataclass(frozen=True)
class Comparison:
    """What is asked for.

    Args:
        runs: folders of finished runs, each once.
        strength: of every run.
        prompts: a library's file or name. None: the scenes that fit the runs.
        subject: what `{subject}` stands for. None: what each run's captions call its subject.
        look: how all pictures are made.
        likeness_model: folder or hub id of a CLIP. None: likeness is not measured.
        output: folder for the pictures.
    """

    runs: Sequence[str]
    strength: float
    output: Path
    prompts: str | None = None
    subject: str | None = None
    look: Look = Look()
    likeness_model: str | None = None

    @property
    def folder(self) -> PictureFolder:
        """Where the pictures go."""
        return PictureFolder(self.output, INDEX)


def compare(asked: Comparison, worker: Worker, stop: Stop) -> Iterator[Event]:
    """Makes the pictures, and puts them in the place of an earlier comparison.

    Args:
        asked: what is wanted.
        worker: makes them, and loads each base model once.
        stop: asked before every picture; true ends it and leaves the earlier ones.

    Raises:
        InputError: a run or a prompt cannot be used.
        TrainerError: as for `Worker.draw`.
        DiskError: the folder cannot be written.
    """
    with put_down_to({"trained": "RUNS"}):
        runs = [finished_run(Trained(run=run, strength=asked.strength)) for run in asked.runs]
    _refuse_twice(runs)
    prompts = _prompts(asked, runs)
    has_subject = any(prompt.has_subject for prompt in prompts.values())
    subjects = [_subjects(asked, run) if has_subject else (None, None) for run in runs]
    lineup = Lineup(prompts, _columns(asked, runs, subjects), asked.look)
    yield from _notes(_base_names(runs))
    size = lineup.judged()
    asked.folder.refuse_strangers(cell.path for cell in lineup.cells())
    measure = None
    if asked.likeness_model is not None:
        measure = RunLikeness(asked.likeness_model, runs)
        yield from measure.learn(stop)
    with asked.folder.making() as folder:
        yield from lineup.pictures(worker, folder, stop)
        measured: Mapping[str, float] = {}
        if measure is not None:
            measured = yield from measure.of(folder, _measured_against(asked, lineup), stop)
        strength = f"strength {strength_text(asked.strength)}"
        facts = [*_one_base(runs), strength, *lineup.seeds(), "{}×{}".format(*size)]
        title = f"{len(runs)} runs side by side" if len(runs) > 1 else _names(asked)[0]
        captions = likeness_captions(measured)
        lineup.draw_grid(folder, title=title, subtitle=" · ".join(facts), captions=captions)
        asked.folder.publish(_index(asked, lineup, runs, size, measured))


def _refuse_twice(runs: Sequence[FinishedRun]) -> None:
    places = Counter(run.folder.root.resolve() for run in runs)
    twice = [run.folder.root for run in runs if places[run.folder.root.resolve()] > 1]
    if twice:
        raise InputError.of("RUNS", f"`{twice[0]}` is given twice", "give each run once")


def _prompts(asked: Comparison, runs: Sequence[FinishedRun]) -> Library:
    """The prompts as they stand, with `{subject}` for each run to fill in."""
    if asked.prompts is None:
        kinds = {of_one_kind(run.config) for run in runs}
        return shipped(kinds.pop() if len(kinds) == 1 else "default")
    prompts = library(asked.prompts)
    refuse_idle_subject(prompts, asked.subject)
    return prompts


def _columns(
    asked: Comparison, runs: Sequence[FinishedRun], subjects: Sequence[_Subject]
) -> list[Column]:
    """A column for each base model, then one for each run.

    Args:
        subjects: what `{subject}` stands for with each run.
    """
    bases = [_base_of(run.config) for run in runs]
    names = _base_names(runs)
    columns = [
        Column(
            name=name,
            short="base" if len(names) == 1 else f"base-{number}",
            trained=Trained(run=asked.runs[bases.index(base)], strength=0),
            base=base,
            subject=subjects[bases.index(base)][1],
        )
        for number, (base, name) in enumerate(names.items(), start=1)
    ]
    for number, (run, name) in enumerate(zip(asked.runs, _names(asked), strict=True), start=1):
        columns.append(
            Column(
                name=name,
                short=f"{number}-{in_a_file_name(name)}",
                trained=Trained(run=run, strength=asked.strength),
                base=bases[number - 1],
                subject=subjects[number - 1][0],
            )
        )
    return columns


def _subjects(asked: Comparison, run: FinishedRun) -> _Subject:
    """What `{subject}` stands for with a run, and with its base model, which knows its class."""
    subjects = subjects_of_run(run.folder, run.config)
    own = run_subject(run, subjects, asked.subject)
    return own, subjects[0].of_class or own


def _base_of(config: TrainingConfig) -> str:
    """Equal for runs on one base model."""
    return repr([getattr(config.model, name) for name in _PLACES])


def _base_names(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Each base model with the name of its column."""
    bases = {_base_of(run.config): public_name(run.config) for run in runs}
    if len(bases) == 1:
        return dict.fromkeys(bases, "base")
    counts = Counter(bases.values())
    return {
        base: f"base {name}" if counts[name] == 1 else f"base {name} ({number})"
        for number, (base, name) in enumerate(bases.items(), start=1)
    }


def _one_base(runs: Sequence[FinishedRun]) -> list[str]:
    """What the base model of all runs is called; nothing where they have several."""
    bases = {_base_of(run.config): public_name(run.config) for run in runs}
    return list(bases.values()) if len(bases) == 1 else []


def _names(asked: Comparison) -> list[str]:
    """What runs are called: their folders' names, or where two have one, the paths as given."""
    names = [Path(run).resolve().name for run in asked.runs]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else str(Path(run))
        for name, run in zip(names, asked.runs, strict=True)
    ]


def _notes(bases: Mapping[str, str]) -> Iterator[NoteEvent]:
    """What is not as one might think: several base models, hence several columns of them."""
    if len(bases) > 1:
        names = ", ".join(bases.values())
        message = f"were trained on several base models, each with a column: {names}"
        yield NoteEvent("warning", "RUNS", message)


def _measured_against(asked: Comparison, lineup: Lineup) -> dict[str, int]:
    """The run that each picture is measured against: its own, or the one of its subject."""
    numbers = [asked.runs.index(column.trained.run or "") for column in lineup.columns]
    return {cell.path: numbers[cell.column] for cell in lineup.cells()}


def _index(
    asked: Comparison,
    lineup: Lineup,
    runs: Sequence[FinishedRun],
    size: tuple[int, int],
    measured: Mapping[str, float],
) -> dict[str, Any]:
    """What `comparison.json` says."""
    models = {_base_of(run.config): run.config.model.model_url for run in runs}
    return {
        "prompts": [lineup.told(name, None) for name in lineup.library],
        "width": size[0],
        "height": size[1],
        "likeness_model": asked.likeness_model,
        "columns": [
            {
                "name": column.name,
                "run": column.trained.run if place >= len(models) else None,
                "strength": column.trained.strength,
                "base_model": models[column.base],
                "subject": column.subject,
            }
            for place, column in enumerate(lineup.columns)
        ],
        "pictures": [
            {
                "prompt": cell.row,
                "column": cell.column,
                "text": cell.request.prompt,
                "path": cell.path,
                "likeness": measured.get(cell.path),
            }
            for cell in sorted(lineup.cells(), key=lambda cell: (cell.row, cell.column))
        ],
    }
