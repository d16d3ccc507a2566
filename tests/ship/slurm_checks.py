"""The templates of configs/deploy/slurm in a real Slurm, on this machine, without a GPU.

Run by name, `pytest tests/ship/slurm_checks.py`; no ordinary run of pytest collects this. Where
Slurm is not installed all of it fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from running import RunningServer, running_server, wait_for
from slurm_cluster import Cluster, lacking, running_cluster
from tiny import TWO_LAYERS, digests

from trainer.server.backends.slurm import SlurmBackend

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
        path = [str(Path(sys.executable).parent), "/usr/sbin", os.environ["PATH"]]
        patch.setenv("PATH", os.pathsep.join(path))
        with (
            tempfile.TemporaryDirectory(prefix="slurm-") as folder,
            running_cluster(Path(folder), environment) as running,
        ):
            yield running


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
            self.folder,
            *FEW[template],
            *options,
            log,
            str(TEMPLATES / f"{template}.sbatch"),
            *words,
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
def options(sd15_folder: Path, photo_folder: Path) -> dict[str, Any]:
    """Of a tiny training whose only checkpoints are that of an interruption and the last."""
    return {
        **{"model_url": str(sd15_folder), "images_data_url": str(photo_folder), "rank": 4},
        **{"max_train_steps": STEPS, "checkpointing_steps": STEPS, "checkpoints_total_limit": 1},
        **{"resolution_width": 64, "resolution_height": 64, "tensorboard": False},
        **TWO_LAYERS,
    }


@pytest.fixture
def place(cluster: Cluster, options: dict[str, Any], tmp_path: Path) -> Callable[..., Place]:
    """Makes places."""
    return lambda **values: Place(tmp_path, cluster, options | values)


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


def test_a_job_whose_time_is_nearly_up_leaves_a_checkpoint_and_queues_itself_again(
    place: Callable[..., Place], cluster: Cluster
) -> None:
    here = place(max_train_steps=20_000, checkpointing_steps=20_000)

    # Slurm knows minutes, and signals up to one earlier than it is told to.
    job = here.submit("one_gpu", "run", "--time=2", "--signal=TERM@60")
    said = here.log("run")
    cluster.wait_for(lambda: cluster.told(job)["Restarts"] == "1", what="a restart", log=said)
    result = json.loads((here.folder / "run" / "result.json").read_text())
    cluster.wait_for(lambda: "goes on after step" in said.read_text(), what="go on", log=said)
    cluster.run("scancel", job)

    assert here.end(job, "run")["JobState"] == "CANCELLED"
    assert (result["status"], result["exit_code"]) == ("interrupted", 75)
    assert "DUE TO TIME LIMIT" not in said.read_text()


@pytest.mark.parametrize("template", list(FEW))
def test_a_job_that_is_cancelled_leaves_a_checkpoint_and_is_not_queued_again(
    template: str, place: Callable[..., Place], cluster: Cluster
) -> None:
    here = place()
    job = here.submit(template, "run")
    here.wait_for_step("run", 30)

    cluster.run("scancel", job)
    told = here.end(job, "run")

    said = here.log("run").read_text()
    assert (told["JobState"], told["Restarts"]) == ("CANCELLED", "0"), said
    assert json.loads((here.folder / "run" / "result.json").read_text())["exit_code"] == 75, said


def test_a_job_that_loses_a_process_queues_itself_again(
    place: Callable[..., Place], cluster: Cluster
) -> None:
    here = place(rank_timeout=30, checkpointing_steps=40)
    job = here.submit("eight_gpus", "run")
    here.wait_for_step("run", 50)

    os.kill(process_of_rank(1, here.folder / "run"), signal.SIGKILL)
    told = here.end(job, "run")

    said = here.log("run").read_text()
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), said
    assert "goes on after step 40" in said


@pytest.mark.parametrize("template", list(FEW))
def test_a_job_that_is_wrong_fails_and_is_not_queued_again(
    template: str, place: Callable[..., Place]
) -> None:
    here = place(model_url="nowhere/at/all")

    told = here.end(here.submit(template, "run"), "run")

    assert (told["JobState"], told["Restarts"]) == ("FAILED", "0")
    assert told["ExitCode"] == "2:0"
    assert "nowhere/at/all" in here.log("run").read_text()


@pytest.mark.parametrize("template", [None, "one_gpu", "eight_gpus"])
def test_a_job_of_the_server_that_is_interrupted_goes_on_by_way_of_its_queue_to_the_same_bytes(
    template: str | None,
    cluster: Cluster,
    options: dict[str, Any],
    photo_folder: Path,
    tmp_path: Path,
) -> None:
    models = tmp_path / "models.yaml"
    models.write_text(json.dumps({"tiny": {"model_url": options["model_url"]}}))
    environment = cluster.environment | {"TRAINER_BASE_MODELS": str(models)}
    script = ["--sbatch-script", str(TEMPLATES / f"{template}.sbatch")] if template else []
    few = [f"--sbatch-options={' '.join(FEW[template])}"] if template else []
    given = [tmp_path / "data", "--backend", "slurm", *script, *few]
    longer = {"max_train_steps": 2 * STEPS, "checkpointing_steps": 2 * STEPS}
    asked = options | longer | {"model_url": "tiny"}
    del asked["images_data_url"]

    with running_server(*given, environment=environment, graceful=False) as server:
        whole, broken = (trained(server, photo_folder, asked) for _ in range(2))
        runs = {job: server.data / "jobs" / job / "run" for job in (whole, broken)}
        wait_for(lambda: '"step": 30,' in text(runs[broken] / "events.jsonl"), seconds=600)
        SlurmBackend([], environment=cluster.environment).stop(broken, at_once=False)
        # Jobs of Slurm go on without it, and are found again by the next.
        server.process.kill()
    with running_server(*given, environment=environment) as server:
        wait_for(lambda: {state(server, job) for job in runs} == {"done"}, seconds=600)

    said = text(runs[broken].parent / "log.txt")
    assert "goes on after step" in said, said
    assert left(runs[broken]) == left(runs[whole])
    assert processes_of(runs[broken]) == [PROCESSES[template or "one_gpu"]] * 2


def test_a_job_of_the_server_that_waits_is_cancelled_at_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    backend = SlurmBackend([], environment=cluster.environment)
    job = cluster.submit(tmp_path, "--hold", "--job-name=trainer-1f2e", "--wrap=exec sleep 600")

    assert backend.stop("1f2e", at_once=True)

    assert cluster.told(job)["JobState"] == "CANCELLED"


def process_of_rank(rank: int, run: Path) -> int:
    """The process of a training that has this number among its processes."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            own = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, UnicodeDecodeError):
            continue
        if run.name in words and f"RANK={rank}".encode() in own and "-m" in words:
            return int(entry.name)
    raise AssertionError(f"there is no process {rank} of {run}")


def trained(server: RunningServer, photos: Path, options: dict[str, Any]) -> str:
    """Uploads photographs and asks for a training; gives the id of its job."""
    with tempfile.TemporaryDirectory() as folder:
        content = Path(shutil.make_archive(f"{folder}/photos", "zip", photos)).read_bytes()
    headers = {"X-Fal-File-Name": "photos.zip"}
    sent = httpx2.post(f"{server.url}/files/upload", content=content, headers=headers)
    submission = {"archive": sent.json()["access_url"], "options": options}
    answer = httpx2.post(f"{server.url}/trainer/trainings", json=submission)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def state(server: RunningServer, job: str) -> str:
    """Of a job, as the server tells it; asked now and then."""
    time.sleep(0.5)
    return str(httpx2.get(f"{server.url}/trainer/jobs/{job}").json()["state"])


def text(path: Path) -> str:
    """Of a file that may not be there yet."""
    return path.read_text() if path.exists() else ""
