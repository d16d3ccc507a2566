"""Pages read by a parser that knows which elements must be closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from trainer.job import RunFolder
from trainer.report.page import page
from trainer.report.record import read_record

_VOID = {"br", "img", "link", "meta"}


@dataclass(frozen=True)
class Element:
    """One element: its name and attributes."""

    name: str
    attributes: dict[str, str | None]

    def get(self, name: str) -> str:
        return self.attributes.get(name) or ""


@dataclass
class Page(HTMLParser):
    """All elements of a page in order, and the texts in its headings.

    Args:
        html: the page.
    """

    html: str
    elements: list[Element] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def named(self, *names: str) -> list[Element]:
        """The elements of these names, in order."""
        return [element for element in self.elements if element.name in names]

    def sections(self) -> list[str]:
        """The parts of the page by their addresses."""
        return [element.get("id") for element in self.named("section")]


def page_of(folder: RunFolder) -> Page:
    """The report of a run, parsed."""
    return Page(page(read_record(folder, folder.read_result())))
