"""The file in which a command leaves its exit code, for who started it behind a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import InputError, Interrupted
from trainer.launchers import EXIT_CODE_FILE, end_at_once, leave_exit_code

ROOT = Path(__file__).parent.parent
REFUSED, INTERRUPTED = InputError.exit_code, Interrupted.exit_code


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, as `launched` makes it."""
    file = tmp_path / "told"
    file.write_text("\n")
    monkeypatch.setenv(EXIT_CODE_FILE, str(file))
    monkeypatch.delenv("RANK", raising=False)
    return file


def ended(*command: str, **variables: str) -> int:
    """The exit code of Python with these arguments."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        timeout=60,
        check=False,
    ).returncode


@pytest.mark.parametrize("code", [0, INTERRUPTED, 130])
@pytest.mark.parametrize("before", ["\n", "", "1000000\n"])
def test_the_main_process_leaves_its_exit_code(told: Path, code: int, before: str) -> None:
    told.write_text(before)

    leave_exit_code(code)

    assert told.read_text() == f"{code} 0\n"


@pytest.mark.parametrize(("code", "left"), [(INTERRUPTED, "\n"), (REFUSED, f"{REFUSED} 0\n")])
def test_of_the_other_processes_only_a_refusal_is_known(
    told: Path, monkeypatch: pytest.MonkeyPatch, code: int, left: str
) -> None:
    monkeypatch.setenv("RANK", "1")

    leave_exit_code(code)

    assert told.read_text() == left


def test_what_a_launcher_does_after_a_refusal_does_not_hide_it(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    leave_exit_code(REFUSED)
    monkeypatch.setenv("RANK", "0")

    leave_exit_code(INTERRUPTED)

    assert told.read_text() == f"{REFUSED} 0\n"


def test_what_was_refused_before_all_began_again_does_not_stand(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_exit_code(REFUSED)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

    leave_exit_code(INTERRUPTED)

    assert told.read_text() == f"{INTERRUPTED} 1\n"


def test_a_file_that_is_another_machines_is_not_made_here(told: Path) -> None:
    told.unlink()

    leave_exit_code(INTERRUPTED)

    assert not told.exists()


def test_without_the_variable_nothing_is_left(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXIT_CODE_FILE)

    leave_exit_code(INTERRUPTED)

    assert told.read_text() == "\n"


def test_a_full_disk_has_room_for_the_exit_code(told: Path) -> None:
    # Stands for it: no file may grow beyond its line.
    limited = f"""
import resource, signal
from trainer.launchers import leave_exit_code
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
leave_exit_code({REFUSED})
"""
    ended("-c", limited)

    assert told.read_text() == f"{REFUSED} 0\n"


def test_a_process_that_ends_where_it_stands_leaves_its_exit_code(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launchers.os._exit", sys.exit)

    with pytest.raises(SystemExit) as end:
        end_at_once(7)

    assert (end.value.code, told.read_text()) == (7, "7 0\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["version"], 0),
        (["train", "--rank", "0"], REFUSED),
        (["train", "--no-such-option"], REFUSED),
        (["train", "nowhere.yaml"], REFUSED),
    ],
)
def test_a_command_leaves_what_it_ends_with(told: Path, words: list[str], code: int) -> None:
    assert ended("-m", "trainer", *words) == code

    assert told.read_text() == f"{code} 0\n"


# A bug, and Ctrl-C in a command that has nothing to keep.
FAULTY = """
import sys
from trainer import cli
def fail(*_, **__):
    raise {error}
cli.cli.main = fail
sys.argv = ["trainer", "version"]
cli.main()
"""


@pytest.mark.parametrize(("error", "code"), [("RuntimeError", 1), ("cli.click.Abort", 130)])
def test_whatever_ends_a_command_its_exit_code_is_left(told: Path, error: str, code: int) -> None:
    assert ended("-c", FAULTY.format(error=error)) == code

    assert told.read_text() == f"{code} 0\n"
