"""The program of configs/deploy/modal with Modal's own package, without an account.

Run by name, `MODAL_PYTHON=folder/bin/python pytest tests/ship/modal_checks.py`, with a Python that
has Modal. Where it is not named all of it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import wait_for

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "configs/deploy/modal/train.py"
# Calls the function as Modal's container does, with a folder in the place of the volume.
CALLER = """
import json, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
# As in Modal's container, also where whoever runs these checks in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import train
committed = []
train.data = type("Volume", (), {"commit": lambda self: committed.append(True)})()
train.DATA = pathlib.Path.cwd()
told = {}
try:
    told["returned"] = train.train.local("photos.yaml", "runs/portrait", int(sys.argv[2]))
except (RuntimeError, KeyboardInterrupt) as error:
    told["raised"] = type(error).__name__
print(json.dumps(told | {"committed": len(committed)}))
"""
# Stands for the training: notes its words, and ends by its code at once or when it is told to.
TRAINER = """#!{python}
import json, os, pathlib, signal, sys
pathlib.Path("words").write_text(" ".join(sys.argv[1:]))
def leave(*_):
    end(75)
def end(code):
    new = pathlib.Path("runs/portrait/new")
    new.parent.mkdir(parents=True, exist_ok=True)
    new.write_text(json.dumps({{"exit_code": code}}))
    new.rename(new.with_name("result.json"))
    sys.exit(code)
signal.signal(signal.SIGTERM, leave)
pathlib.Path("begun").touch()
signal.pause() if os.environ["CODE"] == "waits" else end(int(os.environ["CODE"]))
"""


def modal_python() -> str:
    """A Python that has Modal."""
    python = os.environ.get("MODAL_PYTHON")
    if python is None:
        pytest.fail(
            "MODAL_PYTHON names no Python with Modal; for one: "
            "python -m venv modal && modal/bin/pip install modal==1.6.4"
        )
    return python


def called(folder: Path, code: str, gpus: int = 1) -> subprocess.Popen[str]:
    """Modal's container at work in a folder, with a training that ends by this code."""
    programs = folder / "programs"
    programs.mkdir()
    trainer = programs / "trainer"
    trainer.write_text(TRAINER.format(python=sys.executable))
    trainer.chmod(0o755)
    # Stands for the launcher: takes its own words away, and makes 1 of every failure.
    torchrun = programs / "torchrun"
    torchrun.write_text('#!/bin/bash\nwhile [ "$1" != trainer ]; do shift; done\n"$@" || exit 1\n')
    torchrun.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [modal_python(), "-c", CALLER, str(PROGRAM.parent), str(gpus)],
        cwd=folder,
        env=os.environ
        | {"PATH": path, "CODE": code, "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def told_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=60)
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told


@pytest.mark.parametrize("code", [0, 2, 3, 4, 6])
def test_a_training_that_is_over_is_not_begun_again(code: int, tmp_path: Path) -> None:
    told = told_by(called(tmp_path, str(code)))
    assert told == {"returned": code, "committed": 1}
    words = (tmp_path / "words").read_text()
    assert words == f"train {tmp_path}/photos.yaml --output {tmp_path}/runs/portrait"


@pytest.mark.parametrize("code", [1, 5, 7, 75])
def test_any_other_end_is_an_error_for_which_modal_begins_again(code: int, tmp_path: Path) -> None:
    assert told_by(called(tmp_path, str(code))) == {"raised": "RuntimeError", "committed": 1}


def test_a_gpu_that_is_taken_away_leaves_time_for_the_checkpoint(tmp_path: Path) -> None:
    process = called(tmp_path, "waits")
    wait_for((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    assert told_by(process) == {"raised": "KeyboardInterrupt", "committed": 1}


def test_several_gpus_are_launched_and_the_code_is_the_trainings(tmp_path: Path) -> None:
    told = told_by(called(tmp_path, "3", gpus=8))
    assert told == {"returned": 3, "committed": 1}
    assert (tmp_path / "words").read_text().startswith("train ")


# Calls the program's command as Modal's own does, and says what it would have run.
STARTER = """
import sys
sys.path.insert(0, sys.argv[1])
import train
class Asked:
    def with_options(self, **options):
        print(options)
        return self
    def remote(self, *words):
        print(words)
        return 6
train.train = Asked()
train.main.info.raw_f("photos.yaml", "runs/portrait", *sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("given", "gpu", "gpus"), [((), "L40S", 1), (("H100",), "H100", 1), (("H100:8",), "H100:8", 8)]
)
def test_a_call_names_its_gpus_and_ends_by_the_trainings_code(
    given: tuple[str, ...], gpu: str, gpus: int
) -> None:
    done = subprocess.run(
        [modal_python(), "-c", STARTER, str(PROGRAM.parent), *given],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    options, words = done.stdout.splitlines()
    assert options == str({"gpu": gpu})
    assert words == str(("photos.yaml", "runs/portrait", gpus))


def test_what_goes_into_the_image_is_enough_for_the_package(tmp_path: Path) -> None:
    listed = "import sys; sys.path.insert(0, sys.argv[1]); import train; print(*train.PARTS)"
    parts = subprocess.run(
        [modal_python(), "-c", listed, str(PROGRAM.parent)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()
    for part in parts:
        shutil.copy(ROOT / part, tmp_path)
    for part in ("configs", "trainer"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", str(tmp_path)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    assert list((tmp_path / "dist").glob("tok_trainer-*.whl"))
