"""A run as its folder tells it: what was asked, what was said on the way, and how it ended.

A run that failed early has left little; what is not there is empty here. Keys, contents and the
places of this machine are left behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config_files import read_mapping, without_contents
from trainer.job import Result, ResultFile, RunFolder

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What is known of a run.

    Args:
        folder: the run folder.
        result: how it ended; nothing while it runs, or where it was cut off.
        sections: the options by section and name.
        explicit: options that were set on purpose.
        ignored: options without an effect, with the reason.
        events: what was said, by kind.
        checks: what readers found in the result files, as `verify.json` has it.
        card: the model card, empty where there is none.
    """

    folder: RunFolder
    result: Result | None
    sections: Mapping[str, Mapping[str, Any]]
    explicit: Sequence[str]
    ignored: Mapping[str, str]
    events: Mapping[str, Sequence[Event]]
    checks: Sequence[Mapping[str, Any]]
    card: str

    @property
    def name(self) -> str:
        """What was trained is called this."""
        return str(self.option("output_name") or self.folder.root.resolve().name)

    def option(self, name: str) -> Any:
        """The value of an option; nothing where the configuration has none."""
        return next((section[name] for section in self.sections.values() if name in section), None)

    def told(self, kind: str) -> Sequence[Event]:
        """All events of a kind."""
        return self.events.get(kind, ())

    @property
    def begun(self) -> Event:
        """How the run last began or went on; empty where it did not come so far."""
        return (self.told("run") or [{}])[-1]

    @property
    def step(self) -> int:
        """Steps that are done."""
        steps = self.told("step")
        told = int(steps[-1]["step"]) if steps else int(self.begun.get("start_step", 0))
        return self.result.step if self.result is not None else told

    @property
    def total_steps(self) -> int:
        """Steps that the run has in all."""
        return int(self.begun.get("total_steps", 0))

    def files(self) -> Sequence[ResultFile]:
        """The result files: those of the result, or what a run that did not end well has left."""
        if self.result is not None and self.result.files:
            return self.result.files
        found = {event["path"]: event["role"] for event in self.told("file")}
        return [
            ResultFile(role=role, path=path, size=place.stat().st_size, sha256="", content_type="")
            for path, role in found.items()
            if (place := self.inside(path)) is not None
        ]

    def inside(self, path: str) -> Path | None:
        """A file of the run folder by its relative path; nothing where it is not there."""
        place = self.folder.root / path
        is_inside = place.resolve().is_relative_to(self.folder.root.resolve())
        return place if is_inside and place.is_file() else None


def read_record(folder: RunFolder, result: Result | None) -> Record:
    """What a run folder tells.

    Args:
        folder: of a run that began.
        result: how it ended, if it did.

    Raises:
        InputError: the configuration in it cannot be read.
    """
    content = read_mapping(folder.config) if folder.config.exists() else {}
    events: dict[str, list[Event]] = {}
    for event in folder.read_events():
        events.setdefault(str(event.get("event")), []).append(event)
    resolved = content.pop("resolved", None) or {}
    ignored = content.pop("ignored_options", None) or {}
    if result is not None and result.ignored_options:
        ignored = result.ignored_options
    card = folder.outputs / "README.md"
    return Record(
        folder=folder,
        result=result,
        sections=without_contents(content),
        explicit=tuple(resolved.get("explicit", ())),
        ignored=ignored,
        events=events,
        checks=read_json(folder.outputs / "verify.json").get("checks", []),
        card=card.read_text(encoding="utf-8") if card.is_file() else "",
    )


def read_json(path: Path) -> dict[str, Any]:
    """What stands in a file of JSON; nothing where there is none, or something else in it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
