"""The page of a run, and the file it is written to."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from trainer import __version__
from trainer.durable import write_text
from trainer.job import Result, RunFolder
from trainer.report.curves import curves
from trainer.report.likeness import likeness
from trainer.report.outputs import loading, outputs
from trainer.report.photographs import photographs
from trainer.report.previews import previews
from trainer.report.record import Record, read_record
from trainer.report.settings import settings
from trainer.report.style import STYLE
from trainer.report.summary import summary

# Parts of the page in the order in which people ask for them.
_PARTS = (previews, likeness, curves, photographs, outputs, loading, settings)
# Nothing is fetched and nothing runs, whatever stands in prompts and names.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_HEADING = re.compile(r'<section id="(\w+)" [^>]*><h2 [^>]*>(.*?)</h2>')


def write_report(folder: RunFolder, result: Result | None) -> Path:
    """Writes the report of a run into its folder.

    Args:
        folder: of a run that began.
        result: how it ended; nothing while it runs.

    Returns:
        Where the report is.

    Raises:
        InputError: the configuration in the folder cannot be read.
        DiskError: the report cannot be written.
    """
    write_text(folder.report, page(read_record(folder, result)))
    return folder.report


def page(record: Record) -> str:
    """A run as a page that needs nothing beside itself."""
    content = "".join(part(record) for part in _PARTS)
    links = "".join(
        f'<li><a href="#{name}">{title}</a></li>' for name, title in _HEADING.findall(content)
    )
    title = escape(f"{record.name}: report")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{summary(record)}"
        f'<nav aria-label="On this page"><ul>{links}</ul></nav>{content}</main>'
        f"<footer>Made by trainer {__version__} from the run folder. Pictures lead to the files "
        "beside this page; everything else is on it.</footer></body></html>\n"
    )
