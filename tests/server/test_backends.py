"""Engines that trainings are handed over to: Slurm by its commands, and any other by templates."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.server.backends import BackendError, Handover, Standing
from trainer.server.backends.command import CommandBackend, Templates
from trainer.server.backends.slurm import SlurmBackend
from trainer.server.slots import job_environment

JOB = "1f2e"
# Stand-ins for Slurm's commands: each notes its words; what it prints lies in a file.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@" >>"$FAKE_SLURM/said"
cat "$FAKE_SLURM/$(basename "$0")" 2>/dev/null
exit "$(cat "$FAKE_SLURM/$(basename "$0").exit" 2>/dev/null || echo 0)"
"""


class FakeSlurm:
    """Slurm's commands on a path of their own, and what was said to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("sbatch", "squeue", "sacct", "scancel"):
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(STAND_IN)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "FAKE_SLURM": str(folder)}
        self.backend = SlurmBackend(["--gpus=2"], environment=self.environment)

    def prints(self, name: str, text: str, exit_code: int = 0) -> None:
        (self.folder / name).write_text(text)
        (self.folder / f"{name}.exit").write_text(str(exit_code))

    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    # The program is looked for on the path of this process.
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return fake


def handover(folder: Path) -> Handover:
    return Handover(JOB, folder, ["trainer", "train", "a config.yaml"])


def test_slurm_is_given_the_training_under_the_name_of_its_job(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    assert slurm.backend.start(handover(tmp_path))

    said = slurm.said()[slurm.said().index("sbatch") :]
    assert f"--job-name=trainer-{JOB}" in said
    assert "--gpus=2" in said
    assert "--wrap=exec trainer train 'a config.yaml'" in said
    assert "--no-requeue" in said


def test_a_script_of_slurm_is_given_the_words_of_the_training(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    script = tmp_path / "a script"
    backend = SlurmBackend([], script=script, environment=slurm.environment)

    assert backend.start(handover(tmp_path))

    assert slurm.said()[-4:] == [str(script), "trainer", "train", "a config.yaml"]


def test_jobs_find_the_programs_beside_the_server_s_python() -> None:
    assert job_environment()["PATH"].startswith(str(Path(sys.executable).parent) + os.pathsep)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", "waiting"),
        ("CONFIGURING", "waiting"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("SUSPENDED", "running"),
    ],
)
def test_slurm_tells_where_a_job_stands(slurm: FakeSlurm, state: str, expected: str) -> None:
    slurm.prints("squeue", f"{state}\n")

    assert slurm.backend.standing(JOB).state == expected


def test_a_job_that_slurm_has_already_is_not_submitted_again(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.prints("squeue", "PENDING\n")

    assert slurm.backend.start(handover(tmp_path))

    assert "sbatch" not in slurm.said()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("COMPLETED|0:0\n", 0),
        ("FAILED|75:0\n", 75),
        ("FAILED|2:0\n", 2),
        ("PREEMPTED|0:15\n", 75),
        ("NODE_FAIL|1:0\n", 75),
        ("CANCELLED by 1000|0:15\n", 143),
        ("FAILED|0:9\n", 137),
        ("", None),
    ],
)
def test_slurm_tells_how_a_job_ended(slurm: FakeSlurm, line: str, code: int | None) -> None:
    slurm.prints("squeue", "")
    slurm.prints("sacct", line)

    assert slurm.backend.standing(JOB) == Standing("gone", code)


def test_a_controller_that_does_not_answer_ends_no_job(slurm: FakeSlurm) -> None:
    slurm.prints("squeue", "", exit_code=1)

    assert slurm.backend.standing(JOB).state == "running"


def test_slurm_without_accounting_has_jobs_all_the_same(slurm: FakeSlurm) -> None:
    slurm.prints("squeue", "")
    slurm.prints("sacct", "", exit_code=1)

    assert slurm.backend.standing(JOB) == Standing("gone")


def test_what_slurm_refuses_is_told_with_its_reason(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.prints("sbatch", "", exit_code=1)

    with pytest.raises(BackendError, match="sbatch refuses"):
        slurm.backend.start(handover(tmp_path))


def test_slurm_stops_a_job_whether_it_has_steps_or_is_one_program(slurm: FakeSlurm) -> None:
    slurm.backend.stop(JOB, at_once=False)

    name = f"--name=trainer-{JOB}"
    shell = ["scancel", "--signal=TERM", "--batch", name]
    assert slurm.said() == [*shell, "scancel", "--signal=TERM", name]


def test_slurm_ends_a_job_at_once(slurm: FakeSlurm) -> None:
    slurm.backend.stop(JOB, at_once=True)

    assert slurm.said() == ["scancel", f"--name=trainer-{JOB}"]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_controller_that_does_not_answer_has_told_no_job_to_stop(
    slurm: FakeSlurm, at_once: bool
) -> None:
    assert slurm.backend.stop(JOB, at_once=at_once)

    slurm.prints("scancel", "", exit_code=1)

    assert not slurm.backend.stop(JOB, at_once=at_once)


def test_what_srun_started_is_told_only_where_the_shell_was(slurm: FakeSlurm) -> None:
    slurm.prints("scancel", "", exit_code=1)

    assert not slurm.backend.stop(JOB, at_once=False)

    assert slurm.said().count("scancel") == 1


def test_a_shell_that_was_told_is_not_told_again_for_want_of_an_answer_about_the_rest(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = slurm.backend._run, []

    def silent_at_second(*command: str) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if len(asked) == 2:
            raise BackendError("`scancel` does not end within 30 seconds")
        return ask(*command)

    monkeypatch.setattr(slurm.backend, "_run", silent_at_second)

    assert slurm.backend.stop(JOB, at_once=False)
    assert len(asked) == 2


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BackendError, match="no command `squeue`"):
        SlurmBackend([]).start(handover(tmp_path))


def commands(folder: Path) -> CommandBackend:
    """An engine that is a folder: a job is a file whose first line is its state."""
    return CommandBackend(
        Templates(
            submit=f"sh -c 'echo waiting >{folder}/$1; shift; echo \"$@\" >{folder}/said' - "
            "{id} {folder} {command}",
            state=f"sh -c 'cat {folder}/$1 2>/dev/null || echo unknown' - {{id}}",
            stop=f"sh -c 'echo gone 75 >{folder}/$1' - {{id}}",
        )
    )


def test_commands_are_given_all_words_of_the_training(tmp_path: Path) -> None:
    backend = commands(tmp_path)
    assert backend.standing(JOB) == Standing("unknown")

    assert backend.start(handover(tmp_path))

    assert (tmp_path / "said").read_text() == f"{tmp_path} trainer train a config.yaml\n"
    assert backend.standing(JOB) == Standing("waiting")


def test_commands_find_a_job_again_by_its_id(tmp_path: Path) -> None:
    commands(tmp_path).start(handover(tmp_path))
    (tmp_path / JOB).write_text("running")

    assert commands(tmp_path).standing(JOB) == Standing("running")


def test_a_stop_command_ends_a_job(tmp_path: Path) -> None:
    backend = commands(tmp_path)
    backend.start(handover(tmp_path))

    assert backend.stop(JOB, at_once=False)

    assert backend.standing(JOB) == Standing("gone", 75)


def test_a_stop_command_that_fails_has_told_nothing(tmp_path: Path) -> None:
    templates = Templates("true", "echo running", "sh -c 'exit 3'")

    assert not CommandBackend(templates).stop(JOB, at_once=False)


@pytest.mark.parametrize("said", ["", "nonsense", "Traceback"])
def test_a_state_command_that_says_nothing_ends_no_job(tmp_path: Path, said: str) -> None:
    (tmp_path / JOB).write_text(said)

    assert commands(tmp_path).standing(JOB) == Standing("running")


def test_a_submit_command_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    templates = Templates("sh -c 'echo no room >&2; exit 3'", "echo unknown", "true")

    with pytest.raises(BackendError, match=r"refuses the job \(3\): no room"):
        CommandBackend(templates).start(handover(tmp_path))
