"""The house rules that a program can check: who looks into which room, names, and sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trainer"
LONGEST_MODULE = 450
LONGEST_FUNCTION = 60

# Room: (its modules, the rooms it may look into). A folder stands for all modules in it.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "foundation": (
        {
            *("", "errors", "randomness", "names", "durable", "cache", "events", "tensorfile"),
            *("transfers", "collection", "launchers"),
            *("fetch", "network", "stages", "readahead"),
        },
        set(),
    ),
    "configuration": (
        {
            *("fields", "sections", "config", "leaves", "rules", "resolve", "config_files"),
            *("presets", "known_models", "picture_lists", "locations", "contracts"),
            *("prompt_library", "folder_names"),
        },
        {"foundation"},
    ),
    "job": ({"job", "generation", "picture_folder"}, {"foundation", "configuration"}),
    "objectives": ({"objectives", "densities"}, {"foundation", "configuration"}),
    "mathematics": (
        {
            *("loss", "optim", "prodigy", "shards", "updates", "adapted"),
            *("adapters", "frozen", "schedule", "tokens", "measures"),
        },
        {"foundation", "configuration", "objectives"},
    ),
    "families": ({"families"}, {"foundation", "configuration", "objectives"}),
    "images": ({"images"}, {"foundation", "configuration"}),
    "sources": ({"sources"}, {"foundation", "configuration", "images"}),
    "data": ({"data"}, {"foundation", "configuration", "images", "sources"}),
    "export": ({"export"}, {"foundation", "configuration", "job"}),
    "pipeline": (
        {
            *(
                "base_model",
                "contents",
                "model_files",
                "vae",
                "machine",
                "encoding",
                "encoded",
                "resident",
                "checkpoint",
                "determinism",
            ),
            *("sampling", "class_images", "concepts", "trainables", "sharding", "fitting"),
            *("processes", "watch", "signs", "stores", "spread", "identity", "capacity"),
            "heap",
        },
        {
            *("foundation", "configuration", "job", "objectives", "mathematics", "families"),
            *("data", "sources", "images"),
        },
    ),
    "forecast": (
        {
            *("estimate", "memory", "live_bytes", "update_memory", "measurements", "inspection"),
            *("remedies", "dataless", "outcomes", "recomputing", "foreseen"),
        },
        {
            "foundation",
            "configuration",
            "families",
            *("data", "sources", "images"),
            "mathematics",
            "objectives",
            "pipeline",
        },
    ),
    "engine": (
        {
            *("engine", "training", "stepping", "passes", "recording", "pace", "affordable"),
            *("readings", "faults", "results", "artifacts"),
            *("out_of_memory", "peaks", "remarks"),
            *("looks", "looking", "previews", "validation"),
        },
        {
            *("foundation", "configuration", "job", "objectives", "mathematics", "families"),
            *("data", "sources", "images", "export", "pipeline", "forecast"),
        },
    ),
    "dialects": ({"dialects"}, {"foundation", "configuration", "job"}),
    "importers": ({"importers"}, {"foundation", "configuration"}),
    "listeners": ({"listeners", "trackers", "curves"}, {"foundation", "configuration", "job"}),
    "report": ({"report"}, {"foundation", "configuration", "job", "listeners"}),
    "compat": ({"compat"}, {"foundation"}),
    "server": ({"server"}, {"foundation", "configuration", "job", "dialects"}),
    "inference": (
        {"inference", "strength", "taught", "guides"},
        {
            *("foundation", "configuration", "job", "objectives", "mathematics", "families"),
            *("images", "export", "pipeline"),
        },
    ),
    "doors": (
        {
            *("cli", "__main__", "flags", "runner", "doctor", "printing", "preparing"),
            *("generating", "lora_files", "importing", "reporting", "serving", "seal"),
            *("publishing", "hub_upload"),
            *(
                "picturing",
                "sampled_runs",
                "compared_runs",
                "lineup",
                "run_subjects",
                "run_likeness",
            ),
        },
        {
            *("foundation", "configuration", "job", "objectives", "mathematics", "families"),
            *(
                "data",
                "sources",
                "images",
                "export",
                "pipeline",
                "forecast",
                "engine",
                "inference",
                "dialects",
                "importers",
                "listeners",
                "report",
                "server",
            ),
        },
    ),
}

WITHOUT_TORCH = [
    "errors",
    "launchers",
    "fetch",
    "network",
    "randomness",
    "names",
    "events",
    "generation",
    "job",
    "sections",
    "config",
    "leaves",
    "rules",
    "resolve",
    "config_files",
    "presets",
    "prompt_library",
    "picture_folder",
    "measurements",
    "schedule",
    "dialects",
    "known_models",
    "picture_lists",
    "locations",
    "contracts",
    "report.page",
    "reporting",
    "importers",
    "importing",
    "dialects.bfl",
    "dialects.fal_personalization",
    "dialects.fal_lora",
    "dialects.fal_guide",
    "dialects.novita",
    "compat.fal",
    "publishing",
    "server.connect",
    "server.hosts",
    "server.tls",
    "server.listening",
    "cli",
]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below `trainer`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a piece of code imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if below(name) in MODULES else base for name in full]
        else:
            continue
        yield from (below(name) for name in names if name.split(".")[0] == "trainer")


def below(name: str) -> str:
    return name.removeprefix("trainer").removeprefix(".")


def room_of(module: str) -> str:
    (room,) = [room for room, (members, _) in ROOMS.items() if module.partition(".")[0] in members]
    return room


def words_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Identifiers and whole strings of a module, docstrings aside."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.value, node.lineno
        elif isinstance(node, ast.Name):
            yield from identifier(node.id, node.lineno)
        elif isinstance(node, ast.Attribute):
            yield from identifier(node.attr, node.lineno)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield from identifier(node.name, node.lineno)
        elif isinstance(node, ast.arg):
            yield from identifier(node.arg, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            yield from (((node.module or "").split(".")[-1], node.lineno),)
            yield from ((alias.name, node.lineno) for alias in node.names)


def identifier(name: str, line: int) -> Iterator[tuple[str, int]]:
    """A name, and its parts between underscores."""
    yield name, line
    yield from ((part, line) for part in name.split("_"))


def names_of_plugins() -> dict[str, str]:
    """Module names of families and dialects, with the only module that may say them."""
    return {
        module.split(".")[1]: module
        for module in MODULES
        if module.startswith(("families.", "dialects.")) and module != "families.base"
    }


def is_home(module: str, home: str) -> bool:
    """Whether a module may name a family or dialect: its own, or the protocol of that dialect."""
    kind, name = home.split(".")
    protocol = (f"server.protocols.{name}", f"server.{name}")
    speaks_it = kind == "dialects" and (module in protocol or module.startswith(f"{protocol[1]}."))
    return module == home or speaks_it


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 20
    assert {"sdxl", "sd15", "fal_personalization"} <= set(names_of_plugins())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_one_room(module: str) -> None:
    rooms = [room for room, (members, _) in ROOMS.items() if module.partition(".")[0] in members]

    assert len(rooms) == 1, f"give `{module}` a place in ROOMS"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_looks_only_into_the_rooms_it_may(module: str) -> None:
    room = room_of(module)
    allowed = {room, *ROOMS[room][1]}

    looked_into = {other: room_of(other) for other in imported(MODULES[module])}

    assert {other: room for other, room in looked_into.items() if room not in allowed} == {}


def test_rooms_lie_above_one_another() -> None:
    order = TopologicalSorter({room: below for room, (_, below) in ROOMS.items()})

    assert len(list(order.static_order())) == len(ROOMS)


def test_imports_have_no_circle() -> None:
    graph = {module: set(imported(tree)) - {module} for module, tree in MODULES.items()}

    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_family_or_dialect_is_named_in_its_own_file_only(module: str) -> None:
    foreign = {name for name, home in names_of_plugins().items() if not is_home(module, home)}

    said = {(word, line) for word, line in words_of(MODULES[module]) if word.lower() in foreign}

    assert said == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module: str) -> None:
    path = PACKAGE / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    assert len(file.read_text(encoding="utf-8").splitlines()) < LONGEST_MODULE


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.FunctionDef)
    }

    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("module", MODULES)
def test_no_error_of_any_kind_is_swallowed(module: str) -> None:
    broad = [
        node.lineno
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
    ]

    assert broad == []


def heavy_after(code: str) -> str:
    program = f"import sys\n{code}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.splitlines()[-1]


def test_modules_that_answer_at_once_import_no_torch() -> None:
    imports = "\n".join(f"import trainer.{module}" for module in WITHOUT_TORCH)

    assert heavy_after(imports) == "[]"


def test_help_imports_no_torch() -> None:
    code = (
        "import runpy\n"
        "sys.argv = ['trainer', '--help']\n"
        "try:\n"
        "    runpy.run_module('trainer', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
    )

    assert heavy_after(code) == "[]"


def test_a_look_into_torch_would_be_noticed() -> None:
    assert heavy_after("sys.modules['torch'] = sys") == "['torch']"
