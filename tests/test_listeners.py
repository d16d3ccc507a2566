"""What watches a training hears everything, and shows it where people look."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config import OutputConfig, RunConfig, TrainingConfig
from trainer.errors import InputError
from trainer.events import (
    CheckpointEvent,
    Event,
    FileEvent,
    MeasuresEvent,
    NoteEvent,
    RunEvent,
    SampleEvent,
    StageEvent,
    StepEvent,
    VerifyEvent,
)
from trainer.job import Result, ResultFile, RunFolder
from trainer.listeners import (
    EventLog,
    Listener,
    ProgressBar,
    ProgressLines,
    Summary,
    duration,
    progress_for,
    size_text,
)
from trainer.trackers import TensorBoard, WeightsAndBiases, logs_for

FILE = "outputs/lora.safetensors"
STORY: list[Event] = [
    StageEvent("read", 1, 2),
    StageEvent("read", 2, 2),
    NoteEvent("yielded", "cache_latents", "off, because random_flip is on"),
    RunEvent(0, 2, 2, 4, {"family": "some"}, num_pictures=4),
    StepEvent(1, 0, 0.25, 1e-4, 2.0, 0.5, 0.0),
    StepEvent(2, 0, 0.125, 1e-4, 1.0, 0.5, 0.0),
    CheckpointEvent(2, "checkpoints/step-2"),
    FileEvent("diffusers_lora", FILE),
    VerifyEvent(FILE, "diffusers", "passed", 1e-7),
]


def tell(listener: Listener, story: list[Event] = STORY) -> None:
    with listener:
        for event in story:
            listener.hear(event)


def screen(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def board(root: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    accumulator = EventAccumulator(str(RunFolder(root).logs))
    accumulator.Reload()
    return accumulator


def curve(root: Path, name: str) -> list[tuple[int, float]]:
    accumulator = board(root)
    return [(point.step, point.value) for point in accumulator.Scalars(name)]


def test_every_event_is_one_line_of_json_with_its_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    before = time.time()

    tell(EventLog(folder))

    lines = [json.loads(line) for line in folder.events.read_text().splitlines()]
    times = [line.pop("time") for line in lines]
    assert lines == [event.as_dict() for event in STORY]
    assert before - 0.001 <= min(times) <= max(times) <= time.time() + 0.001


def test_a_loss_that_is_no_number_stays_valid_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    tell(EventLog(folder), [StepEvent(1, 0, float("nan"), 1e-4, float("inf"), 0.5, 0.0)])

    event = json.loads(folder.events.read_text(), parse_constant=pytest.fail)
    assert (event["loss"], event["grad_norm"]) == (None, None)
    tell(EventLog(folder), [MeasuresEvent(1, {"validation/loss": float("nan")})])
    assert json.loads(folder.events.read_text().splitlines()[-1])["values"] == {
        "validation/loss": None
    }


def test_an_event_is_on_disk_before_the_next_one_comes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    with EventLog(folder) as log:
        log.hear(STORY[0])

        assert len(folder.read_events()) == 1


def test_a_terminal_shows_a_bar_with_loss_and_learning_rate() -> None:
    console = screen(terminal=True)

    tell(ProgressBar(console))

    text = shown(console)
    assert "loss 0.1250" in text
    assert "lr 0.0001" in text
    assert "0.50 s/step" in text
    assert "2/2" in text


def test_elsewhere_there_are_plain_lines_without_control_characters() -> None:
    console = screen(terminal=False)

    tell(ProgressLines(console))

    assert shown(console).splitlines() == [
        "read: 2 of 2",
        "yielded: `cache_latents`: off, because random_flip is on",
        "train: begins, 2 steps in all, 4 pictures",
        "step 1/2  loss 0.2500  lr 0.0001  0.50 s/step  0 s left",
        "step 2/2  loss 0.1250  lr 0.0001  0.50 s/step  0 s left",
        "checkpoint: checkpoints/step-2",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_option_without_effect_is_told_only_if_somebody_set_it(terminal: bool) -> None:
    console = screen(terminal=terminal)
    notes: list[Event] = [
        NoteEvent("ignored", "lr_power", "lr_scheduler is not polynomial"),
        NoteEvent("ignored", "lokr_factor", "lora_type is not lokr"),
        NoteEvent("ignored", "request.extra", "the service does not know it"),
    ]

    tell(progress_for(console, ["lr_power"]), notes)

    text = shown(console)
    assert "`lr_power`" in text
    assert "`request.extra`" in text
    assert "`lokr_factor`" not in text


def test_a_long_training_prints_about_twenty_lines() -> None:
    console = screen(terminal=False)
    steps = [StepEvent(number, 0, 0.5, 1e-4, 1.0, 0.1, 0.0) for number in range(1, 1001)]

    tell(ProgressLines(console), [RunEvent(0, 1000, 10, 10, {}), *steps])

    assert 20 <= len(shown(console).splitlines()) <= 23


@pytest.mark.parametrize(
    ("pictures", "sizes", "told"),
    [(3, 3, "3 pictures at 3 sizes"), (3, 1, "3 pictures"), (1, 2, "1 picture at 2 sizes")],
)
def test_the_beginning_counts_each_picture_once(pictures: int, sizes: int, told: str) -> None:
    console = screen(terminal=False)

    shows = pictures * sizes
    begins = RunEvent(0, 3, 9, shows, {}, num_pictures=pictures, num_sizes=sizes)
    tell(ProgressLines(console), [begins])

    assert shown(console).strip() == f"train: begins, 3 steps in all, {told}"


def test_the_time_left_counts_only_the_steps_of_this_sitting() -> None:
    console = screen(terminal=False)

    tell(
        ProgressLines(console),
        [RunEvent(90, 100, 10, 10, {}), StepEvent(91, 9, 0.5, 1e-4, 1.0, 2.0, 0.0)],
    )

    # Nine steps of two seconds remain.
    assert "18 s left" in shown(console)


@pytest.mark.parametrize(("terminal", "kind"), [(True, ProgressBar), (False, ProgressLines)])
def test_the_display_fits_the_place(terminal: bool, kind: type[Listener]) -> None:
    assert isinstance(progress_for(screen(terminal=terminal)), kind)


def test_tensorboard_can_read_the_curves(tmp_path: Path) -> None:
    tell(TensorBoard(RunFolder(tmp_path)))

    assert curve(tmp_path, "train/loss") == [(1, 0.25), (2, 0.125)]
    assert curve(tmp_path, "train/grad_norm") == [(1, 2.0), (2, 1.0)]


def test_tensorboard_shows_a_step_that_was_computed_again_once(tmp_path: Path) -> None:
    tell(TensorBoard(RunFolder(tmp_path)))

    again = StepEvent(2, 0, 0.75, 1e-4, 1.0, 0.5, 0.0)
    tell(TensorBoard(RunFolder(tmp_path)), [RunEvent(1, 2, 2, 4, {}), again])

    assert curve(tmp_path, "train/loss") == [(1, 0.25), (2, 0.75)]


def test_a_resumed_run_goes_on_in_the_same_file_from_its_last_whole_point(tmp_path: Path) -> None:
    tell(TensorBoard(RunFolder(tmp_path)))
    (path,) = RunFolder(tmp_path).logs.iterdir()
    # A crash in the middle of the second step's points.
    path.write_bytes(path.read_bytes()[:-7])

    again = StepEvent(2, 0, 0.75, 1e-4, 1.0, 0.5, 0.0)
    tell(TensorBoard(RunFolder(tmp_path)), [RunEvent(1, 2, 2, 4, {}), again])

    assert list(RunFolder(tmp_path).logs.iterdir()) == [path]
    assert curve(tmp_path, "train/loss") == [(1, 0.25), (2, 0.75)]


@pytest.mark.parametrize("lost", [300_000, 7], ids=["records", "content"])
def test_a_file_that_a_power_cut_filled_with_zeros_is_gone_on_from_its_last_whole_point(
    lost: int, tmp_path: Path
) -> None:
    tell(TensorBoard(RunFolder(tmp_path)))
    (path,) = RunFolder(tmp_path).logs.iterdir()
    # A file system knew its new size before the bytes; of the last point, or beyond it.
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(lost) if lost > 7 else whole[:-lost] + bytes(lost))

    again = StepEvent(2, 0, 0.75, 1e-4, 1.0, 0.5, 0.0)
    tell(TensorBoard(RunFolder(tmp_path)), [RunEvent(1, 2, 2, 4, {}), again])

    assert curve(tmp_path, "train/loss") == [(1, 0.25), (2, 0.75)]


def test_tensorboard_has_measures_and_pictures_beside_the_losses(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).samples / "000002" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (6, 4), "red").save(path)
    seen = [
        *STORY,
        MeasuresEvent(2, {"validation/loss": 0.5, "train/prodigy_d": 1e-5}),
        SampleEvent(2, 0, "a TOK", "samples/000002/0.png"),
    ]

    tell(TensorBoard(RunFolder(tmp_path)), seen)

    assert curve(tmp_path, "validation/loss") == [(2, 0.5)]
    assert curve(tmp_path, "train/smoothed_loss") == [(1, 0.0), (2, 0.0)]
    (image,) = board(tmp_path).Images("samples/0")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    assert image.encoded_image_string == path.read_bytes()


@pytest.mark.parametrize("terminal", [True, False])
def test_people_are_told_the_loss_of_held_out_pictures(terminal: bool) -> None:
    console = screen(terminal=terminal)
    tell(progress_for(console), [*STORY, MeasuresEvent(2, {"validation/loss": 0.5})])
    assert "held-out pictures after step 2: loss 0.5000" in shown(console)


@pytest.mark.parametrize(
    ("terminal", "words"), [(True, "+ 2 min 0 s for pictures"), (False, "2 min 3 s left")]
)
def test_people_are_told_of_the_time_that_pictures_still_take(terminal: bool, words: str) -> None:
    begun = RunEvent(0, 4, 2, 4, {})
    picture = SampleEvent(0, 0, "a TOK", "samples/000000/0.png", seconds=60.0, left=2)
    none = NoteEvent("warning", "validation_prompts", "too little memory")
    first, second = (StepEvent(n, 0, 0.5, 1e-4, 1.0, 1.0, 0.5) for n in (1, 2))
    told = screen(terminal=terminal)
    tell(progress_for(told), [begun, picture, first])
    ended = screen(terminal=terminal)
    tell(progress_for(ended), [begun, picture, none, first, second])

    assert words in shown(told)
    assert words not in shown(ended)


def test_a_missing_wandb_is_said_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(InputError, match=r"pip install 'tok-trainer\[wandb\]'"):
        WeightsAndBiases(TrainingConfig(), RunFolder(tmp_path))


def test_wandb_gets_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in: the real one needs the outside network."""
    points: list[tuple[int, dict[str, object]]] = []
    run = SimpleNamespace(
        log=lambda values, step: points.append((step, values)), finish=lambda exit_code: None
    )
    library = SimpleNamespace(
        init=lambda **_: run,
        Image=lambda path, caption: (Path(path), caption),
        errors=SimpleNamespace(Error=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    folder = RunFolder(tmp_path)

    tell(
        WeightsAndBiases(TrainingConfig(), folder),
        [
            RunEvent(0, 1, 1, 1, {}),
            StepEvent(1, 0, 0.5, 1e-4, 1.0, 0.1, 0.5),
            MeasuresEvent(1, {"validation/loss": 0.25}),
            SampleEvent(1, 0, "a TOK", "samples/000001/0.png"),
        ],
    )

    step, measures, picture = (values for _, values in points)
    assert step["train/smoothed_loss"] == 0.5
    assert measures == {"validation/loss": 0.25}
    assert picture == {"samples/0": (tmp_path / "samples/000001/0.png", "a TOK")}
    assert [number for number, _ in points] == [1, 1, 1]


def test_tensorboard_is_on_unless_it_is_switched_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    quiet = TrainingConfig(run=RunConfig(tensorboard=False))

    assert [type(log) for log in logs_for(TrainingConfig(), folder)] == [EventLog, TensorBoard]
    assert [type(log) for log in logs_for(quiet, folder)] == [EventLog]


def test_wandb_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = TrainingConfig(run=RunConfig(wandb=True), output=OutputConfig(output_name="x"))

    with pytest.raises(InputError):
        logs_for(config, RunFolder(tmp_path / "run"))

    assert not (tmp_path / "run").exists()


def test_the_summary_names_file_role_size_and_reader() -> None:
    file = ResultFile(
        role="diffusers_lora",
        path=FILE,
        size=1500,
        sha256="0",
        content_type="application/octet-stream",
    )
    peaks = {"preparing": {"process": 9}, "steps": {"process": 9, "reserved": 2_500_000}}
    result = Result(
        status="done", exit_code=0, step=2, total_steps=2, files=(file,), peak_memory=peaks
    )
    summary = Summary()
    tell(summary)
    console = screen(terminal=False)

    console.print(summary.table(result))

    text = shown(console)
    for expected in (FILE, "diffusers_lora", "1.5 kB", "diffusers: passed", "done: 2 of 2 steps"):
        assert expected in text
    # Of a GPU's memory, where there is one.
    assert "most memory: preparing 9 B, steps 2.5 MB" in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000_000, "2.50 GB")]
)
def test_sizes_are_read_in_powers_of_a_thousand(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
