"""What the result makes of scenes at several strengths, as `trainer sample` left it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from statistics import fmean
from typing import Any

from trainer.config_files import public_place
from trainer.report.markup import command, link, paragraph, section, table
from trainer.report.record import Record, read_json
from trainer.report.thumbnails import picture, thumbnails

MOST_ROWS = 40
_TITLE = "Scenes at several strengths"
_ABSENT = '<span class="none">none</span>'
# What tells the numbers of a scene apart, as people call it.
_DETAILS = {
    "negative_prompt": "without: {}",
    "guidance_scale": "guidance {:g}",
    "steps": "{} steps",
    "seed": "seed {}",
}

_Made = Mapping[str, Any]


def likeness(record: Record) -> str:
    """Scenes by strengths, or the command that makes them; nothing of a run without a result."""
    told = read_json(record.folder.pictures / "pictures.json")
    if told.get("pictures"):
        return section("likeness", _TITLE, paragraph(_words(told)) + _table(record, told))
    if record.result is None or record.result.status != "done":
        return ""
    hint = (
        "What was learnt, in scenes that the photographs do not show, from the base model alone to "
        "full strength; with `--likeness MODEL`, a CLIP, also how like the photographs it is:"
    )
    root = shlex.quote(str(record.folder.root))
    asked = f"trainer sample {root}\ntrainer report {root}"
    return section("likeness", _TITLE, paragraph(hint) + command(asked))


def _words(told: _Made) -> str:
    text = (
        "At strength 0 the base model paints alone, at 1 with all that was learnt; in each row "
        "from the same noise."
    )
    model = told.get("likeness_model")
    if model:
        name = public_place(model)
        text += f" The numbers are likeness to the photographs as `{name}` sees it, at most 1."
    if len(told["prompts"]) > MOST_ROWS:
        text += f" Shown are {MOST_ROWS} of {len(told['prompts'])} scenes."
    return text


def _table(record: Record, told: _Made) -> str:
    scenes, strengths = told["prompts"][:MOST_ROWS], told["strengths"]
    made = {
        (each["prompt"], each["strength"]): each
        for each in told["pictures"]
        if each["prompt"] < MOST_ROWS
    }
    shown = _pictures(record, made, scenes)
    rows = [
        (
            _scene(scene),
            *(shown.get((number, strength), _ABSENT) for strength in strengths),
            _mean(each for (row, _), each in made.items() if row == number),
        )
        for number, scene in enumerate(scenes)
    ]
    by_strength = [
        _mean(each for (_, column), each in made.items() if column == strength)
        for strength in strengths
    ]
    heads = [
        "scene",
        *(f"strength {strength:g}" for strength in strengths),
        '<span class="slim">mean</span>',
    ]
    if any(by_strength):
        rows.append(("mean", *by_strength, _mean(made.values())))
    else:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return table(heads, rows, of="scenes by strength", kind="pictures")


def _pictures(
    record: Record, made: Mapping[tuple[int, float], _Made], scenes: list[_Made]
) -> dict[tuple[int, float], str]:
    """The cells of those pictures that are there."""
    folder = record.folder.pictures.name
    places = {key: f"{folder}/{each['path']}" for key, each in made.items()}
    paths = {key: path for key, place in places.items() if (path := record.inside(place))}
    small = thumbnails(paths.values())
    cells = {}
    for (number, strength), path in paths.items():
        if path in small:
            alt = f"{scenes[number]['prompt']}, strength {strength:g}"
            shown = link(places[number, strength], picture(small[path], alt))
            cells[number, strength] = shown + _figure(made[number, strength]["likeness"])
    return cells


def _scene(scene: _Made) -> str:
    details = ", ".join(
        form.format(scene[name]) for name, form in _DETAILS.items() if scene.get(name) is not None
    )
    name, prompt = escape(str(scene.get("name") or "")), escape(scene["prompt"])
    title = f"<b>{name}</b> " if name and name != prompt else ""
    return (
        f'<span class="prompt" title="{prompt}">{title}{prompt}</span>'
        f'<span class="soft">{escape(details)}</span>'
    )


def _mean(made: Iterable[_Made]) -> str:
    """The mean likeness of pictures, of those where it was measured."""
    known = list(_known(made))
    return _figure(fmean(known)) if known else ""


def _known(made: Iterable[_Made]) -> Iterator[float]:
    yield from (each["likeness"] for each in made if each["likeness"] is not None)


def _figure(value: float | None) -> str:
    return "" if value is None else f'<span class="figure">{value:.2f}</span>'
