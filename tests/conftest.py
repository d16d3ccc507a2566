"""Tiny base models and photographs, made once per test session."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Measured step times go to the user's cache folder: tests have one of their own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trainer-tests-")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import copies
import make_tiny_models
import pytest
from PIL import Image
from skimage import data as photographs


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets the option-effect matrix and the checks of reliability run whole."""
    parser.addoption(
        "--every-family",
        action="store_true",
        help="run every row of the option-effect matrix in every model family",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="let the checks of reliability try every case, not a small sample",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only a thorough run tries."""
    if config.getoption("thorough"):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Spares Python's search for cyclic garbage what libraries and tests made while imported.

    A million objects live to the end: to go through them takes 15 of 83 seconds of small trainings.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _spared() -> Iterator[None]:
    """Spares the tests the making of what they made before, and the waiting for the disk.

    The power stays on in this process; what a power cut leaves is tried in others.
    """
    with copies.instead_of_making_again(), patch.object(os, "fsync", lambda descriptor: None):
        yield


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5 base model in diffusers layout."""
    return make_tiny_models.make_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL base model in diffusers layout."""
    return make_tiny_models.make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 [dev] base model in diffusers layout."""
    return make_tiny_models.make_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.2 [klein] base model in diffusers layout."""
    return make_tiny_models.make_flux2(tmp_path_factory.mktemp("models") / "flux2")


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five crops of a real photograph, of several shapes, the first with a caption of its own."""
    folder = tmp_path_factory.mktemp("photos")
    astronaut = Image.fromarray(photographs.astronaut())
    boxes = [
        (0, 0, 512, 512),
        (100, 0, 400, 300),
        (150, 0, 330, 240),
        (60, 0, 500, 320),
        (0, 0, 300, 512),
    ]
    for number, box in enumerate(boxes):
        astronaut.crop(box).save(folder / f"photo_{number}.jpg", quality=92)
    (folder / "photo_0.txt").write_text("a portrait of TOK in a space suit\n")
    return folder
