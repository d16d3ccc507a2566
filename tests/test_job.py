"""The run folder: its lock, its event log and its result."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import DiskError, InputError, Interrupted, NonFiniteError
from trainer.job import Result, RunFolder

HOLD = """
import sys, time
from pathlib import Path
from trainer.job import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def write_events(folder: RunFolder, *steps: int) -> None:
    lines = [{"event": "run", "details": {"model": "tiny"}}]
    lines += [{"event": "step", "step": step, "loss": 0.5} for step in steps]
    folder.events.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_all_places_lie_inside_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = [
        folder.config,
        folder.events,
        folder.prepared,
        folder.checkpoints,
        folder.logs,
        folder.outputs,
        folder.result,
    ]
    assert {place.parent for place in places} == {tmp_path}
    assert len({place.name for place in places}) == len(places)


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        RunFolder(tmp_path / "file" / "run").create()


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with (
        folder.lock(),
        pytest.raises(InputError, match="another training is running") as caught,
        RunFolder(tmp_path).lock(),
    ):
        pass
    assert caught.value.problems[0].field == "output"


def test_the_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path).lock():
            pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError), RunFolder(tmp_path).lock():
            pass
        process.kill()
    with RunFolder(tmp_path).lock():
        pass


def test_a_reader_of_pictures_that_outlives_the_training_does_not_hold_the_lock(
    tmp_path: Path,
) -> None:
    with RunFolder(tmp_path).lock():
        forking = multiprocessing.get_context("fork")
        begun, over = forking.Event(), forking.Event()
        reader = forking.Process(target=lambda: (begun.set(), over.wait()))
        reader.start()
        begun.wait()
        with pytest.raises(InputError), RunFolder(tmp_path).lock():
            pass
    try:
        with RunFolder(tmp_path).lock():
            assert reader.is_alive()
    finally:
        over.set()
        reader.join()


def test_a_new_folder_has_no_events(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).read_events() == []


@pytest.mark.parametrize("missing", [1, 2, 5, 20])
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path, missing: int) -> None:
    folder = RunFolder(tmp_path)
    write_events(folder, 1, 2)
    with open(folder.events, "a") as file:
        file.write((json.dumps({"event": "run", "details": {"model": "ti"}}) + "\n")[:-missing])
    assert [event.get("step") for event in folder.read_events()] == [None, 1, 2]


ZEROS = bytes(64)


@pytest.mark.parametrize(
    "lost",
    [ZEROS + b"\n", ZEROS + b'"loss": 0.5}\n', b'{"event": ' + ZEROS + b"\n", b"\xff\n", b"0\n"],
    ids=["zeros", "zeros at its beginning", "zeros at its end", "no text", "no object"],
)
@pytest.mark.parametrize("place", [1, 3])
def test_what_a_power_cut_left_in_the_log_does_not_keep_the_run_from_going_on(
    lost: bytes, place: int, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    write_events(folder, 1, 2)
    lines = folder.events.read_bytes().splitlines(keepends=True)
    # Of the last block nothing need be written, not even the end of a line.
    folder.events.write_bytes(b"".join([*lines[:place], lost, *lines[place:], ZEROS]))
    folder.keep_events_through(2)
    assert [event.get("step") for event in folder.read_events()] == [None, 1, 2]
    assert ZEROS not in folder.events.read_bytes()


def test_events_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_events(folder, 1, 2, 3, 4)
    folder.keep_events_through(2)
    assert [event.get("step") for event in folder.read_events()] == [None, 1, 2]


def test_what_every_start_says_in_equal_words_stands_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    told = [
        {"event": "note", "message": "3 pictures are small", "time": 1.0},
        {"event": "step", "step": 1, "time": 2.0},
        {"event": "note", "message": "3 pictures are small", "time": 3.0},
        {"event": "note", "message": "checkpoint step-2 is damaged", "time": 4.0},
    ]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in told))
    folder.keep_events_through(1)
    assert folder.read_events() == [told[0], told[1], told[3]]


def test_a_result_file_is_described_by_size_digest_and_type(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.outputs.mkdir()
    (folder.outputs / "loss.png").write_bytes(b"picture")
    (folder.outputs / "x.safetensors").write_bytes(b"")
    described = folder.describe("loss_plot", folder.outputs / "loss.png")
    assert described.path == "outputs/loss.png"
    assert described.size == 7
    assert described.sha256 == hashlib.sha256(b"picture").hexdigest()
    assert described.content_type == "image/png"
    other = folder.describe("diffusers_lora", folder.outputs / "x.safetensors")
    assert other.content_type == "application/octet-stream"


def test_a_type_does_not_depend_on_the_systems_own_table(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    types = {}
    for name in ("config.yaml", "README.md", "verify.json", "masks.tar.gz"):
        (tmp_path / name).write_bytes(b"")
        types[name] = folder.describe("config", tmp_path / name).content_type
    # RFC 9512 (YAML), RFC 7763 (Markdown), RFC 8259 (JSON), RFC 6713 (gzip).
    assert list(types.values()) == [
        "application/yaml",
        "text/markdown",
        "application/json",
        "application/gzip",
    ]


def test_folders_made_for_a_run_that_never_began_are_taken_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "me")
    made = folder.create()
    write_events(folder, 1)
    folder.prepared.mkdir()
    (folder.prepared / "index.json").write_text("{}")
    with folder.lock():
        folder.take_back(made)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_not_taken_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "me")
    made = folder.create()
    (folder.root / "notes.txt").write_text("mine")
    folder.take_back(made)
    assert (folder.root / "notes.txt").read_text() == "mine"


def test_only_missing_folders_are_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "me")
    assert folder.create() == [folder.root, tmp_path / "runs"]
    assert folder.create() == []


def test_the_answer_of_a_dialect_lies_beside_the_result_and_is_forgotten_with_it(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    answers = [folder.answer("fal"), folder.answer("fal-ai/personalization")]
    for path in (folder.result, *answers):
        path.write_text("{}")
    assert [path.parent for path in answers] == [tmp_path, tmp_path]
    assert answers[0].name == "result.fal.json"
    folder.forget_result()
    assert list(tmp_path.iterdir()) == []


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.outputs.mkdir()
    (folder.outputs / "a.json").write_text("{}")
    described = folder.describe("verification", folder.outputs / "a.json")
    result = Result(
        status="done",
        exit_code=0,
        step=3,
        total_steps=3,
        ignored_options={"lr_power": "only polynomial has a power"},
        files=(described,),
    )
    assert folder.read_result() is None
    folder.write_result(result)
    assert folder.read_result() == result
    assert result.file("verification") == described
    assert result.file("loss_plot") is None


def test_a_result_says_which_error_ended_the_run() -> None:
    result = Result.of_error(NonFiniteError("loss is nan", "lower it"), step=4, total_steps=9)
    assert (result.status, result.exit_code, result.error_kind) == ("failed", 3, "non-finite")
    assert (result.error, result.hint) == ("loss is nan", "lower it")
    assert (result.step, result.total_steps) == (4, 9)


def test_an_interrupted_run_has_not_failed() -> None:
    assert Result.of_error(Interrupted("stopped")).status == "interrupted"


def test_the_run_folder_needs_no_torch() -> None:
    code = "import sys, trainer.job; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "diffusers"} & set(done.stdout.split())


def test_of_a_run_that_begins_anew_nothing_stays_that_was_seen_after_a_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    told = [
        {"event": "note", "note": "warning", "field": "x", "message": "of all"},
        {"event": "sample", "step": 0, "number": 0, "prompt": "another", "path": "p"},
        {"event": "note", "note": "warning", "field": "x", "message": "seen", "step": 3},
    ]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in told))

    folder.keep_events_through(0)

    assert folder.read_events() == told[:1]
