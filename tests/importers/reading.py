"""Imports of texts, and what a test asks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config import TrainingConfig
from trainer.config_files import as_layers, parse_yaml
from trainer.importers import SCRIPTS, Imported, imported
from trainer.importers.documents import read_document
from trainer.resolve import resolve


def import_file(folder: Path, name: str, text: str, program: str | None = None) -> Imported:
    """The import of one file of this text."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return imported([read_document(str(file), SCRIPTS)], program)


def loaded(found: Imported) -> TrainingConfig:
    """The configuration that the written YAML means."""
    return resolve(as_layers(parse_yaml(found.text, "me.yaml"), "me.yaml"))


def taken(found: Imported) -> dict[str, set[str]]:
    """Option there to the options here that it became."""
    names: dict[str, set[str]] = {}
    for entry in found.taken:
        names.setdefault(entry.name, set()).add(entry.option)
    return names


def lost(found: Imported) -> dict[str, str]:
    """What has no counterpart and changes the training, with the reason."""
    return {entry.name: entry.reason for entry in found.left if entry.matters}


def unneeded(found: Imported) -> dict[str, str]:
    """What is not needed here, with the reason."""
    return {entry.name: entry.reason for entry in found.left if not entry.matters}


def filled(found: Imported) -> dict[str, Any]:
    """What the other program assumes and was written out: option here to value."""
    return {entry.option: entry.becomes for entry in found.filled}


def pictures(folder: Path, count: int) -> Path:
    """A folder of so many pictures."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (number, 90, 10)).save(folder / f"{number}.png")
    return folder
