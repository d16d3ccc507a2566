"""The small files that describe a base model, from a folder or the hub, and what can go wrong
on the way there, said as errors with the next action.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from trainer.errors import DiskError, InputError, TrainerError
from trainer.tensorfile import read_header


@dataclass(frozen=True)
class Source:
    """Where files in diffusers' layout come from.

    Args:
        url: local folder or hub id.
        revision: branch, tag or commit on the hub.
        field: the option that names the place.
    """

    url: str
    revision: str | None = None
    field: str = "model_url"

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of one JSON file.

        Args:
            name: path inside the folder or repository.

        Raises:
            InputError: it cannot be had, or holds something else.
        """
        with hub_errors(self.field, self.url):
            path = self._path(name)
            text = path.read_bytes()
        try:
            content = json.loads(text)
        except ValueError as error:
            raise self._broken(name, f"is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise self._broken(name, "holds no object of names and values")
        return content

    def folder_of(self, name: str) -> Path:
        """Where on this machine the files beside one of these files lie.

        Raises:
            InputError: it cannot be had.
        """
        with hub_errors(self.field, self.url):
            return self._path(name).parent

    def _path(self, name: str) -> Path:
        folder = Path(self.url)
        if not folder.is_dir():
            return Path(hf_hub_download(self.url, name, revision=self.revision))
        path = folder / name
        if not path.is_file():
            raise InputError.of(
                self.field,
                f"`{folder}` has no `{name}`, so it is not a model in diffusers' layout",
                "give a diffusers folder, a hub id or a .safetensors file",
            )
        return path

    def _broken(self, name: str, what: str) -> InputError:
        return InputError.of(
            self.field, f"`{name}` of `{self.url}` {what}", "fetch the model anew, or correct it"
        )


def read_shapes(path: Path, *, field: str) -> dict[str, list[int]]:
    """Name and shape of every tensor in a safetensors file, from its header alone.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise InputError.of(field, f"there is no file `{path}`", "check the path")
    try:
        header: Mapping[str, Any] = read_header(path)
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        message = f"`{path}` is not a safetensors file"
        raise InputError.of(field, message, "give a complete checkpoint") from error


@contextmanager
def hub_errors(
    field: str, url: str, *, revision: str | None = None, variant: str | None = None
) -> Iterator[None]:
    """Turns what the hub and the loaders say into an `InputError` with the next action.

    Args:
        field: the option that names the place.
        url: its value.
        revision: what is asked for there.
        variant: of the weight files that are asked for there.
    """
    try:
        yield
    except tuple(kind for kind, *_ in _HUB_ANSWERS) as error:
        raise _hub_answer(error, field, url) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(error, field, url, revision=revision, variant=variant) from error


# Kind of error, the option at fault where it is not the place itself, message and hint; the
# first kind that fits counts, so special ones come before those they belong to.
_HUB_ANSWERS: tuple[tuple[type[Exception], str | None, str, str], ...] = (
    (
        GatedRepoError,
        None,
        "`{url}` is gated",
        "accept its licence at https://huggingface.co/{url}, then run `hf auth login`",
    ),
    (
        RevisionNotFoundError,
        "revision",
        "`{url}` has no such revision",
        "give a branch, tag or commit",
    ),
    (
        RepositoryNotFoundError,
        None,
        "`{url}` is not on the hub",
        "check the spelling; for a private one run `hf auth login` or set HF_TOKEN",
    ),
    (
        LocalEntryNotFoundError,
        None,
        "`{url}` is neither a local path nor in the cache, and the hub is out of reach",
        "connect once to download it, or give a local folder or .safetensors file",
    ),
    (
        OfflineModeIsEnabled,
        None,
        "`{url}` is neither a local path nor in the cache, and the hub is out of reach",
        "connect once to download it, or give a local folder or .safetensors file",
    ),
    (
        EntryNotFoundError,
        None,
        "`{url}` lacks a file that a model in diffusers' layout has",
        "check the id",
    ),
    (
        HFValidationError,
        None,
        "there is no `{url}`",
        "give an existing folder or file, or a hub id such as `owner/name`",
    ),
    (
        HfHubHTTPError,
        None,
        "`{url}`: the hub answered {error}",
        "try again later, or give a local folder",
    ),
)


def _hub_answer(error: Exception, field: str, url: str) -> InputError:
    for kind, option, message, hint in _HUB_ANSWERS:
        if isinstance(error, kind):
            told = message.format(url=url, error=error)
            return InputError.of(option or field, told, hint.format(url=url))
    raise AssertionError(error)


def _unloadable(
    error: Exception, field: str, url: str, *, revision: str | None, variant: str | None
) -> TrainerError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"there is no room to download `{url}`", "make room, or move HF_HOME")
    reason = str(error).strip().partition("\n")[0]
    # Loaders name the variant, or a file of it, when it is what they miss.
    if variant is not None and (f"variant={variant}" in reason or f".{variant}." in reason):
        place = f"https://huggingface.co/{url}/tree/{revision or 'main'}"
        hint = f"leave it out to take the plain files; which there are is seen at {place}"
        return InputError.of("variant", f"`{url}` has no weight files of `{variant}`", hint)
    message = f"`{url}` could not be loaded: {reason}"
    return InputError.of(field, message, "check that its files are complete")
