"""Writes docs/learning.md's tables from the figures in docs/benchmarks: make_learning_tables.py"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev

from learning_checks import BOUNDS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "learning.md"
FILES = {family: DOCS / "benchmarks" / f"learning-{family}.json" for family in ("sdxl", "flux")}
END = "<!-- end of figures -->"

Figures = Mapping[str, Mapping[str, float]]


def begin(name: str) -> str:
    """What stands before a table."""
    return f"<!-- {name} figures: made by scripts/make_learning_tables.py -->"


def table(figures: Figures) -> str:
    """A row for each figure but those of the loop with faults."""
    rows = ["| figure | mean | by seed | bound | |", "|---|---|---|---|---|"]
    for figure, by_seed in figures.items():
        if figure.startswith(("ours", "with faults")):
            continue
        bound, value = BOUNDS.get(figure), mean(by_seed.values())
        verdict = "" if bound is None else "ok" if bound.holds(value) else "**not met**"
        told = [f"{value:.3f}", _by_seed(by_seed), "" if bound is None else str(bound), verdict]
        rows.append(f"| {figure} | {' | '.join(told)} |")
    return "\n".join(rows)


def faults(figures: Figures) -> str:
    """Ours beside the loop with faults."""
    rows = ["| figure | ours | with faults |", "|---|---|---|"]
    for figure, ours in figures.items():
        who, _, what = figure.partition(": ")
        if who == "ours":
            theirs = figures[f"with faults: {what}"]
            rows.append(f"| {what} | {_spread(ours)} | {_spread(theirs)} |")
    return "\n".join(rows)


def page_with_figures(page: str) -> str:
    """The page with all tables as they should be now."""
    found = {family: json.loads(path.read_text())["figures"] for family, path in FILES.items()}
    made = {family: table(figures) for family, figures in found.items()}
    for name, rows in {**made, "faults": faults(found["sdxl"])}.items():
        before, mark, rest = page.partition(begin(name))
        _, end, after = rest.partition(END)
        assert mark and end, f"`{begin(name)}` and `{END}` must stand on the page"
        page = f"{before}{mark}\n\n{rows}\n{END}{after}"
    return page


def _by_seed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values.values())


def _spread(values: Mapping[str, float]) -> str:
    """Mean and standard deviation, then each value."""
    told = list(values.values())
    return f"{mean(told):.3f} ± {stdev(told):.3f} ({_by_seed(values)})"


if __name__ == "__main__":
    PAGE.write_text(page_with_figures(PAGE.read_text()))
