"""Slurm on this machine for a while: a controller and two nodes of eight GPUs that are not there.

Everything lies in one folder, with a configuration of its own: no Slurm that runs on this machine
is touched, and nothing of it outlives the block. Any user may start it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

NEEDED = (
    "setpriv",
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
)
# Where Debian puts programs that serve, also for users whose path does not have it.
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
NODES = ("node0", "node1")
# A job that was queued again waits as long as a credential of it is valid: 120 seconds otherwise.
CREDENTIAL_SECONDS = 5
CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_seconds}
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=128 Gres=gpu:8"


def lacking() -> list[str]:
    """The programs of Slurm that this machine has not."""
    return [name for name in NEEDED if shutil.which(name, path=PATH) is None]


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Args:
        folder: of its configuration and logs.
        environment: of its commands.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What one of its commands prints."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, folder: Path, *words: str) -> str:
        """Hands a job over by `sbatch`, from a folder; gives its number."""
        return self.run("sbatch", "--parsable", *words, cwd=folder).strip()

    def told(self, job: str) -> dict[str, str]:
        """What the controller says of a job, by the names that `scontrol show job` has."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(
        self, true: Callable[[], bool], *, what: str, log: Path | None = None, seconds: float = 600
    ) -> None:
        """Waits until something is so, and tells what was printed where it never is."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                printed = log.read_text() if log and log.exists() else ""
                raise AssertionError(f"{what} never came about\n{printed}{self.logs()}")
            time.sleep(0.2)

    def wait_for_end(self, job: str, log: Path) -> dict[str, str]:
        """Waits until a job is over, and gives what is said of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.told(job)["JobState"] in over, what=f"end of {job}", log=log)
        return self.told(job)

    def logs(self) -> str:
        """The last lines of its own logs."""
        last = {
            path.name: path.read_text().splitlines()[-15:] for path in self.folder.glob("*.log")
        }
        return "".join(f"\n{name}\n" + "\n".join(lines) for name, lines in last.items())


@contextmanager
def running_cluster(folder: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Slurm until the block ends.

    Args:
        folder: empty; its path is short, as that of a socket must be.
        environment: of jobs, beside what Slurm's commands need.
    """
    # Jobs of others reach munge's socket.
    folder.chmod(0o755)
    configuration = _configure(folder)
    own = {"SLURM_CONF": str(configuration), "PATH": PATH}
    cluster = Cluster(folder, os.environ | own | environment)
    with ExitStack() as stack:
        for command in _programs(folder, configuration):
            stack.enter_context(_running(command, folder))
        cluster.wait_for(lambda: _is_ready(cluster), what="a Slurm that is ready", seconds=60)
        try:
            yield cluster
        finally:
            subprocess.run(
                ["scancel", "--full", f"--user={getpass.getuser()}"],
                env=cluster.environment,
                check=False,
            )
            cluster.wait_for(lambda: not cluster.run("squeue", "--noheader"), what="an empty queue")


def _configure(folder: Path) -> Path:
    host = socket.gethostname().split(".")[0]
    ports = iter(_free_ports(1 + len(NODES)))
    places = {
        "host": host,
        "user": getpass.getuser(),
        "folder": folder,
        "credential_seconds": CREDENTIAL_SECONDS,
        "controller_port": next(ports),
        "nodes": "\n".join(NODE.format(name=name, host=host, port=next(ports)) for name in NODES),
    }
    (folder / "state").mkdir()
    for name in NODES:
        (folder / name).mkdir()
    (folder / "gres.conf").write_text(_gpus(folder))
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**places))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    return configuration


def _gpus(folder: Path) -> str:
    """GPUs are files here; jobs are not told which to use, since there are none."""
    for number in range(8):
        (folder / f"gpu{number}").touch()
    line = f"Name=gpu File={folder}/gpu[0-7] Flags=no_gpu_env"
    return "".join(f"NodeName={name} {line}\n" for name in NODES)


def _programs(folder: Path, configuration: Path) -> Sequence[Sequence[str]]:
    places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    places |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    munge = [f"--{name}={folder / place}" for name, place in places.items()]
    file = ("-f", str(configuration))
    return [
        # It serves this machine alone, from a folder that is not the system's.
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", *file],
        *[["slurmd", "-D", "-N", name, *file] for name in NODES],
    ]


@contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[None]:
    with open(folder / f"{command[0]}.log", "a") as log:
        process = subprocess.Popen(
            # They end with this process, also where it is killed.
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=os.environ | {"PATH": PATH},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(cluster: Cluster) -> bool:
    asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
    told = subprocess.run(
        asked, env=cluster.environment, capture_output=True, text=True, check=False
    )
    return told.stdout.split() == ["idle"] * len(NODES)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [probe.getsockname()[1] for probe in probes]
