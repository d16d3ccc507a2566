"""The pictures that were made on the way: a row for each prompt, a column for some of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from trainer.report.axes import even
from trainer.report.markup import command, counted, link, paragraph, section, table
from trainer.report.record import Event, Record
from trainer.report.thumbnails import picture, thumbnails

MOST_COLUMNS = 8
MOST_ROWS = 40
_TITLE = "Pictures over time"

# The picture of a prompt at a step.
_Samples = Mapping[tuple[int, int], Event]


def previews(record: Record) -> str:
    """The pictures of the validation prompts, or how to get them."""
    samples = {(event["number"], event["step"]): event for event in record.told("sample")}
    if not samples:
        words = (
            "No pictures were made on the way. A training that is given prompts shows what it has "
            "learnt as it goes; the base model's own picture comes first:"
        )
        asked = 'trainer train … --sample-steps 100 --validation-prompts "TOK at the sea"'
        return section("pictures", _TITLE, paragraph(words) + command(asked))
    steps = sorted({step for _, step in samples})
    numbers = sorted({number for number, _ in samples})
    return section("pictures", _TITLE, _words(steps, numbers) + _table(record, samples))


def _words(steps: Sequence[int], numbers: Sequence[int]) -> str:
    told = "In each row all pictures start from the same noise: what differs is what was learnt."
    if len(steps) > MOST_COLUMNS:
        told += f" Shown are {MOST_COLUMNS} of {len(steps)} steps; the others are in `samples`."
    if len(numbers) > MOST_ROWS:
        told += f" Shown are {MOST_ROWS} of {len(numbers)} prompts; the others are in `samples`."
    return paragraph(told)


def _table(record: Record, samples: _Samples) -> str:
    steps = even(sorted({step for _, step in samples}), MOST_COLUMNS)
    numbers = sorted({number for number, _ in samples})[:MOST_ROWS]
    shown = {
        key: samples[key]
        for number in numbers
        for step in steps
        if (key := (number, step)) in samples
    }
    paths = {key: record.inside(event["path"]) for key, event in shown.items()}
    small = thumbnails(path for path in paths.values() if path is not None)

    def cell(number: int, step: int) -> str:
        event, path = shown.get((number, step)), paths.get((number, step))
        if event is None or path is None or path not in small:
            return '<span class="none">none</span>'
        return link(
            event["path"], picture(small[path], f"{event['prompt']}, {_head(record, step)}")
        )

    rows = []
    for number in numbers:
        prompt = next(event["prompt"] for (each, _), event in samples.items() if each == number)
        rows.append((_prompt(prompt), *(cell(number, step) for step in steps)))
    heads = ["prompt", *(_head(record, step) for step in steps)]
    of = f"{counted(len(numbers), 'prompt')} at {counted(len(steps), 'step')}"
    return table(heads, rows, of=of, kind="pictures")


def _prompt(prompt: str) -> str:
    return f'<span class="prompt" title="{escape(prompt)}">{escape(prompt)}</span>'


def _head(record: Record, step: int) -> str:
    if step == 0:
        return "base model"
    is_last = record.result is not None and record.result.status == "done"
    return f"trained, step {step:,}" if is_last and step == record.total_steps else f"step {step:,}"
