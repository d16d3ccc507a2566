"""HTML of words, lists and tables; whatever comes from outside is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from urllib.parse import quote

_CODE = re.compile(r"`([^`\n]+)`")
_STRONG = re.compile(r"\*\*([^*\n]+)\*\*")


def words(text: str) -> str:
    """A text as HTML; what stands in backticks is code, between double asterisks strong."""
    parts = _CODE.split(text)
    shown = [
        f"<code>{escape(part)}</code>" if place % 2 else _STRONG.sub(_strong, escape(part))
        for place, part in enumerate(parts)
    ]
    return "".join(shown)


def _strong(found: re.Match[str]) -> str:
    return f"<strong>{found[1]}</strong>"


def paragraph(text: str, kind: str = "") -> str:
    """A text as a paragraph."""
    return f"<p{_class(kind)}>{words(text)}</p>"


def bullets(items: Iterable[str], kind: str = "") -> str:
    """Items of HTML as a list; nothing where there are none."""
    entries = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul{_class(kind)}>{entries}</ul>" if entries else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, of: str, kind: str = "") -> str:
    """Cells of HTML as a table that is moved sideways where it is too wide.

    Args:
        heads: of the columns.
        rows: each row's name comes first.
        of: what it is a table of, for those who do not see it.
    """
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(of)}">'
        f'<table{_class(kind)} style="--columns: {len(heads) - 1}">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values of HTML, as a list of facts; those without a value are left out."""
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs if value
    )
    return f'<dl class="facts">{entries}</dl>'


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Something that is shown when its summary is opened, and in print."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{content}</details>"


def section(name: str, title: str, content: str) -> str:
    """A part of the page under a heading.

    Args:
        name: the part's address on the page.
    """
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2>{content}</section>'
    )


def command(text: str) -> str:
    """A command to be copied."""
    return f'<pre class="copy"><code>{escape(text)}</code></pre>'


def link(path: str, content: str) -> str:
    """Content of HTML that leads to a file beside the page."""
    return f'<a href="{escape(quote(path))}">{content}</a>'


def counted(count: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
