"""`trainer generate`: a command for people, and a worker that is told folders on stdin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import finished
from PIL import Image
from tiny import TWO_LAYERS, never

from trainer import generating, inference
from trainer.cli import run
from trainer.config import Note
from trainer.generation import GenerationFolder, GenerationRequest
from trainer.job import RunFolder

ROOT = Path(__file__).parent.parent
# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def lora_run(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "me"
    leaves = {**TWO_LAYERS, "instance_prompt": "a photo of a man"}
    return finished(folder, sd15_folder, photo_folder, **leaves)


def asked(folder: Path, model: Path, **given: Any) -> GenerationFolder:
    """A folder with a request."""
    folder.mkdir()
    wanted = GenerationFolder(folder)
    values = {"prompt": "a man", "num_inference_steps": 1, "model": {"model_url": str(model)}}
    wanted.write_request(GenerationRequest(**{**values, **given}))
    return wanted


def served(*lines: str) -> list[dict[str, Any]]:
    """What the worker says of these lines."""
    said: list[dict[str, Any]] = []
    generating.serve(iter(lines), never, said.append)
    return said


def test_people_get_the_files_of_their_pictures(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    code = run(["generate", str(lora_run), "--steps", "1", "--num-images", "2", "--seed", "3"])

    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines == ["pictures/me/outputs/0.png", "pictures/me/outputs/1.png"]
    with Image.open(lines[0]) as image:
        assert image.size == (64, 64)
    result = RunFolder(Path("pictures/me")).read_result()
    assert result is not None
    assert [(file.role, file.content_type) for file in result.files] == [
        ("picture", "image/png"),
        ("picture", "image/png"),
    ]


def test_the_default_prompt_is_that_of_the_run(
    lora_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def told(request: GenerationRequest, folder: GenerationFolder, *, as_json: bool) -> int:
        prompts.append(request.prompt)
        return 0

    monkeypatch.setattr(generating, "_for_people", told)
    for flags in ([], ["--prompt", "a boat"]):
        assert run(["generate", str(lora_run), *flags]) == 0

    assert prompts == ["a photo of a man", "a boat"]


def test_json_is_the_result_with_its_folder(lora_run: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--steps", "1", "--format", "webp", "--output", str(tmp_path / "out"), "--json"]
    assert run(["generate", str(lora_run), *flags]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["status"] == "done"
    assert data["folder"] == str(tmp_path / "out")
    assert [file["path"] for file in data["files"]] == ["outputs/0.webp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`RUNS`: no run is given"),
        (["nowhere"], "nowhere/config.yaml"),
        (["{run}", "--strength", "5"], "`strength`: Input should be less than or equal to 4"),
        (["{run}", "--output", "{run}"], "is the folder of a training"),
    ],
)
def test_what_people_do_wrong_is_named(
    arguments: list[str], message: str, lora_run: Path, capsys: Any
) -> None:
    before = sorted(lora_run.rglob("*"))
    assert run(["generate", *(word.format(run=lora_run) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(lora_run.rglob("*")) == before


def test_a_refused_request_of_people_leaves_a_result_and_its_exit_code(
    lora_run: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = str(tmp_path / "out")
    assert run(["generate", str(lora_run), "--width", "100", "--output", folder]) == 2
    assert "error[input]: `width`: is 100" in capsys.readouterr().err


def test_a_failed_request_does_not_end_the_worker(
    sd15_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(tmp_path / "first", sd15_folder)
    bad = asked(tmp_path / "bad", sd15_folder, width=100)
    (tmp_path / "empty").mkdir()
    last = asked(tmp_path / "last", sd15_folder, num_images=2)
    loads: list[Any] = []
    load = inference.base_model.load

    def counted(*given: Any, **named: Any) -> Any:
        loads.append(given)
        return load(*given, **named)

    monkeypatch.setattr(inference.base_model, "load", counted)
    folders = [str(tmp_path / name) for name in ("first", "bad", "empty", "nowhere", "last")]

    said = served(*folders)

    statuses = ["done", "failed", "failed", "failed", "done"]
    assert said == [
        {"folder": folder, "status": status}
        for folder, status in zip(folders, statuses, strict=True)
    ]
    assert len(loads) == 1
    results = [folder.run.read_result() for folder in (first, bad, last)]
    assert [(r.status, r.error_kind, len(r.files)) for r in results if r] == [
        ("done", None, 1),
        ("failed", "input", 0),
        ("done", None, 2),
    ]
    assert [problem.field for problem in results[1].problems] == ["width"] if results[1] else False
    kinds = [event["event"] for event in last.run.read_events()]
    assert kinds == ["stage", "file", "stage", "file", "stage"]


def test_a_request_asked_again_leaves_nothing_of_the_first(
    sd15_folder: Path, tmp_path: Path
) -> None:
    folder = asked(tmp_path / "one", sd15_folder, num_images=2)
    served(str(folder.root))
    request = folder.read_request().model_copy(update={"num_images": 1, "width": 100})
    folder.write_request(request)

    served(str(folder.root))

    result = folder.run.read_result()
    assert result is not None
    assert result.status == "failed"
    assert list(folder.run.outputs.iterdir()) == []


def test_a_result_tells_what_had_no_effect_also_where_nothing_was_made(
    sd15_folder: Path, tmp_path: Path
) -> None:
    said = Note(kind="ignored", field="request.mood", message="there is no such field")
    warned = Note(kind="warning", field="request.moods", message="look twice")
    options = {"scheduler": "DDIMScheduler", "karras": True, "notes": (said, warned)}
    made = asked(tmp_path / "made", sd15_folder, **options)
    failed = asked(tmp_path / "failed", sd15_folder, width=100, **options)

    served(str(made.root), str(failed.root))

    told = [folder.run.read_result() for folder in (made, failed)]
    assert [result.ignored_options.keys() for result in told if result] == [
        {"request.mood", "karras"},
        {"request.mood"},
    ]
    notes = [e["field"] for e in made.run.read_events() if e["event"] == "note"]
    assert notes == ["request.mood", "request.moods", "karras"]


def test_a_request_that_is_no_request_says_what_is_wrong(tmp_path: Path) -> None:
    folder = GenerationFolder(tmp_path / "one")
    folder.root.mkdir()
    folder.request.write_text('{"prompt": "a", "num_images": 0, "colour": "red"}')

    assert served(str(folder.root))[0]["status"] == "failed"

    result = folder.run.read_result()
    assert result is not None
    assert {problem.field for problem in result.problems} == {"num_images", "colour"}


def test_a_stopped_request_gets_no_result_and_ends_the_worker(
    sd15_folder: Path, tmp_path: Path
) -> None:
    folders = [asked(tmp_path / name, sd15_folder, num_images=2) for name in ("a", "b")]
    said: list[dict[str, Any]] = []

    generating.serve((str(folder.root) for folder in folders), lambda: True, said.append)

    assert said == []
    assert [folder.run.result.exists() for folder in folders] == [False, False]
    assert [path.name for path in folders[0].run.outputs.iterdir()] == ["0.png"]
    assert not folders[1].run.outputs.exists()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "trainer", "generate", "--stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with worker:
        yield worker
        worker.kill()


def test_a_worker_process_answers_in_lines_and_leaves_on_a_signal_while_idle(
    process: subprocess.Popen[str], sd15_folder: Path, tmp_path: Path
) -> None:
    folder = asked(tmp_path / "one", sd15_folder)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{folder.root}\n")
    process.stdin.flush()

    answer = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)

    assert answer == {"folder": str(folder.root), "status": "done"}
    assert process.wait(timeout=10) == 0
    assert process.stdout.read() == ""


def test_lines_end_with_stdin_also_where_the_last_has_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\n\ntwo\nthr")
    os.write(writing, b"ee")
    os.close(writing)
    with os.fdopen(reading) as source:
        monkeypatch.setattr(sys, "stdin", source)
        assert list(generating._lines(never)) == ["one", "two", "three"]
