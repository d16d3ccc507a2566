"""The head of the page: how the run ended, what was trained, and what to know of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape

from trainer.job import Result
from trainer.listeners import deserves_a_line, duration
from trainer.names import ADAPTER_KINDS
from trainer.report.markup import bullets, command, counted, facts, paragraph, words
from trainer.report.record import Record

_NOTES: Mapping[str, str] = {
    "warning": "warning",
    "yielded": "gave way",
    "ignored": "without effect",
}


def summary(record: Record) -> str:
    """The name of the run, its end in words, facts and notes."""
    return (
        f"<header><h1>{escape(record.name)}</h1>{_status(record)}{facts(_facts(record))}</header>"
        f"{_notes(record)}"
    )


def _status(record: Record) -> str:
    """How the run ended, and what to do then."""
    result = record.result
    steps = f"{record.step:,} of {counted(record.total_steps, 'step')}"
    if result is None:
        text = f"has no result yet, after {steps}: it is still running, or it was cut off"
        return _badge("running", "Unfinished", text) + _way_on(record)
    if result.status == "done":
        return _badge("done", "Done", f"after {counted(record.step, 'step')}")
    if result.status == "interrupted":
        text = f"after {steps}; what was learnt up to the last checkpoint is kept"
        return _badge("interrupted", "Interrupted", text) + _way_on(record)
    return _badge("failed", "Failed", f"after {steps}") + _error(result)


def _badge(kind: str, word: str, text: str) -> str:
    return f'<p class="status {kind}"><strong>{word}</strong> {words(text)}</p>'


def _way_on(record: Record) -> str:
    root = record.folder.root
    words_on = ["trainer", "train", str(record.folder.config), "--output", str(root)]
    return paragraph("The same command goes on, and so does this one:") + command(
        shlex.join(words_on)
    )


def _error(result: Result) -> str:
    problems = [
        f"<code>{escape(each.field)}</code>: {words(each.message)}{_hint(each.hint)}"
        for each in result.problems
    ]
    told = bullets(problems) if problems else paragraph(result.error or "")
    hint = "" if problems or not result.hint else paragraph(f"What to do: {result.hint}")
    return f'<div class="error" role="note">{told}{hint}</div>'


def _hint(hint: str) -> str:
    return f"<br>What to do: {words(hint)}" if hint else ""


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    details = record.begun.get("details", {})
    num_pictures = record.begun.get("num_pictures", 0)
    yield "Base model", escape(str(record.option("model_url") or ""))
    yield "Method", escape(_method(record))
    pictures = counted(num_pictures, "picture") if num_pictures else ""
    size = f" at {details['resolution']}" if pictures and details.get("resolution") else ""
    yield "Learnt from", escape(pictures + size)
    yield "Prompt", escape(str(record.option("instance_prompt") or ""))
    yield "Steps", f"{record.step:,} of {record.total_steps:,}" if record.total_steps else ""
    yield "Time", escape(_time(record))
    yield "Ended", _moment(record)
    yield "Device", escape(_device(details))
    parameters = details.get("trained_parameters")
    yield "Trained parameters", f"{parameters:,}" if parameters else ""


def _method(record: Record) -> str:
    """What learnt, in words."""
    if not record.sections:
        return ""
    learning = ["the denoiser"]
    if record.option("train_text_encoder"):
        learning.append("text encoders")
    if record.option("train_text_encoder_ti"):
        learning.append(f"new tokens for {', '.join(record.option('token_abstraction') or ())}")
    if not record.option("use_lora"):
        return f"all weights of {' and '.join(learning)}"
    form = str(record.option("lora_type"))
    kind = "DoRA" if record.option("use_dora") else ADAPTER_KINDS.get(form, form)
    return f"{kind} of rank {record.option('rank')}, on {' and '.join(learning)}"


def _time(record: Record) -> str:
    seconds = [event["seconds"] for event in record.told("step")]
    if not seconds:
        return ""
    usual = sorted(seconds)[len(seconds) // 2]
    return f"{duration(sum(seconds))} of steps, {usual:.2g} s each"


def _moment(record: Record) -> str:
    """When the last thing was said, in UTC."""
    times = [
        event["time"] for events in record.events.values() for event in events if "time" in event
    ]
    if not times or record.result is None:
        return ""
    moment = datetime.fromtimestamp(max(times), UTC)
    return f'<time datetime="{moment:%Y-%m-%dT%H:%M:%SZ}">{moment:%-d %B %Y, %H:%M} UTC</time>'


def _device(details: Mapping[str, object]) -> str:
    processes = details.get("processes", 1)
    told = [str(details[name]) for name in ("device", "precision") if name in details]
    if isinstance(processes, int) and processes > 1:
        told.append(f"{processes} processes")
    return ", ".join(told)


def _notes(record: Record) -> str:
    """What the run said that people should know, each once, warnings first."""
    told = {
        (event["note"], event["field"], event["message"]): None
        for event in record.told("note")
        if deserves_a_line(event["note"], event["field"], record.explicit)
    }
    order = list(_NOTES)
    lines = [
        f'<span class="note {escape(note)}">{_NOTES.get(note, escape(note))}</span> '
        f"<code>{escape(field)}</code>: {words(message)}"
        for note, field, message in sorted(
            told, key=lambda each: order.index(each[0]) if each[0] in order else len(order)
        )
    ]
    if not lines:
        return ""
    return f'<aside aria-label="Notes on this run">{bullets(lines, "notes")}</aside>'
