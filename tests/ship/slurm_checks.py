"""The templates of configs/deploy/slurm in a real Slurm, on this machine, without a GPU.

Run by name, `pytest tests/ship/slurm_checks.py`; no ordinary run of pytest collects this. Where
Slurm is not installed all of it fails.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import RunningServer, running_server, wait_for
from slurm_cluster import Cluster, lacking, running_cluster
from tiny import TWO_LAYERS, digests

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "configs/deploy/slurm"
# In place of GPUs, of which there are none: as many processes of the processor.
FEW = {
    "one_gpu": [],
    "eight_gpus": ["--gpus-per-node=2"],
    "two_nodes": ["--gpus-per-node=1"],
}
PROCESSES = {"one_gpu": 1, "eight_gpus": 2, "two_nodes": 2}
STEPS = 150


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm, in whose jobs this checkout is the installed one."""
    missing = lacking()
    if missing:
        names = ", ".join(missing)
        pytest.fail(f"{names} missing; on Debian and Ubuntu: apt-get install slurm-wlm munge")
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        # Several machines of one network: here the loopback.
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with pytest.MonkeyPatch.context() as patch:
        # As in an activated environment; the path of a socket has 107 characters at most.
        path = f"{Path(sys.executable).parent}:/usr/sbin:{environment_path()}"
        patch.setenv("PATH", path)
        with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
            with running_cluster(Path(folder), environment) as running:
                yield running


def environment_path() -> str:
    import os

    return os.environ["PATH"]


class Place:
    """A folder in which jobs are submitted, with a configuration of a tiny training.

    Args:
        folder: empty.
        cluster: that takes them.
        values: the options.
    """

    def __init__(self, folder: Path, cluster: Cluster, values: dict[str, Any]) -> None:
        self.folder = folder
        self._cluster = cluster
        (folder / "photos.yaml").write_text(json.dumps(values))

    def submit(self, template: str, run: str, *options: str) -> str:
        """Submits the training into a run folder, as the head of the template tells."""
        words = [sys.executable, "-m", "trainer", "train", "photos.yaml", "--output", run]
        log = f"--output={self.folder / run}.log"
        return self._cluster.submit(
            self.folder, *FEW[template], *options, log, str(TEMPLATES / f"{template}.sbatch"), *words
        )

    def log(self, run: str) -> Path:
        return self.folder / f"{run}.log"

    def wait_for_step(self, run: str, step: int) -> None:
        """Waits until the event log has a step."""
        events = self.folder / run / "events.jsonl"
        self._cluster.wait_for(
            lambda: events.exists() and f'"step": {step},' in events.read_text(),
            what=f"step {step}",
            log=self.log(run),
        )

    def end(self, job: str, run: str) -> dict[str, str]:
        return self._cluster.wait_for_end(job, self.log(run))


@pytest.fixture
def place(
    cluster: Cluster, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> Callable[..., Place]:
    """Makes places."""

    def make(**values: Any) -> Place:
        given = {
            **{"model_url": str(sd15_folder), "images_data_url": str(photo_folder)},
            **{"max_train_steps": STEPS, "checkpointing_steps": 40, "rank": 4},
            **{"resolution_width": 64, "resolution_height": 64, "tensorboard": False},
            **TWO_LAYERS,
            **values,
        }
        return Place(tmp_path, cluster, given)

    return make


def left(run: Path) -> dict[str, Any]:
    """What two runs of one training have in common, to the byte."""
    result = json.loads((run / "result.json").read_text())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {
        "ended": (result["status"], result["exit_code"]),
        "outputs": digests(run / "outputs"),
        "checkpoints": digests(run / "checkpoints"),
        "losses": [(e["step"], e["loss"]) for e in events if e["event"] == "step"],
    }


def processes_of(run: Path) -> list[int]:
    """The number of processes of each start."""
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["details"]["processes"] for event in events if event["event"] == "run"]


@pytest.mark.parametrize("template", list(FEW))
def test_a_job_that_is_queued_again_goes_on_to_the_bytes_of_one_that_nothing_happened_to(
    template: str, place: Callable[..., Place], cluster: Cluster
) -> None:
    here = place()
    whole = here.submit(template, "whole")
    assert here.end(whole, "whole")["JobState"] == "COMPLETED", here.log("whole").read_text()

    job = here.submit(template, "broken")
    here.wait_for_step("broken", 30)
    cluster.run("scontrol", "requeue", job)
    told = here.end(job, "broken")

    said = here.log("broken").read_text()
    assert told["JobState"] == "COMPLETED", said
    assert told["Restarts"] == "1"
    assert "goes on after step" in said
    assert processes_of(here.folder / "broken") == [PROCESSES[template]] * 2
    assert left(here.folder / "broken") == left(here.folder / "whole")
