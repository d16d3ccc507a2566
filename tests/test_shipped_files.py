"""Every file below configs/ is used by a test: here stands by which, and that it says so."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# Files, the test that uses them, and the words by which it finds them.
USED = {
    "schema.json": ("tests/test_config.py", '"schema.json"'),
    "base_models.yaml": ("tests/test_known_models.py", "known_models()"),
    "presets/*.yaml": ("tests/test_presets.py", "list_presets()"),
    "prompts/*.yaml": ("tests/test_prompt_library.py", "library_names()"),
    "payloads/*_tiny.yaml": ("tests/dialects/test_contracts.py", "PAYLOADS.glob"),
    "payloads/*.json": ("tests/dialects/test_contracts.py", "PAYLOADS.glob"),
    "accelerate/*.yaml": ("tests/test_packaging.py", '"configs/accelerate").glob("*.yaml")'),
    "deploy/container/entry": ("tests/test_containers.py", "deploy/container/entry"),
    "deploy/kubernetes/*": ("tests/ship/kubernetes_checks.py", "configs/deploy/kubernetes"),
    "deploy/launched": ("tests/test_deploy.py", '"launched"'),
    "deploy/modal/train.py": ("tests/ship/modal_checks.py", "configs/deploy/modal/train.py"),
    "deploy/pods/start": ("tests/test_pods.py", "configs/deploy/pods/start"),
    "deploy/skypilot/spot.yaml": ("tests/ship/skypilot_checks.py", "skypilot/spot.yaml"),
    "deploy/slurm/*.sbatch": ("tests/ship/slurm_checks.py", "configs/deploy/slurm"),
}
FILES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_used_by_one_test(file: str) -> None:
    tests = [test for pattern, test in USED.items() if fnmatch(file, pattern)]
    assert tests, f"no test uses {file}"
    test, words = tests[0]
    assert words in (ROOT / test).read_text(), f"{test} says nothing of {words}"


@pytest.mark.parametrize("pattern", USED)
def test_nothing_is_said_of_files_that_are_not_there(pattern: str) -> None:
    assert any(fnmatch(file, pattern) for file in FILES)
