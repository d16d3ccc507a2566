"""Writes docs/parameters.md's table of all options from their declarations: make_parameter_table.py

The table stands between two comments, which readers of the page do not see. A concept's own
options follow those of the sections. Where an option acts is read from the rows of the
option-effect matrix, tests/options, which show it there; what is different in a family, from the
family's own facts and from the rows that say so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from options.tables import ON_A_GPU, ROWS, observables

from trainer.config import LEAVES, SECTIONS, TrainingConfig
from trainer.families import family_names, load_family
from trainer.families.base import Family, adapted_encoders, token_encoders
from trainer.leaves import allowed, in_words, items, leaf_schema, parts, shown

PAGE = Path(__file__).parent.parent / "docs" / "parameters.md"
BEGIN = "<!-- options: made by scripts/make_parameter_table.py -->"
END = "<!-- end of options -->"
HEAD = ("| option | default | allowed | acts on | meaning |", "|---|---|---|---|---|")
FAMILY_HEAD = ("| family | option | what differs |", "|---|---|---|")
CONCEPT_HEAD = ("| option | default | allowed | meaning |", "|---|---|---|---|")
# How a row of the matrix begins that says why an option means nothing in a family.
BY_DEFAULT = "by default: "
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
    """The options of every section and of a concept, one row each, and remarks on families."""
    return "\n".join([LEGEND, "", *_sections(), *_concepts(), *_families()])


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
        yield from (f"## {section}", "", str(annotation.__doc__).splitlines()[0], "", *HEAD)
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
        "## One of `concepts`",
        "",
        "Null is the run's own option of that name.",
        "",
        *CONCEPT_HEAD,
    )
    for name, schema in parts(concept).items():
        yield _row(name, _default(schema), in_words(schema), schema["description"])
    yield ""


def _families() -> Iterator[str]:
    yield from (
        "## What differs by family",
        "",
        "The checkpoint tells its family.",
        "",
        *FAMILY_HEAD,
    )
    for name in family_names():
        for option, remark in _remarks(name, load_family(name)):
            yield f"| {name} | `{option}` | {remark} |"
    yield ""


def _remarks(name: str, family: type[Family]) -> Iterator[tuple[str, str]]:
    for row in ROWS:
        if name in row.families and row.says.startswith(BY_DEFAULT):
            yield row.leaf, f"means nothing: {row.says.removeprefix(BY_DEFAULT)}"
    yield "resolution_width", f"a multiple of {family.checkpoints.side_step}, and so the height"
    default = LEAVES["target_unet_modules"].info.default
    if set(family.target_modules) != set(default):
        yield (
            "target_unet_modules",
            f"the default gives way to `{shown(list(family.target_modules))}`",
        )
    yield "train_text_encoder", _of_encoders(adapted_encoders(family))
    of_tokens = _of_encoders(token_encoders(family))
    unasked = token_encoders(family) and "train_text_encoder_ti" in family.objective_class.unasked
    by_itself = "; only where it is set, no default switches it on" if unasked else ""
    yield "train_text_encoder_ti", of_tokens + by_itself
    pipeline = inspect.signature(family.pipeline_class.__call__).parameters
    yield "class_guidance_scale", f"null stands for {pipeline['guidance_scale'].default:g}"


def _of_encoders(names: tuple[str, ...]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f"of {listed}" if names else "refused: no text encoder can learn that way"


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
