"""The result files: what each is, what readers found in it, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from trainer.job import MEANINGS, ResultFile
from trainer.listeners import size_text
from trainer.report import markdown
from trainer.report.axes import figure_text
from trainer.report.markup import link, paragraph, section, table, words
from trainer.report.record import Record

# Parts of the model card that have a place of their own on the page.
_ELSEWHERE = ("Training", "Files", "Verification")
_CARD_FILE = re.compile(r"^- `(?P<name>[^`]+)`: (?P<meaning>.+)$", re.MULTILINE)
_PEAKS = {"tensors": "tensors on the GPU", "reserved": "reserved there", "process": "process"}
_MARKS = {"passed": "\N{CHECK MARK}", "failed": "\N{BALLOT X}", "not checked": "\N{EN DASH}"}


def outputs(record: Record) -> str:
    """The files and who read them back, and the memory that the run took."""
    files = record.files()
    if not files:
        content = paragraph("There are no result files: they are written at the end.")
    else:
        meanings = dict(_CARD_FILE.findall(dict(markdown.sections(record.card)).get("Files", "")))
        rows = [_row(record, file, meanings) for file in files]
        heads = ["file", "what it is", "size", "sha256", "read back by"]
        content = table(heads, rows, of="result files", kind="files")
    return section("files", "Files, and what was verified", content + _memory(record))


def loading(record: Record) -> str:
    """How the files are loaded, as their model card says it; nothing where there is no card."""
    parts = [
        f"<h3>{words(title)}</h3>{markdown.as_html(text)}"
        for title, text in markdown.sections(record.card)
        if title not in _ELSEWHERE
    ]
    if not parts:
        return ""
    where = paragraph("The files are in `outputs` beside this page, with the card that says this:")
    return section("loading", "How to load the files", where + "".join(parts))


def _row(record: Record, file: ResultFile, meanings: dict[str, str]) -> tuple[str, ...]:
    name = file.path.removeprefix("outputs/")
    meaning = meanings.get(name) or MEANINGS[file.role].format_map(_Programs())
    digest = (
        f'<code title="{escape(file.sha256)}">{escape(file.sha256[:12])}</code>'
        if file.sha256
        else ""
    )
    return (
        link(file.path, f"<code>{escape(name)}</code>"),
        words(meaning),
        size_text(file.size).replace(" ", "\N{NO-BREAK SPACE}"),
        digest,
        "<br>".join(_verdicts(record, file)),
    )


class _Programs(dict[str, str]):
    """What stands for programs where no card names them."""

    def __missing__(self, key: str) -> str:
        return "other programs"


def _verdicts(record: Record, file: ResultFile) -> Iterator[str]:
    for check in record.checks:
        if check["path"] == file.path:
            status = str(check["status"])
            kind = status.replace(" ", "-")
            reason = f": {words(check['reason'])}" if check.get("reason") else ""
            yield (
                f'<span class="verdict {escape(kind)}">{_MARKS.get(status, "")} '
                f"{escape(check['reader'])} {escape(status)}</span>{reason}{_difference(check)}"
            )


def _difference(check: Mapping[str, Any]) -> str:
    value = check.get("largest_change_difference")
    return (
        f' <span class="soft">within {figure_text(value)} of what changed</span>' if value else ""
    )


def _memory(record: Record) -> str:
    """The most memory of each part of the run."""
    told = record.told("memory")
    if not told:
        return ""
    peaks = told[-1]["peaks"]
    kinds = [kind for kind in _PEAKS if any(kind in peak for peak in peaks.values())]
    rows = [
        (escape(part), *(size_text(peak[kind]) if kind in peak else "" for kind in kinds))
        for part, peak in peaks.items()
    ]
    heads = ["most memory while", *(_PEAKS[kind] for kind in kinds)]
    return "<h3>Memory</h3>" + table(heads, rows, of="most memory of each part", kind="figures")
