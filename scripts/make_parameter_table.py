"""Writes README.md's table of all options from their declarations: make_parameter_table.py

The table stands between two comments, which readers of the page do not see. A concept's own
options follow those of the sections. Where an option acts is read from the rows of the
option-effect matrix, tests/options, which show it there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from options.tables import ON_A_GPU, observables

from trainer.config import LEAVES, SECTIONS, TrainingConfig
from trainer.leaves import allowed, in_words, items, leaf_schema, parts, shown

PAGE = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- options: made by scripts/make_parameter_table.py -->"
END = "<!-- end of options -->"
HEAD = ("| option | default | allowed | acts on | meaning |", "|---|---|---|---|---|")
CONCEPT_HEAD = ("| option | default | allowed | meaning |", "|---|---|---|---|")
# What stands there for an option that only ever refuses: what it asks for, or what it finds.
ONLY_REFUSES = "refusal"
LEGEND = (
    "*acts on* is where tests show an option at work: **batch**, what the denoiser and the loss "
    "are given; **conditioning**, texts and sizes; **gradient**, of what is trained; **step**, "
    "what is trained, how far it moves and how often; **tensors** and **files**, the result; "
    f"**memory** and **arithmetic**, of the GPU alone; **{ONLY_REFUSES}**, nothing but what is "
    "refused."
)


def table() -> str:
    """The options of every section and of a concept, one row each."""
    return "\n".join([LEGEND, "", *_sections(), *_concepts()])


def page_with_table(page: str) -> str:
    """The page with the table as it should be now.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"`{BEGIN}` and `{END}` must stand on the page")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def _sections() -> Iterator[str]:
    acts_on = observables()
    for section in SECTIONS:
        annotation = TrainingConfig.model_fields[section].annotation
        assert annotation is not None
        yield from (f"**{section}**: {str(annotation.__doc__).splitlines()[0]}", "", *HEAD)
        for name, leaf in LEAVES.items():
            if leaf.section == section:
                default = leaf_schema(name)["default"]
                elsewhere = ON_A_GPU.get(name, ONLY_REFUSES)
                places = ", ".join(acts_on[name]) or elsewhere
                yield _row(name, shown(default), allowed(name), places, str(leaf.info.description))
        yield ""


def _concepts() -> Iterator[str]:
    concept = items(leaf_schema("concepts"))
    yield from (
        "**One of `concepts`**: null is the run's own option of that name.",
        "",
        *CONCEPT_HEAD,
    )
    for name, schema in parts(concept).items():
        yield _row(name, _default(schema), in_words(schema), schema["description"])
    yield ""


def _default(schema: Mapping[str, Any]) -> str:
    return shown(schema["default"]) if "default" in schema else "required"


def _row(name: str, default: str, *others: str) -> str:
    cells = (f"`{name}`", f"`{default}`", *others)
    # A bar would begin the next cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Writes the table into the page."""
    if len(sys.argv) != 1:
        sys.exit(__doc__)
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
