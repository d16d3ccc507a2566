"""The task of configs/deploy/skypilot as SkyPilot reads it, without an account.

Run by name, `SKYPILOT_PYTHON=folder/bin/python pytest tests/ship/skypilot_checks.py`, with a Python
that has SkyPilot: with all it needs that is half a gigabyte, so it is in none of this project's
extras. Where it is not named all of it fails.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

TASK = Path(__file__).parents[2] / "configs/deploy/skypilot/spot.yaml"
# Reads the task from its input, and tells what SkyPilot has understood. A bucket is looked up where
# it is: its part is held against the schema alone.
READER = """
import inspect, json, sys
import sky
from sky.jobs.recovery_strategy import StrategyExecutor
from sky.utils import common_utils, schemas
task = json.load(sys.stdin)
common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
buckets = task.pop("file_mounts")
for bucket in buckets.values():
    common_utils.validate_schema(bucket, schemas.get_storage_schema(), "bucket: ")
read = list(sky.Task.from_yaml_config(task).resources)
known = {"strategy", *inspect.signature(StrategyExecutor.__init__).parameters}
recovery = [one.job_recovery for one in read]
print(json.dumps({
    "version": sky.__version__,
    "spot": [one.use_spot for one in read],
    "accelerators": sorted(next(iter(one.accelerators)) for one in read),
    "recovery": recovery,
    "unknown": sorted({name for one in recovery for name in one} - known),
}))
"""


def read(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Has SkyPilot read a task, with a home of its own."""
    python = os.environ.get("SKYPILOT_PYTHON")
    if python is None:
        pytest.fail(
            "SKYPILOT_PYTHON names no Python with SkyPilot; for one: "
            "python -m venv sky && sky/bin/pip install skypilot==0.14.1"
        )
    return subprocess.run(
        [python, "-c", READER],
        input=json.dumps(yaml.safe_load(text)),
        env=os.environ | {"HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_skypilot_reads_the_task_as_it_is_meant(tmp_path: Path) -> None:
    done = read(TASK.read_text(), tmp_path)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["accelerators"] == ["A100-80GB", "H100", "L40S"]
    assert told["spot"] == [True, True, True]
    assert {tuple(one["recover_on_exit_codes"]) for one in told["recovery"]} == {(75,)}
    # Its schema lets a typo there pass.
    assert told["unknown"] == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("use_spot", "use_spots"), ("MOUNT_CACHED", "CACHED"), ("setup:", "set:")]
)
def test_skypilot_sees_what_is_wrong(right: str, wrong: str, tmp_path: Path) -> None:
    done = read(TASK.read_text().replace(right, wrong), tmp_path)

    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sky.exceptions.InvalidSkyPilotConfigError: ")
    assert f"'{wrong.rstrip(':')}'" in last


def test_a_typo_that_the_schema_lets_pass_is_seen(tmp_path: Path) -> None:
    done = read(TASK.read_text().replace("recover_on_exit_codes", "recover_exit_codes"), tmp_path)

    assert json.loads(done.stdout.splitlines()[-1])["unknown"] == ["recover_exit_codes"]
