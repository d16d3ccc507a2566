"""The Markdown of a model card as HTML: headings, lists, tables, code and paragraphs, no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from trainer.report.markup import bullets, table, words

_FENCE = "```"
# A block goes on to an empty line, code to the end of its fence.
_BLOCKS = re.compile(r"^```\w*\n.*?^```$|^\S.*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a text under headings of the second degree: their titles and Markdown."""
    inside = False
    title, lines = "", list[str]()
    for line in text.splitlines():
        inside ^= line.startswith(_FENCE)
        if line.startswith("## ") and not inside:
            if title:
                yield title, "\n".join(lines)
            title, lines = line[3:].strip(), []
        else:
            lines.append(line)
    if title:
        yield title, "\n".join(lines)


def as_html(text: str) -> str:
    """A part without headings as HTML."""
    return "".join(_block(block) for block in _BLOCKS.findall(text.strip() + "\n"))


def _block(block: str) -> str:
    if block.startswith(_FENCE):
        code = block.split("\n", 1)[1].rsplit(_FENCE, 1)[0]
        return f'<pre class="copy"><code>{escape(code.rstrip())}</code></pre>'
    if block.startswith("|"):
        head, _, *rows = [_cells(line) for line in block.strip().splitlines()]
        return table(head, rows, of=" and ".join(head))
    if block.startswith("- "):
        return bullets(words(item) for item in re.split(r"\n?^- ", block, flags=re.MULTILINE)[1:])
    return f"<p>{words(' '.join(block.split(chr(10))))}</p>"


def _cells(line: str) -> list[str]:
    return [words(cell.strip()) for cell in line.strip().strip("|").split("|")]
