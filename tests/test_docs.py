"""What the pages say of the project is so: names, links, tables, codes, and tests that show it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import PAGES, ROOT, all_blocks, blocks_of, trainer_arguments
from make_loading import page_with_loading
from make_parameter_table import page_with_table
from make_settings_table import page_with_settings

from trainer.cli import cli
from trainer.config import LEAVES, Concept
from trainer.errors import TrainerError
from trainer.server.protocols import protocols


def commands() -> list[list[str]]:
    """The arguments of every `trainer` command on the pages, behind a launcher or not."""
    lines = [line for block in all_blocks() if block.language == "console" for line in block.lines]
    return [words for line in lines if (words := trainer_arguments(line))]


def test_the_pages_name_every_command() -> None:
    shown = {arguments[0] for arguments in commands()}
    text = "\n".join((ROOT / page).read_text() for page in PAGES)

    assert len(commands()) > 10
    assert {name for name in cli.commands if name not in shown | {"version"}} <= {
        name for name in cli.commands if f"`trainer {name}" in text
    }


def test_every_file_of_the_project_that_the_pages_name_exists() -> None:
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"(?:configs|scripts|tests|docs)/[\w./-]*\w", text))

    assert len(named) > 5
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_house_plan_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (plan,) = [b for b in blocks_of("CONTRIBUTING.md") if b.language == "text"]
    left = " ".join(re.split(r" {2,}", line)[0] for line in plan.lines)
    named = set(re.findall(r"\w+", left))
    package = ROOT / "trainer"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}

    assert len(modules) > 30
    assert named == modules | rooms
    assert all(f"`{name}`" in text for name in ("engine", "training", "results", "machine"))


def test_every_kind_of_error_and_exit_code_is_in_troubleshooting() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (?:`([\w-]+)`)? ?\|", page, re.MULTILINE)
    kinds = [TrainerError, *TrainerError.__subclasses__()]
    # Those of the server end no command.
    told = {(kind.exit_code, kind.kind) for kind in kinds if kind.__module__ == "trainer.errors"}

    # 0 is success, 130 a second Ctrl-C (128 + SIGINT, as shells count).
    assert {(int(code), kind) for code, kind in rows} == told | {(0, ""), (130, "")}
    assert set(re.findall(r"^## `([\w-]+)`", page, re.MULTILINE)) == {kind for _, kind in told}


def test_the_table_of_options_is_current_and_has_a_row_for_every_one() -> None:
    page = (ROOT / "docs/parameters.md").read_text()
    table = page.partition("<!-- options:")[2]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)

    assert page == page_with_table(page), "run scripts/make_parameter_table.py"
    assert len(LEAVES) > 90
    assert rows == [*LEAVES, *Concept.model_fields]


def test_the_table_of_settings_is_current() -> None:
    page = (ROOT / "docs/server.md").read_text()

    assert page.count("\n| `") > 25
    assert page_with_settings(page) == page


def test_how_files_are_loaded_is_told_as_the_card_tells_it() -> None:
    page = (ROOT / "docs/outputs.md").read_text()

    assert "`load_lora_weights`" in page
    assert page_with_loading(page) == page, "run scripts/make_loading.py"


def test_every_route_on_the_page_is_one_of_the_servers() -> None:
    page = (ROOT / "docs/server.md").read_text()
    operations = [operation for protocol in protocols() for operation in protocol.OPERATIONS]
    paths = {operation.path for operation in operations}
    named = set(re.findall(r"`(?:POST )?(/(?:fal-ai|v1|v3)/[\w./-]+)`", page))

    assert len(named) > 20
    assert {path for path in named if path not in paths} == set()


# Links


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    # As GitHub and MkDocs make them.
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def links_of(page: str) -> list[str]:
    """The places on a page that are no addresses."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", (*PAGES, "CHANGELOG.md"))
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page

        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_of_the_site_link_to_nothing_that_it_has_not() -> None:
    inside = [(page, link) for page in PAGES if page.startswith("docs/") for link in links_of(page)]
    outside = [link for page, link in inside if link.partition("#")[0].startswith("../../")]
    above = {link.partition("#")[0] for page, link in inside if "/" not in page[5:]}

    assert len(inside) > 40
    assert outside == []
    assert {link for link in above if link.startswith("../")} <= {
        f"../{name}" for name in ("CONTRIBUTING.md", "CHANGELOG.md")
    }


def test_every_page_is_in_the_navigation_and_can_be_reached_from_the_readme() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    site = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    reached, new = set[Path](), {ROOT / "README.md"}
    while new:
        reached |= new
        found = {
            (page.parent / link.partition("#")[0]).resolve()
            for page in new
            for link in links_of(str(page.relative_to(ROOT)))
            if link.partition("#")[0].endswith(".md")
        }
        new = found - reached

    assert {page for page in site if f": {page}\n" not in navigation} == set()
    assert {str(p.relative_to(ROOT)) for p in reached} >= set(PAGES) - {"docs/index.md"}


# Tests that show what is promised


def test_every_test_that_a_page_names_is_there() -> None:
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\b", (ROOT / file).read_text(), re.MULTILINE)
    ]

    assert len(named) > 80
    assert missing == []


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/security.md", "docs/deviations.md"])
def test_every_promise_and_deviation_names_the_test_that_shows_it(page: str) -> None:
    text = (ROOT / page).read_text()
    tables = [part for part in text.split("\n\n") if "| shown by |" in part.splitlines()[0]]
    rows = [row for table in tables for row in table.splitlines()[2:] if row.startswith("|")]

    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row.rsplit("|", 2)[1]] == []
