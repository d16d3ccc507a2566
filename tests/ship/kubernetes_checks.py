"""The Jobs of configs/deploy/kubernetes, put together by kubectl, against Kubernetes' own schemas.

Run by name, `pytest tests/ship/kubernetes_checks.py`, with the extra `ship-tests`; no ordinary run
of pytest collects this. It asks no cluster. Where kubectl is missing all of it fails.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "configs/deploy/kubernetes"
VARIANTS = ("job", "kueue", "eight_gpus")
# From the first that knows podReplacementPolicy by default.
VERSIONS = ("1.29", "1.31", "1.34", kubernetes_validate.latest_version())


@pytest.fixture(scope="session")
def variants() -> dict[str, dict[str, Any]]:
    """Each Job, as kubectl puts it together."""
    if shutil.which("kubectl") is None:
        pytest.fail("kubectl missing: https://kubernetes.io/docs/tasks/tools/")

    def made(name: str) -> Any:
        command = ["kubectl", "kustomize", str(FOLDER / name)]
        return yaml.safe_load(subprocess.run(command, capture_output=True, check=True).stdout)

    return {name: made(name) for name in VARIANTS}


def test_every_folder_is_checked(variants: dict[str, dict[str, Any]]) -> None:
    assert {path.parent.name for path in FOLDER.rglob("kustomization.yaml")} == set(variants)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_job_is_one_that_kubernetes_takes(
    name: str, version: str, variants: dict[str, dict[str, Any]]
) -> None:
    kubernetes_validate.validate(variants[name], version, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(podReplacmentPolicy="Failed"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("operator"),
        lambda job: job["spec"]["template"]["spec"]["containers"][0].pop("name"),
    ],
    ids=["a typo", "a rule without its operator", "a container without a name"],
)
def test_the_schema_sees_what_is_wrong(
    spoil: Callable[[dict[str, Any]], object], variants: dict[str, dict[str, Any]]
) -> None:
    job = copy.deepcopy(variants["job"])
    spoil(job)

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


def test_a_queue_of_kueue_is_the_only_difference_of_the_job_in_it(
    variants: dict[str, dict[str, Any]],
) -> None:
    queued = copy.deepcopy(variants["kueue"])

    # By Kueue's page "Run A Kubernetes Job": the label names the LocalQueue.
    assert queued["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name")
    assert queued["spec"].pop("suspend") is True
    assert queued == variants["job"]


def test_eight_gpus_train_by_the_launcher_under_the_same_rules(
    variants: dict[str, dict[str, Any]],
) -> None:
    job, eight = variants["job"]["spec"], variants["eight_gpus"]["spec"]

    assert eight["podFailurePolicy"] == job["podFailurePolicy"]
    (container,) = eight["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    # tests/test_deploy.py runs this line.
    _, _, line, _, *training = container["args"]
    assert training == job["template"]["spec"]["containers"][0]["args"]
    assert "deploy/launched" in line
