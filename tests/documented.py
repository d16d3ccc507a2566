"""The code blocks of README, CONTRIBUTING and docs: what each is, needs and is checked by.

A comment before a block says what is not to be seen in it:

```
<!-- needs: a GPU, minutes -->           not run where tests run; checked against a schema
<!-- schema: prompts -->                 what a YAML or JSON block is, where it is no configuration
<!-- run by: tests/test_extending.py --> run by a test of its own
```
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
# In the order in which commands are run: the first makes what the others look at.
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)
# What a block may need that tests do not have.
NEEDS = {
    *("a GPU", "several GPUs", "several machines", "Slurm", "a running server", "Chromium"),
    *("installation", "minutes", "an hour", "network", "an account", "a browser"),
    *("a cluster", "a container engine", "a rented pod"),
    *("a program of yours", "a queue of your own"),
}
# Not code: trees of files, plans, what a program prints.
LISTING = "text"

_BLOCK = re.compile(
    r"(?P<tags>(?:^<!-- (?:needs|schema|run by): [^\n]+ -->\n)*)"
    r"^```(?P<language>\S*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TAG = re.compile(r"<!-- (needs|schema|run by): (.+) -->")

Kind = Literal["executed", "checked", "listing"]


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Args:
        line: of the page, counted from 1, on which its text begins.
        needs: what tests do not have.
        schema: what it is, where its language does not say it; may be empty.
        run_by: the test that runs it; empty where none of its own does.
    """

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    schema: str = ""
    run_by: str = ""

    def __str__(self) -> str:
        """Its place, for the name of a test."""
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> Kind:
        """What tests do with it."""
        if self.language == LISTING:
            return "listing"
        if self.run_by:
            return "executed"
        runs = self.language == "python" or (self.language == "console" and self._is_ours)
        return "executed" if runs and not self.needs else "checked"

    @property
    def lines(self) -> list[str]:
        """Its commands."""
        return [line for line in self.text.splitlines() if line]

    @property
    def _is_ours(self) -> bool:
        return all(line.startswith("trainer ") for line in self.lines)


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [_block(page, text, found) for found in _BLOCK.finditer(text)]


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in PAGES for block in blocks_of(page)]


def counted(blocks: Iterable[Block]) -> dict[Kind, int]:
    """How many there are of each kind."""
    found = Counter(block.kind for block in blocks)
    return {"executed": found["executed"], "checked": found["checked"], "listing": found["listing"]}


def trainer_arguments(line: str) -> list[str] | None:
    """The arguments of a line's `trainer` command, behind a launcher or not; None: it has none."""
    words = shlex.split(line)
    if "trainer" not in words:
        return None
    return words[words.index("trainer") + 1 :]


def _block(page: str, text: str, found: re.Match[str]) -> Block:
    tags = dict(_TAG.findall(found["tags"]))
    return Block(
        page=page,
        line=text[: found.start("text")].count("\n") + 1,
        language=found["language"],
        text=found["text"],
        needs=tuple(need for need in tags.get("needs", "").split(", ") if need),
        schema=tags.get("schema", ""),
        run_by=tags.get("run by", ""),
    )
