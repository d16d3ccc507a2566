"""What judges the files shares no code with what writes them or with training."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "trainer"
JUDGES = (
    *("verify", "readers", "formula", "layer_names"),
    *("whole_readers", "embedding_readers"),
)
JUDGED = {
    *(f"export.{name}" for name in ("kohya", "diffusers", "state", "full", "read", "fusing")),
    *(f"export.{name}" for name in ("embeddings", "extraction")),
    *("adapters", "loss", "objectives", "training", "results"),
}


def imported(module: str) -> set[str]:
    """The package's modules that a module imports, directly."""
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    below = {name.removeprefix("trainer.") for name in names if name.startswith("trainer.")}
    return {name for name in below if (PACKAGE / f"{name.replace('.', '/')}.py").is_file()}


def reached(module: str) -> set[str]:
    """Everything of the package that importing a module brings in."""
    found, ahead = set(), {module}
    while ahead:
        found |= ahead
        ahead = {other for name in ahead for other in imported(name)} - found
    return found


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_reaches_nothing_that_it_judges(judge: str) -> None:
    assert reached(f"export.{judge}") & JUDGED == set()


def test_what_is_judged_exists_and_would_be_noticed() -> None:
    assert all((PACKAGE / f"{name.replace('.', '/')}.py").is_file() for name in JUDGED)
    assert reached("export.verify") >= {f"export.{judge}" for judge in JUDGES}
    assert reached("results") >= {"export.kohya", "export.diffusers", "export.state", "adapters"}
