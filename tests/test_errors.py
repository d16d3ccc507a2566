"""What users read when something goes wrong, and the exit codes that schedulers act on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer import errors
from trainer.errors import InputError, Problem, TrainerError

# 0 ok, 2 input, 3 non-finite, 4 memory, 5 disk, 6 checkpoint, 7 process, 75 = the
# system's EX_TEMPFAIL, for whatever may simply be started again.
EXIT_CODES = {
    "VerificationError": ("verification", 1),
    "InputError": ("input", 2),
    "NonFiniteError": ("non-finite", 3),
    "OutOfMemoryError": ("memory", 4),
    "DiskError": ("disk", 5),
    "CheckpointError": ("checkpoint", 6),
    "ProcessError": ("process", 7),
    "Interrupted": ("interrupted", 75),
}


@pytest.mark.parametrize("name", EXIT_CODES)
def test_each_kind_has_its_documented_exit_code(name: str) -> None:
    error = getattr(errors, name)
    assert (error.kind, error.exit_code) == EXIT_CODES[name]


def test_no_kind_is_missing_from_the_table() -> None:
    kinds = [kind for kind in TrainerError.__subclasses__() if kind.__module__ == "trainer.errors"]

    assert {kind.__name__ for kind in kinds} == set(EXIT_CODES)


def test_an_error_reads_as_kind_message_and_next_action() -> None:
    error = errors.DiskError("`/out` could not be written: the disk is full", "make room")
    assert str(error) == (
        "error[disk]: `/out` could not be written: the disk is full\n  hint: make room"
    )


def test_an_error_without_a_hint_is_one_line() -> None:
    assert str(errors.NonFiniteError("loss is nan")) == "error[non-finite]: loss is nan"


def test_a_problem_names_its_field_first() -> None:
    assert str(Problem("rank", "got 0; allowed: at least 1")) == (
        "`rank`: got 0; allowed: at least 1"
    )


def test_an_input_error_tells_every_problem_at_once() -> None:
    problems = [Problem("rank", "got 0", "give 32"), Problem("seed", "got -1")]
    error = InputError(problems)
    assert error.problems == tuple(problems)
    assert str(error).splitlines() == [
        "error[input]: `rank`: got 0",
        "  hint: give 32",
        "error[input]: `seed`: got -1",
    ]


def test_errors_need_nothing_but_python() -> None:
    code = "import sys, trainer.errors; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pydantic", "numpy"} & set(done.stdout.split())
