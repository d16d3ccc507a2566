"""Extras: what each installs switches its feature on; where it lacks, its pip line is told.

Whether the features themselves work is looked at where they are tested; `restore` and `caption`
need the torchvision that belongs to the installed torch, which not every machine has.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer import doctor, frozen
from trainer.cli import run
from trainer.images import captioner, heic

ROOT = Path(__file__).parent.parent
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
# What tests and scripts import beside: tools that are installed where they run, and what pydantic,
# scikit-image and transformers bring along.
OF_NO_EXTRA = {"cyclonedx", "onnx"} | {"annotated_types", "scipy", "tokenizers"}


def packages(extra: str) -> set[str]:
    """Names of what an extra installs."""
    return {canonicalize_name(Requirement(line).name) for line in EXTRAS[extra]}


def test_every_extra_that_is_promised_is_there() -> None:
    promised = {"server", "caption", "restore", "heic", "fp8", "dev", "lycoris", "wandb", "demo"}

    assert promised <= set(EXTRAS)


def test_every_pip_line_names_an_extra_that_is_there() -> None:
    pages = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {
        (page.name, extra)
        for page in pages
        for found in re.findall(r"pip install [^\n`]*?\[([a-z0-9,-]+)\]'", page.read_text())
        for extra in found.split(",")
    }

    assert {extra for _, extra in named} >= {"server", "heic", "lycoris", "restore", "wandb"}
    assert {(page, extra) for page, extra in named if extra not in EXTRAS} == set()


def test_every_range_has_a_lower_end() -> None:
    lines = [line for extra in EXTRAS.values() for line in extra]

    open_below = [line for line in lines if ">=" not in line]
    assert open_below == []


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Makes packages of which nothing can be imported, whatever was imported before."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in packages or name.startswith("trainer.server"):
            monkeypatch.delitem(sys.modules, name)
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("package", ["starlette", "hypercorn", "cryptography", "certifi"])
def test_without_the_extra_server_serving_names_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package in packages("server")
    without(monkeypatch, package)

    assert run(["serve"]) == 2

    said = capsys.readouterr().err
    assert f"`serve`: the server needs the package `{package}" in said
    assert "hint: pip install 'tok-trainer[server]'" in said


def test_with_the_extra_server_it_can_listen() -> None:
    assert importlib.import_module("trainer.server.listening").run


def test_without_the_extra_wandb_curves_to_it_name_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "wandb")

    assert run(["train", "--images-data-url", "photos", "--wandb"]) == 2

    assert "hint: pip install 'tok-trainer[wandb]'" in capsys.readouterr().err


def test_the_extra_heic_switches_its_reader_on() -> None:
    assert packages("heic") == {"pi-heif"}
    content = (ROOT / "tests/samples/photo.heic").read_bytes()

    assert heic.is_installed()
    assert heic.read_heic(content, 10**8)


def test_the_extra_caption_is_what_qwen_asks_for_and_the_doctor_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert packages("caption") == {"torchvision"}
    firsts = {has: names[0][0] for has, names in captioner._AUTO.items()}
    assert firsts == {True: "qwen3-vl-8b", False: "llava"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)

    finding = doctor.torchvision_finding()

    assert finding.status == "ok"
    assert "`captioner: auto` takes LLaVA" in finding.message
    assert "pip install 'tok-trainer[caption]'" in finding.message


def test_the_extra_restore_has_what_redrawing_faces_imports() -> None:
    assert packages("restore") == {"spandrel", "torchvision"}


def test_fp8_needs_nothing_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages("fp8") == set()
    without(monkeypatch, "bitsandbytes", "torchao")
    weight = torch.randn(8, 16)

    kept = frozen.FORMATS["fp8"].pack(weight)

    assert kept[0].dtype == torch.float8_e4m3fn
    again = frozen.FORMATS["fp8"].widen(kept, weight.shape, torch.float32)
    # Three bits of mantissa: a number is off by a sixteenth of itself at most.
    assert torch.allclose(again, weight, rtol=1 / 16, atol=1e-3)


def test_the_extras_for_work_have_what_tests_and_scripts_import() -> None:
    providers = metadata.packages_distributions()
    own = {path.stem for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*")}
    imported = {
        name.partition(".")[0]
        for folder in ("tests", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
    }
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    for extra in ("dev", "docs", "page-tests", "ship-tests"):
        declared |= packages(extra)

    unknown = {
        name
        for name in imported - own - set(sys.stdlib_module_names) - {"trainer"} - OF_NO_EXTRA
        if declared.isdisjoint(canonicalize_name(d) for d in providers.get(name, [name]))
    }
    assert {"pytest", "skimage"} <= imported
    assert unknown == set(), json.dumps(sorted(unknown))


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    is_absolute = isinstance(node, ast.ImportFrom) and node.level == 0
    return [str(node.module)] if is_absolute else []
