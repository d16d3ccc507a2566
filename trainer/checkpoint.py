"""Checkpoints that are either whole or not there: publish, verify, load.

```
checkpoints/step-N/
  weights.safetensors   what is learnt
  optimizer.pt          the optimizer's state
  state.json            learning-rate schedule, gradient scaler, losses so far
  manifest.json         written last: step, configuration, size and sha256 of the others
```

A checkpoint is written under a hidden name, made durable and then renamed; older ones go only
after that. Knows files and tensors, nothing of training.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer import durable, tensorfile
from trainer.errors import (
    CheckpointError,
    DiskError,
    NonFiniteError,
    OutOfMemoryError,
    TrainerError,
)

WEIGHTS, OPTIMIZER, STATE, MANIFEST = (
    "weights.safetensors",
    "optimizer.pt",
    "state.json",
    "manifest.json",
)
_PREFIX = "step-"
# Failures that tell of the disk or of the path. All others are of the moment, and the checkpoint
# may be whole: rights, a server that is away, too many open files.
_OF_THE_DISK = (errno.EIO, errno.EBADMSG)
_OF_THE_PATH = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# What torch says, in a RuntimeError, where the system refuses it memory, files or rights.
_MEMORY = re.compile(f"{os.strerror(errno.ENOMEM)}|can't allocate memory|not enough memory", re.I)
_REFUSED = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE)
_OF_THE_MOMENT = re.compile("|".join(map(os.strerror, _REFUSED)))


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after a step.

    Args:
        step: optimizer steps done.
        tensors: what is learnt, by name.
        optimizer: the optimizer's `state_dict`.
        state: what else has a state, as JSON can hold it.
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint from disk, and a warning for each damaged newer one."""

    checkpoint: Checkpoint
    warnings: tuple[str, ...]


class _DamageError(Exception):
    """Why a checkpoint folder cannot be used."""


class _UnreadError(_DamageError):
    """The disk does not give back what was written; it may yet."""


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, among others."""
    return folder / f"{_PREFIX}{step}"


def publish(
    folder: Path, checkpoint: Checkpoint, *, config_values: Mapping[str, Any], keep: int
) -> Path:
    """Makes a checkpoint durable as `step-N`, and only then removes what it replaces.

    Args:
        folder: the run's `checkpoints/`.
        checkpoint: what to keep.
        config_values: what must be equal for a run to go on from here, as JSON can hold it.
        keep: checkpoints to leave, this one included.

    Returns:
        The folder of this checkpoint.

    Raises:
        DiskError: it could not be written, or one of this step that is there not be read; older
            checkpoints are untouched.
        OutOfMemoryError: there is too little memory to read one of this step that is there.
        NonFiniteError: weights are not finite; older checkpoints are untouched.
    """
    final = place_of(folder, checkpoint.step)
    if not _is_intact(final, config_values):
        temporary = durable.fresh_folder(folder / f".tmp-{checkpoint.step}")
        try:
            _write(temporary, checkpoint, config_values)
            if os.path.lexists(final):
                durable.remove_folder(final)
            durable.publish_folder(temporary, final)
        except (DiskError, NonFiniteError):
            durable.discard(temporary)
            raise
    # Numbers above this one were passed over when the run began. What is whole after all stays.
    for step in _steps(folder):
        path = place_of(folder, step)
        if step > checkpoint.step and _is_damaged(path):
            durable.remove_folder(path)
    tidy(folder, checkpoint.step, keep=keep)
    return final


def tidy(folder: Path, step: int, *, keep: int) -> bool:
    """Removes what was replaced, and what a run that was killed left half written.

    Args:
        folder: the run's `checkpoints/`, which need not exist.
        step: of the newest checkpoint that is whole; newer ones stay as they are.
        keep: checkpoints to leave, that one included.

    Returns:
        Whether anything was there to be removed.
    """
    replaced = [number for number in _steps(folder) if number <= step][keep:]
    for number in replaced:
        durable.remove_folder(place_of(folder, number))
    leftovers = list(folder.glob(".tmp-*"))
    for leftover in leftovers:
        durable.discard(leftover)
    return bool(replaced or leftovers)


def load_newest(folder: Path, *, config_values: Mapping[str, Any]) -> Loaded | None:
    """The newest checkpoint that is whole, or nothing where no checkpoint was ever published.

    Args:
        folder: the run's `checkpoints/`, which need not exist.
        config_values: as given to `publish`.

    Raises:
        CheckpointError: every checkpoint is damaged, or the newest whole one belongs to
            another configuration.
        DiskError: one that may be whole cannot be read at this moment.
        OutOfMemoryError: likewise, for want of memory.
    """
    warnings: list[str] = []
    hint = "give another --output, or remove that folder to start from step 0"
    for step in _steps(folder):
        path = place_of(folder, step)
        try:
            manifest = _verify(path)
            _check_config(path, manifest["config"], config_values)
            return Loaded(_read(path, step), tuple(warnings))
        except _DamageError as damage:
            warnings.append(f"checkpoint `{path.name}` is damaged and passed over: {damage}")
            if isinstance(damage, _UnreadError):
                hint = "mend the disk and run the same command again, or give another --output"
    if warnings:
        message = "\n".join([f"no checkpoint in `{folder}` is usable", *warnings])
        raise CheckpointError(message, hint)
    return None


def refuse_other(folder: Path, config_values: Mapping[str, Any]) -> None:
    """Reads no more than a manifest to tell early that a run could not go on from here.

    Args:
        folder: the run's `checkpoints/`, which need not exist.
        config_values: those of the values given to `publish` that are known so far.

    Raises:
        CheckpointError: the newest readable manifest belongs to another configuration.
        DiskError: what is in the folder cannot be told.
    """
    newest = _newest_settings(folder)
    if newest is not None:
        path, theirs = newest
        known = {name: theirs.get(name) for name in config_values}
        _check_config(path, known, config_values)


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The values that the newest readable manifest was published with; none where there is none.

    Args:
        folder: the run's `checkpoints/`, which need not exist.
    """
    newest = _newest_settings(folder)
    return {} if newest is None else newest[1]


def _newest_settings(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for step in _steps(folder):
        path = place_of(folder, step)
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["sha256"] != _digest_of(manifest["content"]):
                continue
            return path, dict(manifest["content"]["config"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _write(folder: Path, checkpoint: Checkpoint, config_values: Mapping[str, Any]) -> None:
    tensorfile.write(folder / WEIGHTS, checkpoint.tensors, {})
    durable.write_with(folder / OPTIMIZER, lambda file: _save(checkpoint.optimizer, file))
    durable.write_text(folder / STATE, json.dumps(checkpoint.state, indent=2) + "\n")
    content = {
        "step": checkpoint.step,
        "files": {name: _describe(folder / name) for name in (WEIGHTS, OPTIMIZER, STATE)},
        "config": dict(config_values),
    }
    manifest = {"content": content, "sha256": _digest_of(content)}
    durable.write_text(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


class _Telling(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = error
            raise


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """Saves a tensor at a time: the state of a large model is never in memory twice.

    Raises:
        OSError: it could not be written.
    """
    telling = _Telling(file)
    try:
        torch.save(state, telling)  # type: ignore[arg-type]
    except RuntimeError as error:
        # torch.save to a full disk fails with a message that says nothing of disks.
        raise telling.failure or error from error


def _steps(folder: Path) -> list[int]:
    """The numbers of published checkpoints, newest first.

    Raises:
        DiskError: the folder is there and cannot be read; a glob would find nothing in it.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    numbers = [name.removeprefix(_PREFIX) for name in names]
    return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


def _is_intact(path: Path, config_values: Mapping[str, Any]) -> bool:
    """Whether a resumed run that comes by this step again may leave its checkpoint as it is."""
    try:
        manifest = _verify(path)
        # What fits its manifest and still cannot be loaded was passed over when the run began.
        _read(path, manifest["step"])
    except _DamageError:
        return False
    return bool(manifest["config"] == _as_json(config_values))


def _is_damaged(path: Path) -> bool:
    """Whether a checkpoint cannot be used, now or later."""
    try:
        _read(path, _verify(path)["step"])
    except _DamageError:
        return True
    except (DiskError, OutOfMemoryError):
        return False
    return False


def _verify(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest, after comparing every file with it.

    Raises:
        _DamageError: they differ, or are not there.
        DiskError: they cannot be read at this moment.
        OutOfMemoryError: likewise, for want of memory.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        content: dict[str, Any] = manifest["content"]
        if manifest["sha256"] != _digest_of(content):
            raise _DamageError(f"`{MANIFEST}` was changed")
        if path.name != f"{_PREFIX}{content['step']}":
            raise _DamageError(f"`{MANIFEST}` is of step {content['step']}")
        for name, expected in content["files"].items():
            if _describe(path / name) != expected:
                raise _DamageError(f"`{name}` was changed")
    except FileNotFoundError as error:
        raise _DamageError(f"`{Path(error.filename).name}` is missing") from error
    except OSError as error:
        raise _of_reading(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _DamageError(f"`{MANIFEST}` is no manifest") from error
    return content


def _check_config(path: Path, theirs: dict[str, Any], config_values: Mapping[str, Any]) -> None:
    ours = _as_json(config_values)
    names = [*theirs, *(name for name in ours if name not in theirs)]
    changes = [
        f"`{name}`: {json.dumps(theirs.get(name))} → {json.dumps(ours.get(name))}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"checkpoint `{path}` belongs to another configuration: " + ", ".join(changes),
            "give another --output for the new configuration, or set these options back",
        )


def _read(path: Path, step: int) -> Checkpoint:
    """What is in a checkpoint, after `_verify` of it; raises what that does."""
    try:
        tensors = load_file(path / WEIGHTS)
        # Mapped, so that what is moved from here to a GPU need not be in memory as a whole.
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        state = json.loads((path / STATE).read_bytes())
    except OSError as error:
        raise _of_reading(path, error) from error
    except MemoryError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
        if _MEMORY.search(str(error)) or _OF_THE_MOMENT.search(str(error)):
            raise _unreadable(path, error) from error
        raise _DamageError(str(error).splitlines()[0]) from error
    return Checkpoint(step=step, tensors=tensors, optimizer=optimizer, state=state)


def _of_reading(path: Path, error: OSError) -> _DamageError | TrainerError:
    """What a failed file operation means for a checkpoint; safetensors tells no number of it."""
    if error.errno in _OF_THE_DISK:
        return _UnreadError(f"it cannot be read: {error.strerror}")
    if error.errno in _OF_THE_PATH:
        return _DamageError(f"it cannot be read: {error.strerror}")
    return _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> TrainerError:
    """What ends a run that cannot read at this moment what may be whole."""
    told = error.strerror if isinstance(error, OSError) else None
    reason = told or (str(error).splitlines() or [type(error).__name__])[0]
    message = f"`{path}` could not be read: {reason}; nothing was removed"
    if isinstance(error, MemoryError) or _MEMORY.search(reason):
        hint = "free memory of this computer, then run the same command again"
        return OutOfMemoryError(message, hint)
    return DiskError(message, "once it can be read again, run the same command again")


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from a JSON file."""
    answer: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return answer
