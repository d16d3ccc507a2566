"""The tables of other programs' options: every target exists, and every option is spoken of."""

from __future__ import annotations

import ast
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from reading import import_file
from test_import_kohya import NETWORK, PORTRAIT

from trainer import base_model, importers
from trainer.config import LEAVES, ModelConfig
from trainer.errors import InputError
from trainer.fitting import fitted
from trainer.importers import PROGRAMS, ai_toolkit, diffusers, kohya
from trainer.importers.ai_toolkit_table import TABLE as AI_TOOLKIT
from trainer.importers.desk import Desk, Kind, Table
from trainer.importers.diffusers_klein import ROWS as KLEIN
from trainer.importers.diffusers_table import TABLE as DIFFUSERS
from trainer.importers.kohya_table import TABLE as KOHYA
from trainer.resolve import Layer, resolve

TABLES: dict[str, tuple[Table, dict[str, object]]] = {
    "kohya": (KOHYA, dict(kohya.DEFAULTS)),
    "ai-toolkit": (AI_TOOLKIT, dict(ai_toolkit.DEFAULTS)),
    "diffusers": (DIFFUSERS, dict(diffusers.SCRIPTS["train_dreambooth_lora.py"].defaults)),
    "diffusers' script for [klein]": (
        {**DIFFUSERS, **KLEIN},
        dict(diffusers.SCRIPTS["train_dreambooth_lora_flux2_klein.py"].defaults),
    ),
}
ROWS = [(program, name) for program, (table, _) in TABLES.items() for name in table]


def test_every_program_has_a_table() -> None:
    assert set(PROGRAMS) < set(TABLES)
    assert len(ROWS) > 350


@pytest.mark.parametrize("program", TABLES)
def test_every_option_that_a_row_decides_over_exists(program: str) -> None:
    targets = {(name, leaf) for name, row in TABLES[program][0].items() for leaf in row.leaves}

    assert len(targets) > 40
    assert {(name, leaf) for name, leaf in targets if leaf not in LEAVES} == set()


@pytest.mark.parametrize("program", TABLES)
def test_every_default_has_a_row(program: str) -> None:
    table, defaults = TABLES[program]

    assert defaults
    assert set(defaults) <= set(table)


# What may stand in a file: right and wrong for most options.
VALUES = (1, "1", True, 0.5, "cosine", "some text", ["1", "2"])


def tried(program: str, name: str, value: object, kind: Kind) -> tuple[Desk, InputError | None]:
    table, defaults = TABLES[program]
    """The desk after a run, before `close` speaks of whatever nobody spoke of."""
    desk = Desk({name: value}, defaults, kind)
    try:
        desk.run(table)
        if desk.problems:
            raise InputError(desk.problems)
    except InputError as error:
        return desk, error
    return desk, None


@pytest.mark.parametrize("program", TABLES)
def test_no_option_is_dropped_in_silence(program: str) -> None:
    """Whatever it is given, an option is taken over, left with a reason, or refused by name."""
    table = TABLES[program][0]
    for name, value, kind in product(table, VALUES, get_args(Kind)):
        desk, error = tried(program, name, value, kind)
        told = {entry.name for entry in desk.taken} | {entry.name for entry in desk.left}
        told |= desk.told.keys()
        if error is not None:
            told = {problem.field for problem in error.problems}
        assert name in told, (name, value, kind)
        assert all(entry.reason for entry in desk.left)


@pytest.mark.parametrize("program", TABLES)
def test_what_a_row_takes_over_is_what_it_says(program: str) -> None:
    table = TABLES[program][0]
    for name, value, kind in product(table, VALUES, get_args(Kind)):
        desk, _ = tried(program, name, value, kind)
        own = {entry.option for entry in desk.taken if entry.name == name}
        assert own <= set(table[name].leaves), (name, value, kind)


# Flags of commands that are no options of a training, and of the hub's own program.
OF_COMMANDS = {"--output", "--preset", "--repo-type", "--local-dir"}


@pytest.mark.parametrize("program", TABLES)
def test_every_option_that_a_reason_names_exists(program: str) -> None:
    """What is said of an option sends nobody to one that is not there."""
    flags = {f"--{leaf.replace('_', '-')}" for leaf in LEAVES} | OF_COMMANDS
    said: dict[str, set[str]] = {}
    for name, value, kind in product(TABLES[program][0], VALUES, get_args(Kind)):
        desk, _ = tried(program, name, value, kind)
        for entry in desk.left:
            named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", entry.reason)
            said.setdefault(name, set()).update(named)

    assert len(set().union(*said.values())) > 10
    assert {name: wrong for name, named in said.items() if (wrong := named - flags)} == {}


# Layers and options of an imported configuration are those of the base model it is for.


def fits(values: dict[str, object], folder: Path) -> None:
    given = {"images_data_url": "p", **values, "model_url": str(folder)}
    fitted(
        resolve([Layer("import", given, explicit=True)]),
        base_model.locate(ModelConfig(model_url=str(folder))),
    )


@pytest.mark.parametrize("conv", ["", 'network_args = ["conv_dim=4", "conv_alpha=1"]\n'])
def test_a_kohya_network_fits_base_models_with_a_table(
    conv: str, sd15_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    found = import_file(tmp_path, "a.toml", NETWORK + conv)

    fits(dict(found.values), sd15_folder)
    fits(dict(found.values), sdxl_folder)


def test_a_portrait_fits_its_base_model(sdxl_folder: Path, tmp_path: Path) -> None:
    found = import_file(tmp_path, "a.toml", PORTRAIT.format(folder="p"))

    fits(dict(found.values), sdxl_folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'network_module = "networks.lora_flux"\nresolution = 1024\n'),
        (
            "a.yaml",
            "config: {process: [{type: sd_trainer, network: {linear: 4}, train: {lr: 1e-4}, "
            "model: {name_or_path: x, is_flux: true}}]}",
        ),
        ("a.sh", "python train_dreambooth_lora_flux.py --instance_data_dir p"),
        ("a.sh", "python train_dreambooth_flux.py --instance_data_dir p"),
    ],
)
def test_what_is_for_flow_matching_fits_such_a_base_model(
    name: str, text: str, flux_folder: Path, tmp_path: Path
) -> None:
    fits(dict(import_file(tmp_path, name, text).values), flux_folder)


def test_diffusers_scripts_fit_their_base_models(
    sd15_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    for script, folder in (
        ("train_dreambooth.py", sd15_folder),
        ("train_dreambooth_lora.py", sd15_folder),
        ("train_dreambooth_lora_sdxl_advanced.py", sdxl_folder),
    ):
        fits(dict(import_file(tmp_path, "a.sh", f"python {script} --rank 4").values), folder)


def sentences(module: Path) -> set[str]:
    """What a module says in three words or more, outside of texts with values in them."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    filled = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in filled
    }
    return {text for text in texts if len(text.split()) > 2}


def test_a_sentence_has_one_home() -> None:
    homes = Counter(
        sentence
        for module in Path(importers.__file__).parent.glob("*.py")
        for sentence in sentences(module)
    )

    assert len(homes) > 300
    assert [sentence for sentence, count in homes.items() if count > 1] == []
