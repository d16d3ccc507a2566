"""A disk that is full, read-only or broken from some write on: exit 5, and no more is lost."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_disk import ERRORS, Fault, FaultyDisk, Kind, Operation, Outcome
from safetensors.torch import load_file
from short_runs import TRACE, checkpoints, command, kind_of_file, photographs, results

DISK = 5
REASONS: dict[Kind, str] = {
    "enospc": "the disk is full",
    "edquot": "the disk quota is used up",
    "erofs": "the file system is read-only",
    "eio": "Input/output error",
}
# What is tried in the small sample: one operation on each of these files.
SAMPLE = ("prepared/.tmp-#.png", "checkpoints/.tmp-#/.tmp-weights")


@dataclass(frozen=True)
class Whole:
    """A training that nothing disturbed.

    Args:
        disk: where it ran.
        arguments: its command, by run folder.
        run: its folder.
        outcome: its operations.
    """

    disk: FaultyDisk
    arguments: Callable[[Path], list[str]]
    run: Path
    outcome: Outcome

    def disturbed(self, folder: Path, fault: Fault | None) -> Outcome:
        """Another one; its cache is that of the first."""
        return self.disk.run(self.arguments(folder), fault, environment=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """The place of the cache folder."""
        return {"XDG_CACHE_HOME": str(self.disk.root / "cache")}

    def ends_the_same(self, folder: Path) -> None:
        """Asserts that the same command ends as if nothing had happened."""
        again = self.disturbed(folder, None)
        assert again.returncode == 0, again.stderr
        assert results(folder) == results(self.run)
        assert checkpoints(folder) == checkpoints(self.run)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path, photo_folder: Path
) -> Iterator[Whole]:
    root = tmp_path_factory.mktemp("disk")
    photos = photographs(tmp_path_factory.mktemp("subject") / "photos", photo_folder)

    def arguments(folder: Path) -> list[str]:
        archives = {"debug_dataset": True, "debug_loss_masks": True}
        return command(sd15_folder, photos, folder, **archives)

    with FaultyDisk(root) as disk:
        first = Whole(disk, arguments, root / "run", Outcome(0, 0, "", "", []))
        # The first fills the cache, so that all others do the same operations.
        assert first.disturbed(root / "first", None).returncode == 0
        outcome = first.disturbed(first.run, None)
        assert outcome.returncode == 0, outcome.stderr
        yield Whole(disk, arguments, first.run, outcome)


def failed_on_the_disk(outcome: Outcome, folder: Path, kind: Kind) -> None:
    """Asserts the exit code, the words, and that no file is half there."""
    assert outcome.returncode == DISK, outcome.stderr
    assert TRACE not in outcome.stderr
    (told,) = [line for line in outcome.stderr.splitlines() if line.startswith("error[")]
    assert told.startswith("error[disk]: ")
    assert str(folder) in told
    assert REASONS[kind] in told
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith(".tmp"):
            load_file(path)


def chosen(whole: Whole, thorough: bool) -> list[Operation]:
    """The operations that are made to fail, of those below the run folder that succeeded."""
    changes = [op for op in whole.outcome.below(whole.run) if not op.error]
    failing = [op for op in changes if op.name not in ("unlink", "rmdir", "chmod")]
    if thorough:
        # Events are alike: of their many lines every fourth.
        log = [op for op in failing if op.path.name == "events.jsonl"]
        return [op for op in failing if op not in log or op in log[::4]]
    names = [(kind_of_file(op.path, whole.run), op) for op in failing if op.name == "write"]
    return [next(op for name, op in names if name.startswith(start)) for start in SAMPLE]


def test_whatever_write_of_a_run_fails_it_ends_with_exit_code_5_and_later_to_the_same_bytes(
    whole: Whole, thorough: bool, figure: Callable[[str], None]
) -> None:
    operations = chosen(whole, thorough)
    for turn, operation in enumerate(operations):
        kind = list(REASONS)[turn % len(REASONS)]
        folder = whole.disk.root / f"failed {turn}"
        place = whole.outcome.below(whole.run).index(operation) + 1
        # Of every other write the first half comes through.
        half = operation.name == "write" and turn % 2 == 1
        outcome = whole.disturbed(folder, Fault(kind, at=place, below=folder, half=half))
        assert any(op.error == ERRORS[kind] for op in outcome.operations), operation
        failed_on_the_disk(outcome, folder, kind)
        # Where nothing can be removed either, what was begun stays under its hidden name.
        before = {n: d for n, d in checkpoints(folder).items() if not n.startswith(".tmp-")}
        assert before.items() <= checkpoints(whole.run).items()
        whole.ends_the_same(folder)
    figure(f"{len(operations)} of {len(operations)} failing writes: exit 5, then equal bytes")


def test_a_result_that_cannot_be_written_is_told_and_delivered_by_the_same_command(
    whole: Whole, figure: Callable[[str], None]
) -> None:
    folder = whole.disk.root / "no result"
    result = folder / ".tmp-result.json"
    outcome = whole.disturbed(folder, Fault("enospc", below=result))
    failed_on_the_disk(outcome, folder, "enospc")
    assert "result.json" in outcome.stderr
    assert not (folder / "result.json").exists()
    whole.ends_the_same(folder)
    figure("exit 5, then equal bytes")


def test_a_cache_folder_that_cannot_be_written_costs_a_run_nothing_but_time(
    whole: Whole, figure: Callable[[str], None]
) -> None:
    folder, cache = whole.disk.root / "no cache", whole.disk.root / "another cache"
    outcome = whole.disk.run(
        whole.arguments(folder),
        Fault("erofs", below=cache),
        environment={"XDG_CACHE_HOME": str(cache)},
    )
    assert outcome.returncode == 0, outcome.stderr
    refused = outcome.below(cache)
    assert refused
    assert results(folder) == results(whole.run)
    figure(f"{len(refused)} writes refused, exit 0, equal bytes")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_can_only_be_read_is_told_before_a_picture_or_a_model_is(
    is_there: bool, whole: Whole, figure: Callable[[str], None]
) -> None:
    folder = whole.disk.root / f"read-only {is_there}"
    if is_there:
        folder.mkdir()
    outcome = whole.disturbed(folder, Fault("erofs", below=folder))
    failed_on_the_disk(outcome, folder, "erofs")
    assert "prepare" not in outcome.stderr
    assert "encode" not in outcome.stderr
    figure(f"exit 5, folder {'there' if is_there else 'to be made'}")


def test_a_limit_of_file_sizes_is_told_as_such(whole: Whole, figure: Callable[[str], None]) -> None:
    folder = whole.disk.root / "limited"
    running = whole.disk.start(whole.arguments(folder), environment=whole.environment)
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (8192, 8192))
    outcome = running.wait()
    assert outcome.returncode == DISK, outcome.stderr
    assert TRACE not in outcome.stderr
    assert "the file size limit is reached" in outcome.stderr
    assert json.loads((folder / "result.json").read_bytes())["error_kind"] == "disk"
    whole.ends_the_same(folder)
    figure("8 KiB a file: exit 5, then equal bytes")
