"""A lineup: pictures of a prompt library, a row for each prompt, a column for each maker.

Knows how they are made, drawn as one grid and put into a folder, not what the columns compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.durable import write_bytes
from trainer.errors import DiskError, InputError, Interrupted
from trainer.events import Event, FileEvent, NoteEvent, StageEvent
from trainer.generation import GenerationRequest, Trained
from trainer.images.grid import GridRow, Tile, grid, tile_picture
from trainer.inference import Stop, Worker, encoded, size_of
from trainer.picture_folder import GRID
from trainer.prompt_library import Library
from trainer.sections.subjects import put_down_to

STAGE = "pictures"

_NAME_LETTERS = 40


@dataclass(frozen=True)
class Column:
    """One way to make pictures.

    Args:
        name: above its pictures.
        short: what their files' names end in.
        trained: a run and its strength.
        base: equal for columns with one base model.
        subject: what `{subject}` stands for. None: no prompt has it.
    """

    name: str
    short: str
    trained: Trained
    base: str
    subject: str | None


@dataclass(frozen=True)
class Look:
    """How all pictures are made, whatever their prompts say.

    Args:
        seed: of every prompt. None: each prompt's own, or 0.
        steps: of denoising, likewise. None: each prompt's own, or as the pipeline has it.
        width: in pixels. None: the base model's own.
        height: in pixels, likewise.
    """

    seed: int | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Cell:
    """One picture of a lineup.

    Args:
        row: of its prompt, from 0.
        column: from 0.
        path: of its file in the folder.
        request: what is asked of the worker.
    """

    row: int
    column: int
    path: str
    request: GenerationRequest


@dataclass(frozen=True)
class Lineup:
    """Prompts by columns."""

    library: Library
    columns: Sequence[Column]
    look: Look

    @property
    def prompts(self) -> Library:
        """The prompts with the seed and steps that they are made with."""
        changes = {"steps": self.look.steps} if self.look.steps is not None else {}
        return {
            name: prompt.model_copy(update={**changes, "seed": self._seed(prompt.seed)})
            for name, prompt in self.library.items()
        }

    def cells(self) -> list[Cell]:
        """Its pictures in the order that changes weights least: by base model, then by column."""
        bases = list(dict.fromkeys(column.base for column in self.columns))
        cells = [
            self._cell(row, name, number)
            for number in range(len(self.columns))
            for row, name in enumerate(self.library)
        ]
        return sorted(cells, key=lambda cell: bases.index(self.columns[cell.column].base))

    def seeds(self) -> list[str]:
        """The one seed of all prompts, in words; nothing where they have several."""
        seeds = {prompt.seed for prompt in self.prompts.values()}
        return [f"seed {seed}" for seed in seeds] if len(seeds) == 1 else []

    def told(self, name: str, subject: str | None) -> dict[str, Any]:
        """A prompt by its name, as JSON tells it.

        Args:
            subject: what `{subject}` in it stands for. None: for itself.
        """
        prompt = self.prompts[name] if subject is None else self.prompts[name].about(subject)
        return {"name": name, **prompt.model_dump()}

    def judged(self) -> tuple[int, int]:
        """The (width, height) of its pictures; everything is looked at that needs no model.

        Raises:
            InputError: a run, a prompt or a size cannot be used, or base models differ in size.
        """
        sizes: dict[str, tuple[int, int]] = {}
        for cell in self._different():
            with put_down_to(self._fields(cell.row)):
                sizes[self.columns[cell.column].base] = size_of(cell.request)
        if len(set(sizes.values())) > 1:
            shown = " and ".join(f"{width}x{height}" for width, height in set(sizes.values()))
            message = f"are not given, and the base models' own pictures have {shown} pixels"
            hint = "give --width and --height, so that all pictures have one size"
            raise InputError.of("--width and --height", message, hint)
        return next(iter(sizes.values()))

    def pictures(self, worker: Worker, folder: Path, stop: Stop) -> Iterator[Event]:
        """Makes all pictures.

        Args:
            worker: makes them, and loads each base model once.
            folder: where their files go.
            stop: asked before every picture.

        Raises:
            TrainerError: as for `Worker.draw`.
            DiskError: a picture cannot be written.
        """
        cells = self.cells()
        told: set[Event] = set()
        yield StageEvent(STAGE, 0, len(cells))
        for done, cell in enumerate(cells, start=1):
            end_if(stop)
            with put_down_to(self._fields(cell.row)):
                for event in worker.draw(cell.request, _kept(folder / cell.path), stop):
                    if isinstance(event, NoteEvent) and event not in told:
                        told.add(event)
                        yield event
            yield StageEvent(STAGE, done, len(cells))

    def draw_grid(
        self, folder: Path, *, title: str, subtitle: str, captions: Mapping[str, str]
    ) -> None:
        """Draws all pictures in a folder as its `grid.png`.

        Args:
            title: above it.
            subtitle: under the title.
            captions: path of a picture to what stands under it.
        """
        tiles = {
            (cell.row, cell.column): Tile(
                tile_picture(read_picture(folder / cell.path)), captions.get(cell.path, "")
            )
            for cell in self.cells()
        }
        columns = range(len(self.columns))
        rows = [
            GridRow(name, [tiles[row, column] for column in columns], self._text(name))
            for row, name in enumerate(self.library)
        ]
        names = [column.name for column in self.columns]
        page = grid(names, rows, title=title, subtitle=subtitle)
        write_bytes(folder / GRID, encoded(page, "png"))

    def _seed(self, own: int | None) -> int:
        return next((seed for seed in (self.look.seed, own) if seed is not None), 0)

    def _cell(self, row: int, name: str, number: int) -> Cell:
        prompt, column = self.prompts[name], self.columns[number]
        if prompt.has_subject:
            assert column.subject is not None
            prompt = prompt.about(column.subject)
        request = GenerationRequest(
            trained=(column.trained,),
            prompt=prompt.prompt,
            negative_prompt=prompt.negative_prompt,
            guidance_scale=prompt.guidance_scale,
            num_inference_steps=prompt.steps,
            seed=self._seed(prompt.seed),
            width=self.look.width,
            height=self.look.height,
        )
        return Cell(row, number, f"{row:02d}-{in_a_file_name(name)}-{column.short}.png", request)

    def _different(self) -> list[Cell]:
        """A picture for each kind of request: one base model, run and set of options."""
        kinds: dict[tuple[object, ...], Cell] = {}
        for cell in self.cells():
            column, asked = self.columns[cell.column], cell.request
            options = (asked.negative_prompt is None, asked.guidance_scale is None)
            kinds.setdefault((column.trained.run, column.base, *options), cell)
        return list(kinds.values())

    def _fields(self, row: int) -> Mapping[str, str]:
        """What the user calls the parts of a request."""
        name = list(self.library)[row]
        own = {
            "negative_prompt": "negative_prompt",
            "guidance_scale": "guidance_scale",
            "num_inference_steps": "steps",
        }
        sides = {side: f"--{side}" for side in ("width", "height")}
        return {field: f"{name}.{label}" for field, label in own.items()} | sides

    def _text(self, name: str) -> str:
        """A prompt as the grid tells it: of the one subject that was trained, if it is one."""
        prompt = self.library[name]
        trained = {column.subject for column in self.columns if column.trained.strength}
        subjects = trained or {column.subject for column in self.columns}
        if prompt.has_subject and len(subjects) == 1:
            return prompt.about(str(*subjects)).prompt
        return prompt.prompt


def end_if(stop: Stop) -> None:
    """Ends the making of pictures where that is wished.

    Raises:
        Interrupted: it is.
    """
    if stop():
        raise Interrupted("stopped between two pictures", "run the same command again")


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        DiskError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise DiskError(f"`{path}` could not be read: {error}", "make the picture anew") from error


def in_a_file_name(name: str) -> str:
    """A name as a part of the name of a file."""
    return re.sub(r"[^\w.]+", "-", name)[:_NAME_LETTERS].strip("-.") or "prompt"


def _kept(path: Path) -> Callable[[int, Image.Image], FileEvent]:
    def keep(_: int, picture: Image.Image) -> FileEvent:
        write_bytes(path, encoded(picture, "png"))
        return FileEvent("picture", path.name)

    return keep
