"""The report from outside: written at the end of a training, and by `trainer report`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import snapshots
from tiny import TWO_LAYERS, configuration, never

from trainer import cli, engine
from trainer.config import TrainingConfig
from trainer.errors import NonFiniteError, OutOfMemoryError
from trainer.events import Event, RunEvent, StepEvent
from trainer.job import Result, RunFolder
from trainer.listeners import EventLog
from trainer.runner import Events, supervise

BEGIN = RunEvent(0, 3, 1, 5, {})
STEP = StepEvent(1, 0, 0.5, 1e-4, 1.0, 0.1, 0.5)


def saying(
    *events: Event, do: Callable[[RunFolder], object] = lambda _: None
) -> Callable[..., Events]:
    """An engine that says these events and then does something to its folder."""

    def engine_of_events(_: TrainingConfig, folder: RunFolder, __: object) -> Events:
        yield from events
        do(folder)

    return engine_of_events


def run(folder: RunFolder, engine_of_events: Callable[..., Events]) -> Result:
    logs = [EventLog(folder)]
    return supervise(TrainingConfig(), folder, logs, engine=engine_of_events, stop=never)


def test_a_report_is_there_before_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    seen: list[bool] = []
    write = RunFolder.write_result

    def looking(self: RunFolder, result: Result) -> None:
        seen.append(self.report.exists())
        write(self, result)

    monkeypatch.setattr(RunFolder, "write_result", looking)

    run(folder, saying(BEGIN, STEP))

    assert seen == [True]
    assert "Done" in folder.report.read_text()


def test_a_run_that_failed_gets_its_report_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def failing(*_: object) -> Iterator[Event]:
        yield BEGIN
        yield STEP
        raise NonFiniteError("the loss is NaN", "lower the learning_rate")

    run(folder, failing)

    assert "the loss is NaN" in folder.report.read_text()


def test_a_run_that_never_began_gets_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def refused(*_: object) -> Iterator[Event]:
        raise OutOfMemoryError("x")
        yield

    run(folder, refused)

    assert folder.result.exists()
    assert not folder.report.exists()


def test_a_run_that_begins_removes_the_earlier_report(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run(folder, saying(BEGIN, STEP))
    found: list[bool] = []

    run(folder, saying(BEGIN, do=lambda each: found.append(each.report.exists())))

    assert found == [False]


def pictures_of_another_form(folder: RunFolder) -> None:
    folder.pictures.mkdir()
    (folder.pictures / "pictures.json").write_text('{"pictures": [1]}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: folder.report.mkdir(), "could not be written"),
        (lambda folder: folder.config.write_text("- a list"), "option names"),
        (pictures_of_another_form, "KeyError"),
    ],
    ids=["folder in its place", "damaged configuration", "damaged pictures"],
)
def test_a_report_that_cannot_be_written_is_a_warning_and_the_run_ends_as_it_did(
    damage: Callable[[RunFolder], object],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = RunFolder(tmp_path / "run")

    result = run(folder, saying(BEGIN, STEP, do=damage))

    assert result.status == "done"
    assert folder.read_result() == result
    told = capsys.readouterr().err
    assert told.startswith("warning: `report.html`: the report was not written: ")
    assert reason in told


def test_a_bug_in_the_report_does_not_keep_the_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bug(Exception):
        pass

    def buggy(*_: object) -> None:
        raise Bug

    monkeypatch.setattr("trainer.report.page.write_report", buggy)
    folder = RunFolder(tmp_path / "run")

    with pytest.raises(Bug):
        run(folder, saying(BEGIN, STEP))

    assert folder.read_result() is not None


def test_only_the_main_process_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    monkeypatch.setenv("RANK", "1")

    run(folder, saying(BEGIN, STEP))

    assert not folder.report.exists()


def test_the_command_needs_the_folder_of_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", str(tmp_path / "nothing")]) == 2

    assert "is not the folder of a training that began" in capsys.readouterr().err


@pytest.fixture(scope="module")
def interrupted(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny training that was stopped before its last step."""
    root = tmp_path_factory.mktemp("reporting") / "run"
    config = configuration(sd15_folder, photo_folder, max_train_steps=2, **TWO_LAYERS)
    folder = RunFolder(root)

    def stop() -> bool:
        return folder.events.exists() and b'"event": "step"' in folder.events.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        snapshots.skip_reading_back(patch)
        result = supervise(config, folder, [EventLog(folder)], engine=engine.run, stop=stop)
    assert result.status == "interrupted", result.error
    return root


def test_a_real_training_is_told_with_its_photographs_and_goes_on_as_its_report_says(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (interrupted / "report.html").read_text()
    command = ["train", str(interrupted / "config.yaml"), "--output", str(interrupted)]
    assert f"trainer {' '.join(command)}" in page
    assert "Contact sheet, page 1 of 1" in page
    snapshots.skip_reading_back(monkeypatch)

    code = cli.run(command)

    assert code == 0
    assert f"Open this report: {interrupted / 'report.html'}" in capsys.readouterr().out
    assert "How to load the files" in (interrupted / "report.html").read_text()


def test_the_command_writes_the_report_anew_and_prints_where(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = interrupted / "report.html"
    report.unlink()

    assert cli.run(["report", str(interrupted)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert report.exists()

    assert cli.run(["report", str(interrupted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(report)}
