"""What is installed is what was written: ranges, pins, wheel and sdist, and a training from it.

The wheel is installed here without its requirements: it borrows the test environment's packages.
`scripts/check_wheel` installs them too, in an environment of its own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import site
import stat
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
import read_dist
import read_types
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import TWO_LAYERS

from trainer import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Package to version, from `constraints.txt`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """What the project asks for, with some of its extras."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_the_pins_have_no_local_label_and_no_path() -> None:
    assert pins()["torch"] == "2.13.0"
    assert len(pins()) > 80
    assert not [pin for pin in pins().items() if "+" in pin[1] or "/" in "".join(pin)]


def test_every_requirement_is_pinned_inside_its_range() -> None:
    wanted = requirements("dev", "demo", "lycoris", "page-tests", "server", "ship-tests")

    assert [str(r) for r in wanted if canonicalize_name(r.name) not in pins()] == []
    assert [
        str(r) for r in wanted if not r.specifier.contains(pins()[canonicalize_name(r.name)])
    ] == []


def test_every_imported_package_is_a_requirement() -> None:
    providers = metadata.packages_distributions()
    imported = {
        name.split(".")[0]
        for path in (ROOT / "trainer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imports(node)
    }
    outside = imported - set(sys.stdlib_module_names) - {"trainer"}
    declared = {
        canonicalize_name(r.name) for r in requirements("lycoris", "heic", "restore", "server")
    }

    assert {"torch", "diffusers", "pydantic"} <= outside
    unknown = {
        name
        for name in outside
        if declared.isdisjoint(canonicalize_name(owner) for owner in providers.get(name, [name]))
    }
    assert unknown == set()


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    is_absolute = isinstance(node, ast.ImportFrom) and node.level == 0
    return [str(node.module)] if is_absolute else []


@pytest.mark.parametrize(
    "script",
    [
        *("scripts/demo", "scripts/test", "scripts/check_wheel", "scripts/check_lowest"),
        *("scripts/make_sbom", ".ci/run"),
    ],
)
def test_the_scripts_can_be_run_and_stop_at_the_first_failure(script: str) -> None:
    path = ROOT / script

    assert path.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("flags", [["--output", "x"], ["--rank", "4", "--output=x"]], ids=" ".join)
def test_the_demo_refuses_another_run_folder_before_it_does_anything(flags: list[str]) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts/demo"), *flags], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: the demo's run folder is demo/run; for another, use trainer train\n"
    )


def test_continuous_integration_runs_the_test_script_and_nothing_else() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()

    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["./scripts/test"]


def test_the_launcher_files_are_ones_that_accelerate_reads() -> None:
    paths = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
    processes = {path.stem: ClusterConfig.from_yaml_file(str(path)).num_processes for path in paths}

    assert processes == {
        "eight_gpus": 8,
        "fsdp2": 8,
        "fsdp2_two_nodes": 16,
        "one_gpu": 1,
        "two_nodes": 16,
    }
    assert all(yaml.safe_load(path.read_text())["mixed_precision"] == "no" for path in paths)


# accelerate's own variable for a machine without a GPU; the flags are those for GPUs.
WITHOUT_GPU = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch"]


def processes_of(run: Path) -> int:
    """How many a finished training had, of which one alone writes."""
    lines = (run / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    (begin,) = [event for event in events if event["event"] == "run"]
    told = [event["step"] for event in events if event["event"] == "step"]
    assert told == [1, 2]
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    return int(begin["details"]["processes"])


def small_training(model: Path, photos: Path, run: Path) -> list[str]:
    """The arguments of a training of two steps of two layers."""
    return [
        *["train", "--output", str(run), "--model-url", str(model)],
        *["--images-data-url", str(photos), "--max-train-steps", "2", "--rank", "2"],
        *["--resolution-width", "64", "--resolution-height", "64"],
        *["--target-unet-modules", ",".join(TWO_LAYERS["target_unet_modules"])],
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def the_wheel(built: Path) -> dict[str, bytes]:
    """Names and contents."""
    (wheel,) = built.glob("*.whl")
    return dict(read_dist.wheel_files(wheel))


@pytest.mark.slow
def test_the_wheel_carries_package_configurations_types_and_licences(built: Path) -> None:
    files = the_wheel(built)

    assert list(read_dist.faults_of_wheel(files)) == []
    assert len(files) > 300
    assert {"trainer/py.typed", "trainer/configs/presets/person.yaml"} <= files.keys()
    assert "trainer/server/page/index.html" in files


@pytest.mark.slow
def test_the_sdist_carries_tests_scripts_and_pins(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")

    assert list(read_dist.faults_of_sources(read_dist.source_files(sdist))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tests/test_cli.py", b"", "the wheel has more than the package"),
        ("trainer/.env", b"", "`trainer/.env` is in it"),
        ("trainer/__pycache__/cli.pyc", b"", "`trainer/__pycache__/cli.pyc` is in it"),
        (
            "trainer/cli.py",
            b"TOKEN = 'hf_" + b"a" * 34,
            "`trainer/cli.py` has what looks like a key",
        ),
        ("trainer/cli.py", b"# /home/" + b"anna/photos", "has what looks like a person's folder"),
        ("trainer/big.bin", b"0" * 6_000_000, "bytes, more than"),
    ],
)
def test_a_wheel_with_what_nobody_should_get_is_told(
    built: Path, name: str, content: bytes, said: str
) -> None:
    found = list(read_dist.faults_of_wheel(the_wheel(built) | {name: content}))

    assert any(said in fault for fault in found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer/py.typed", "trainer/configs/base_models.yaml"])
def test_a_wheel_that_lacks_a_file_is_told(built: Path, name: str) -> None:
    files = the_wheel(built)
    del files[name]

    assert list(read_dist.faults_of_wheel(files)) == [f"the wheel lacks `{name}`"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("License-Expression: Apache-2.0", "the metadata have no licence expression"),
        ("License-File: NOTICE", "the metadata do not name the licence files"),
        ("Classifier: Typing :: Typed", "the metadata do not say that there are types"),
    ],
)
def test_metadata_that_lack_a_line_are_told(built: Path, line: str, said: str) -> None:
    files = the_wheel(built)
    (name,) = [name for name in files if name.endswith("/METADATA")]
    assert line.encode() in files[name]

    less = files | {name: files[name].replace(line.encode() + b"\n", b"")}

    assert list(read_dist.faults_of_wheel(less)) == [said]


def test_the_version_stands_in_one_place(built: Path) -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name == f"tok_trainer-{__version__}-py3-none-any.whl"
    assert sdist.name == f"tok_trainer-{__version__}.tar.gz"
    assigned = re.compile(r"^ *_*version_* *(: str)? *= *[\"']\d", re.MULTILINE | re.IGNORECASE)
    places = [*(ROOT / "trainer").rglob("*.py"), ROOT / "pyproject.toml"]
    told = [
        path.relative_to(ROOT).as_posix() for path in places if assigned.search(path.read_text())
    ]
    assert told == ["trainer/__init__.py"]


@pytest.mark.thorough
def test_the_mypy_of_a_stranger_sees_the_types_of_the_installed_wheel(
    built: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    python = _fresh_environment(tmp_path / "fresh", wheel)

    said = read_types.complaints(python)

    assert read_types.unseen(said) == []
    (typed,) = (tmp_path / "fresh").rglob("py.typed")
    typed.unlink()
    assert read_types.unseen(read_types.complaints(python)) != []


@pytest.mark.thorough
def test_accelerate_launches_two_processes_of_the_installed_wheel_of_which_one_writes(
    built: Path, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    python = _fresh_environment(tmp_path / "fresh", wheel)
    command = [
        *[str(python), *LAUNCH, "--config_file", str(ROOT / "configs/accelerate/eight_gpus.yaml")],
        *[
            "--num_processes",
            "2",
            "-m",
            "trainer",
            *small_training(sd15_folder, photo_folder, Path("run")),
            "--json",
        ],
    ]

    origin = subprocess.run(
        [str(python), "-c", "import trainer; print(trainer.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=WITHOUT_GPU
    )

    assert str(tmp_path) in origin
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert processes_of(tmp_path / "run") == 2
    presets = [str(python.with_name("trainer")), "presets", "list", "--json"]
    listed = subprocess.run(presets, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "person" in json.loads(listed.stdout)


@pytest.mark.thorough
def test_accelerate_launches_one_process_by_the_file_for_one_gpu(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = ["--config_file", str(ROOT / "configs/accelerate/one_gpu.yaml"), "-m", "trainer"]
    command = [sys.executable, *LAUNCH, *config]

    done = subprocess.run(
        [*command, *small_training(sd15_folder, photo_folder, Path("run"))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=WITHOUT_GPU | {"PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 0, done.stderr
    assert processes_of(tmp_path / "run") == 1


def _fresh_environment(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel alone; its requirements are this environment's packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "check"], check=True)
    return python
