"""The run folder: the only contract between trainer, server, container and resumed run.

```
config.yaml      the resolved configuration
events.jsonl     everything the run said, one JSON object a line
prepared/        the pictures, upright and at the trained scale, to be looked at
class_images/    what the base model shows of a class, for prior preservation
checkpoints/     step-N folders, each with a manifest
samples/         pictures of the validation prompts on the way, a folder for each step
pictures/        what `trainer sample` made with the result
report.html      all of it, to be looked at
logs/            TensorBoard
outputs/         the result files
verify.json      is among the outputs: what each reader read back
result.json      status, exit code, files and memory taken; written last
result.X.json    the same in the words of the service that dialect X speaks
```

Knows paths and file shapes, nothing of how a training works.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.durable import disk_errors, make_folder, sync_file, write_text
from trainer.errors import InputError, Problem, TrainerError

Status = Literal["done", "failed", "interrupted"]

# The roles that result files play; dialects map them to the fields of their services.
Role = Literal[
    "diffusers_lora",
    "kohya_lora",
    "kohya_lora_comfyui",
    "peft_folder",
    "denoiser_weights",
    "denoiser_config",
    "text_encoder_weights",
    "text_encoder_config",
    "text_encoder_2_weights",
    "text_encoder_2_config",
    "embeddings",
    "token_embedding",
    "extraction_report",
    "config",
    "model_card",
    "loss_plot",
    "verification",
    "debug_dataset",
    "debug_masks",
    "picture",
]

# What each is, in words: programs that read the adapter, those whose DoRA is ComfyUI's, and those
# that know new tokens are named by whoever says it.
MEANINGS: Mapping[str, str] = {
    "diffusers_lora": "the adapter for diffusers",
    "kohya_lora": "the adapter for {programs}",
    "kohya_lora_comfyui": "the same with DoRA magnitudes for {comfyui}",
    "peft_folder": "the adapter of one component as a PEFT folder",
    "denoiser_weights": "all weights of the denoiser",
    "denoiser_config": "the structure of the denoiser",
    "text_encoder_weights": "all weights of the text encoder",
    "text_encoder_config": "the structure of the text encoder",
    "text_encoder_2_weights": "all weights of the second text encoder",
    "text_encoder_2_config": "the structure of the second text encoder",
    "embeddings": "the vectors of all new tokens, for diffusers",
    "token_embedding": "the vectors of one identifier, for {interfaces}",
    "extraction_report": "how much of the change the extracted LoRA holds",
    "config": "the resolved configuration",
    "model_card": "the model card: what was trained, and how each file is loaded",
    "loss_plot": "the course of the loss",
    "verification": "what each reader read back",
    "debug_dataset": "the pictures as they were trained",
    "debug_masks": "the masks as the loss used them",
    "picture": "a picture",
}


# By suffix; the tables of operating systems differ. YAML: RFC 9512.
_CONTENT_TYPES = {
    ".gz": "application/gzip",
    ".jpeg": "image/jpeg",
    ".json": "application/json",
    ".md": "text/markdown",
    ".png": "image/png",
    ".tar": "application/x-tar",
    ".webp": "image/webp",
    ".yaml": "application/yaml",
    ".zip": "application/zip",
}
_OTHER_CONTENT = "application/octet-stream"


class ResultFile(BaseModel):
    """One file of the result.

    Args:
        role: what the file is.
        path: relative to the run folder, with forward slashes.
        size: in bytes.
        sha256: of the content.
        content_type: MIME type.
    """

    model_config = ConfigDict(frozen=True)
    role: Role
    path: str
    size: int
    sha256: str
    content_type: str


class ResultProblem(BaseModel):
    """One thing that was wrong with what the user gave: field, message and hint of a `Problem`."""

    model_config = ConfigDict(frozen=True)
    field: str
    message: str
    hint: str = ""


class Result(BaseModel):
    """How a run ended: the neutral form from which dialects make their services' own shapes.

    Args:
        explicit: the options that somebody set on purpose.
        peak_memory: see `MemoryEvent`.
        published: address of the result on the hub, where it was sent there.
    """

    model_config = ConfigDict(frozen=True)
    status: Status
    exit_code: int
    step: int = 0
    total_steps: int = 0
    error_kind: str | None = None
    error: str | None = None
    hint: str | None = None
    problems: tuple[ResultProblem, ...] = ()
    ignored_options: dict[str, str] = {}
    explicit: tuple[str, ...] = ()
    peak_memory: dict[str, dict[str, int]] = {}
    files: tuple[ResultFile, ...] = ()
    published: str | None = None

    @classmethod
    def of_error(cls, error: TrainerError, *, step: int = 0, total_steps: int = 0) -> Result:
        """The result of a run that ended in this error."""
        status: Status = "interrupted" if error.kind == "interrupted" else "failed"
        problems = error.problems if isinstance(error, InputError) else ()
        return cls(
            status=status,
            exit_code=error.exit_code,
            step=step,
            total_steps=total_steps,
            error_kind=error.kind,
            error=error.message,
            hint=error.hint or None,
            problems=tuple(
                ResultProblem(field=p.field, message=p.message, hint=p.hint) for p in problems
            ),
        )

    def file(self, role: Role) -> ResultFile | None:
        """The first file that plays this role."""
        return next((file for file in self.files if file.role == role), None)


# Locks that this process holds.
_HELD: set[IO[str]] = set()


def _let_go() -> None:
    """In a copy of the process: a lock is free only when every copy has closed its file.

    Readers of pictures live on for seconds after the training was killed.
    """
    for handle in _HELD:
        handle.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class RunFolder:
    """The places inside one run folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.root / "events.jsonl"

    @property
    def prepared(self) -> Path:
        """The pictures, upright and at the trained scale."""
        return self.root / "prepared"

    @property
    def class_images(self) -> Path:
        """The class pictures that the base model made, a folder for each class."""
        return self.root / "class_images"

    @property
    def checkpoints(self) -> Path:
        """The checkpoint folders."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """Pictures of the validation prompts, a folder for each step they were made after."""
        return self.root / "samples"

    @property
    def pictures(self) -> Path:
        """What `trainer sample` made with the result."""
        return self.root / "pictures"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        """TensorBoard's files."""
        return self.root / "logs"

    @property
    def outputs(self) -> Path:
        """The result files."""
        return self.root / "outputs"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.root / "result.json"

    @property
    def _lock(self) -> Path:
        return self.root / ".lock"

    def answer(self, dialect: str) -> Path:
        """How the run ended, in the words of the service that a dialect speaks."""
        return self.root / f"result.{dialect.replace('/', '-')}.json"

    def create(self) -> Sequence[Path]:
        """Makes the folder where it is missing.

        Returns:
            The folders that this made, the run folder first, then its parents.

        Raises:
            DiskError: it cannot be made.
        """
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        make_folder(self.root)
        return made

    def take_back(self, made: Sequence[Path]) -> None:
        """Removes the folders that `create` made for a run that never began.

        What a run leaves before it begins goes with them; a folder with anything else in it
        stays.
        """
        with disk_errors(self.root):
            for path in (self._lock, self.events):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.prepared, ignore_errors=True)
            for path in made:
                if any(path.iterdir()):
                    return
                path.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one training at a time; the system frees it when a process dies.

        Raises:
            InputError: another training is running in this folder.
        """
        with disk_errors(self.root):
            handle = open(self._lock, "w")  # noqa: SIM115 - held until the block ends
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    [
                        Problem(
                            "output",
                            f"another training is running in `{self.root}`",
                            "wait for it, stop it, or give another --output",
                        )
                    ]
                ) from error
            _HELD.add(handle)
            try:
                yield
            finally:
                _HELD.discard(handle)

    def read_events(self) -> list[dict[str, Any]]:
        """The events so far, without lines that are none.

        A crash may cut the last one short; a power cut may leave zeros where something was written.
        """
        if not self.events.exists():
            return []
        whole_lines = self.events.read_bytes().rpartition(b"\n")[0]
        return [event for line in whole_lines.splitlines() if (event := _event(line)) is not None]

    def sync_events(self) -> None:
        """Makes the events so far durable: no checkpoint outlives the log of its steps."""
        if self.events.exists():
            sync_file(self.events)

    def keep_events_through(self, step: int) -> None:
        """Drops what a run resumed after this step logs anew, or has said before in equal words.

        However often a run is killed, each step stands in the log once and so does each note. A run
        that begins at step 0 looks at the base model anew.
        """
        kept: dict[str, str] = {}
        for event in self.read_events():
            if "step" not in event or 0 < step >= event["step"]:
                kept.setdefault(json.dumps({**event, "time": None}), json.dumps(event))
        write_text(self.events, "".join(line + "\n" for line in kept.values()))

    def describe(self, role: Role, path: Path) -> ResultFile:
        """The result entry of a file in this folder."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ResultFile(
            role=role,
            path=path.relative_to(self.root).as_posix(),
            size=path.stat().st_size,
            sha256=digest,
            content_type=_CONTENT_TYPES.get(path.suffix, _OTHER_CONTENT),
        )

    def read_result(self) -> Result | None:
        """How the last run in this folder ended, if it said so."""
        if not self.result.exists():
            return None
        return Result.model_validate_json(self.result.read_bytes())

    def forget_result(self) -> None:
        """Removes what an earlier run said of its end."""
        with disk_errors(self.root):
            for path in (self.result, self.report, *self.root.glob("result.*.json")):
                path.unlink(missing_ok=True)

    def write_result(self, result: Result) -> None:
        """Says how the run ended: a run's last act."""
        write_text(self.result, result.model_dump_json(indent=2) + "\n")


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line of the log, if it holds one."""
    try:
        event = json.loads(line)
    # Bytes that are no text are told by another kind of it.
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
