"""Every option of the run with its meaning: what was set on purpose first, then the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from trainer.config import LEAVES
from trainer.leaves import leaf_schema
from trainer.report.markup import bullets, command, counted, folded, paragraph, section, words
from trainer.report.record import Record

_SECTION_TITLES: Mapping[str, str] = {
    "model": "Base model",
    "data": "Pictures",
    "caption": "Captions",
    "face": "Faces",
    "mask": "Masks",
    "token": "New tokens",
    "adapter": "What learns",
    "prior": "Prior preservation",
    "loss": "Loss",
    "optim": "Optimizer",
    "run": "The run",
    "sample": "Pictures on the way",
    "output": "Results",
}


def settings(record: Record) -> str:
    """The options by who decided them and by section; nothing where no configuration is left."""
    if not record.sections:
        return ""
    yielded = {
        event["field"]: event["message"]
        for event in record.told("note")
        if event["note"] == "yielded"
    }
    options = [
        _Option(record, name, section_name, value, yielded)
        for section_name, values in record.sections.items()
        for name, value in values.items()
    ]
    chosen = "".join(option.shown() for option in options if option.is_explicit)
    parts = [
        paragraph("Nothing was set on purpose.")
        if not chosen
        else f"<h3>Set on purpose</h3><dl class='options'>{chosen}</dl>",
        "<h3>Decided by preset, service, base model and defaults</h3>",
        *_others(record, options),
        _ignored(record),
        paragraph("The configuration is `config.yaml` in the run folder; it can be trained again:"),
        command("trainer train config.yaml --output runs/again"),
    ]
    return section("settings", "Settings", "".join(parts))


class _Option:
    """One option of the run."""

    def __init__(
        self, record: Record, name: str, section: str, value: Any, yielded: Mapping[str, str]
    ) -> None:
        self.section = section
        self.is_explicit = name in record.explicit
        self.is_ignored = name in record.ignored
        self._name, self._value = name, value
        self._reason = record.ignored.get(name) or yielded.get(name, "")

    def shown(self) -> str:
        """The option, its value, who decided it, and what it means."""
        leaf = LEAVES.get(self._name)
        meaning = str(leaf.info.description) if leaf is not None else ""
        how = self._decided_by()
        reason = f'<span class="reason">{words(self._reason)}</span>' if self._reason else ""
        return (
            f"<div><dt><code>{escape(self._name)}</code></dt>"
            f'<dd><span class="value">{_in_words(self._value)}</span>'
            f'<span class="how">{how}</span>{reason}<p>{words(meaning)}</p></dd></div>'
        )

    def _decided_by(self) -> str:
        if self.is_ignored:
            return "without effect"
        if self.is_explicit:
            return ""
        is_default = self._name in LEAVES and leaf_schema(self._name)["default"] == self._value
        return "default" if is_default else "decided for this run"


def _others(record: Record, options: list[_Option]) -> Iterator[str]:
    for name in record.sections:
        rest = [
            option
            for option in options
            if option.section == name and not option.is_explicit and not option.is_ignored
        ]
        if rest:
            title = f"{escape(_SECTION_TITLES.get(name, name))} <small>{len(rest)}</small>"
            shown = "".join(option.shown() for option in rest)
            yield folded(title, f'<dl class="options">{shown}</dl>')


def _ignored(record: Record) -> str:
    """Options without an effect here, with the reason."""
    lines = [
        f"<code>{escape(name)}</code>: {words(reason)}" for name, reason in record.ignored.items()
    ]
    if not lines:
        return ""
    summary = f"{counted(len(lines), 'option')} without effect in this run, and why"
    return folded(summary, bullets(lines, "reasons"))


def _in_words(value: Any) -> str:
    """A value as a configuration has it."""
    if value is None:
        return "none"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return escape(", ".join(value)) or "none"
    if isinstance(value, str):
        return escape(value) or "empty"
    if isinstance(value, list):
        return "<br>".join(_in_words(each) for each in value)
    if isinstance(value, dict):
        given = {name: each for name, each in value.items() if each is not None}
        return escape(json.dumps(given, ensure_ascii=False))
    return escape(json.dumps(value))
