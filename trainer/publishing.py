"""A training whose result goes to the Hugging Face hub: asked before it, and sent after it.

Only for those who set `push_to_hub`. Result files are sent when all of them are written and
verified; whatever befalls the upload, the run is done and its files lie where they were. All that
is said to the hub is said by a program of its own, `hub_upload.py`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trainer import __version__
from trainer.config import OutputConfig, TrainingConfig
from trainer.errors import InputError, TrainerError
from trainer.events import Event, FileEvent, NoteEvent, PublishedEvent, StageEvent
from trainer.job import RunFolder
from trainer.launchers import is_main_process
from trainer.runner import Engine, Events, Stop, end_of

if TYPE_CHECKING:
    from trainer.hub_upload import Answer, Kind, Task

FIELD = "push_to_hub"
STAGE = "upload"

# Result files that show the photographs themselves: they stay on this machine.
STAYING = ("debug_dataset", "debug_masks")

# Before a training, a hub that says nothing for so long is out of reach.
CHECK_SECONDS = 15.0
# An upload may take so long, and a second more for as many bytes.
UPLOAD_SECONDS = 600.0
UPLOAD_BYTES_PER_SECOND = 1e6
# Between two looks at whether an upload is done, or is to be stopped.
_POLL_SECONDS = 0.2
# That the program gets for its end once it is told to.
_END_SECONDS = 5.0

# Not run by `-m`: what lies in the user's folder is not to be imported.
_PROGRAM = Path(__file__).with_name("hub_upload.py")
# What an answer consists of, by its status.
_PARTS = {"ok": {"repository"}, "refused": {"field", "message", "hint"}, "failed": {"message"}}

# What a token looks like wherever a library might print it: by its form, or in a header. Names of
# repositories begin with `hf_` too.
_TOKEN = re.compile(r"(\bhf_|\bapi_org_)[A-Za-z0-9]{20,}|(Bearer )[^\s'\",;]+")


def published(engine: Engine, config: TrainingConfig, stop: Stop) -> Engine:
    """An engine at whose end the result goes to the hub, where that is asked for.

    Args:
        engine: of the training.
        config: of the training.
        stop: asked while the hub is asked, before the training; true ends that.

    Raises:
        InputError: it could not: no token, one that may not write, HF_HUB_OFFLINE.
    """
    output = config.output
    if not output.push_to_hub or not is_main_process():
        return engine
    repository, note = _agreed(output, stop)

    def run(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Events:
        files: list[str] = []
        if note is not None:
            yield note
        events = engine(config, folder, stop)
        for event in events:
            if isinstance(event, FileEvent) and event.role not in STAYING:
                path = folder.root / event.path
                files.append(path.relative_to(folder.outputs).as_posix())
            try:
                yield event
            except TrainerError as error:
                end_of(error, events)
        yield from _sent(_task("upload", repository, output, folder, files), stop)

    return run


def _agreed(output: OutputConfig, stop: Stop) -> tuple[str, NoteEvent | None]:
    """The repository, and what is to be told where the hub did not say whether it takes it.

    Raises:
        InputError: it does not take it.
    """
    repository = output.hub_model_id or output.output_name
    answer = _ask(_task("check", repository, output), stop, CHECK_SECONDS)
    if answer["status"] == "refused":
        raise InputError.of(answer["field"], answer["message"], answer["hint"])
    if answer["status"] == "ok":
        return answer["repository"], None
    message = f"the hub could not be asked before the training: {answer['message']}"
    return repository, NoteEvent("warning", FIELD, f"{message}; it is tried again at its end")


def _sent(task: Task, stop: Stop) -> Iterator[Event]:
    """Sends the files; where that fails, says how they get there later."""
    count = len(task["files"])
    yield StageEvent(STAGE, 0, count)
    answer = _ask(task, stop, _upload_seconds(task))
    if answer["status"] == "ok":
        yield StageEvent(STAGE, count, count)
        yield PublishedEvent(answer["repository"], answer["url"], task["private"])
        return
    remedy = answer.get("hint") or _by_hand(task, answer.get("repository"))
    message = f"the run is done, but its result is not on the hub: {answer['message']}; {remedy}"
    yield NoteEvent("warning", answer.get("field", FIELD), message)


def _upload_seconds(task: Task) -> float:
    """How long an upload may take, by the size of its files."""
    size = 0
    for name in task["files"]:
        # A file that cannot be read is the program's to complain of.
        with suppress(OSError):
            size += Path(task["folder"], name).stat().st_size
    return UPLOAD_SECONDS + size / UPLOAD_BYTES_PER_SECOND


def _by_hand(task: Task, there: str | None) -> str:
    """The hub's own commands for the same upload, which sends nothing private where others see it.

    Args:
        task: the upload.
        there: the repository in full, where it is known to be there as it was asked for.
    """
    privacy = "--private" if task["private"] else "--no-private"
    repository = there or task["repository"]
    words = ["hf", "upload", repository, task["folder"], ".", privacy]
    upload = shlex.join([*words, *(w for role in STAYING for w in ("--exclude", f"{role}*"))])
    if there or not task["private"]:
        return f"to send it later: {upload}"
    # Of a repository that is there, `hf upload` says nothing, whoever sees it.
    create = shlex.join(["hf", "repos", "create", repository, privacy])
    return (
        "to send it later (by the second command alone, where the repository is there and "
        f"private): {create} && {upload}"
    )


def _task(
    kind: Kind,
    repository: str,
    output: OutputConfig,
    folder: RunFolder | None = None,
    files: Sequence[str] = (),
) -> Task:
    return {
        "kind": kind,
        "repository": repository,
        "private": output.hub_private,
        "folder": "" if folder is None else str(folder.outputs.resolve()),
        "files": list(files),
        "message": f"{output.output_name}, trained with tok-trainer {__version__}",
    }


def _ask(task: Task, stop: Stop, seconds: float) -> Answer:
    """Has a task done by the program; whatever befalls that, there is an answer.

    Args:
        task: what is to be done.
        stop: asked all the while; true ends it.
        seconds: that it may take.
    """
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except OSError as error:
        return {"status": "failed", "message": f"nothing can be started for it: {error}"}
    with process:
        text: str | None = json.dumps(task)
        while True:
            try:
                said, complaint = process.communicate(text, timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                # The rest of the text is still on its way.
                text = None
            if stop() or time.monotonic() > deadline:
                _end(process)
                return {"status": "failed", "message": "it was stopped, or took too long"}
    if process.returncode == 0:
        return _answer_in(said, task["kind"])
    lines = complaint.strip().splitlines() or [f"exit code {process.returncode}"]
    return {"status": "failed", "message": _without_token(lines[-1])}


def _answer_in(said: str, kind: Kind) -> Answer:
    """The answer in what the program wrote; a failure where there is none."""
    try:
        answer = json.loads(said.splitlines()[-1])
        needed = _PARTS[answer["status"]]
        if kind == "upload" and answer["status"] == "ok":
            needed = needed | {"url"}
        needed = needed | answer.keys() & {"repository"}
        whole = all(isinstance(answer[name], str) for name in needed)
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        return {"status": "failed", "message": "no answer came from the program that asks the hub"}
    told = {n: _without_token(answer[n]) for n in ("message", "hint") if n in answer}
    return cast("Answer", answer | told)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the program; until its commit is made, nothing of an upload is to be seen."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_END_SECONDS)
        return
    process.kill()
    process.communicate()


def _without_token(text: str) -> str:
    """A text in which no token stands, whatever a library wrote."""
    given = os.environ.get("HF_TOKEN", "").strip()
    text = text.replace(given, "…") if given else text
    return _TOKEN.sub(r"\1\2…", text)
