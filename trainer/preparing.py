"""Preparing without training: pictures, masks and captions in a run folder, to be looked at.

A training with the same options in the same folder goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer import base_model
from trainer.concepts import prepare_concepts, prepared_sets
from trainer.config import TrainingConfig
from trainer.data import overview
from trainer.errors import InputError, Interrupted, OutOfMemoryError, TrainerError
from trainer.events import Event, NoteEvent
from trainer.job import RunFolder
from trainer.machine import completed
from trainer.processes import ALONE
from trainer.runner import Stop

_MEMORY_HINT = (
    "leave the GPU to this program alone, or prepare on the processor with `CUDA_VISIBLE_DEVICES=`"
)


def prepare(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    """Prepares the pictures of all concepts, and class pictures that are the user's own.

    The base model is looked at only where no size is given, for its own. What there is to say of
    the pictures stands in their report, and is said on the way only if that is not reached.

    Args:
        stop: asked after every event; true ends it.

    Raises:
        InputError: pictures, captions or masks cannot be used, or the folder holds a training.
        DiskError: the folder cannot be written.
        Interrupted: it was stopped.
        OutOfMemoryError: a model that looks at pictures does not fit.
    """
    if folder.checkpoints.exists():
        message = f"`{folder.root}` holds a training already"
        raise InputError.of("--output", message, "give another folder")
    if config.data.resolution_width is None:
        base = base_model.locate(config.model, vae_is_explicit=config.is_explicit("vae_url"))
        config = completed(config, base)
    for note in config.resolved.notes:
        yield NoteEvent(note.kind, note.field, note.message)
    notes: list[NoteEvent] = []
    try:
        for event in prepare_concepts(config, folder, ALONE):
            if isinstance(event, NoteEvent):
                notes.append(event)
            else:
                yield event
            if stop():
                raise Interrupted(
                    "stopped before all pictures were prepared", "run the same command to go on"
                )
    except TrainerError:
        yield from notes
        raise
    except torch.OutOfMemoryError as error:
        yield from notes
        reason = str(error).split(". ", maxsplit=1)[0]
        raise OutOfMemoryError(reason, _MEMORY_HINT) from error


def report(config: TrainingConfig, folder: RunFolder) -> dict[str, Any]:
    """What `prepare` left in a run folder, as JSON can hold it."""
    return {
        "folder": str(folder.root.resolve()),
        "sets": [_set(place, fields) for place, fields in prepared_sets(config, folder)],
    }


def _set(place: Path, fields: Mapping[str, str]) -> dict[str, Any]:
    """What lies in the folder of one set.

    Args:
        fields: what the user calls its options.
    """
    found = overview.written_report(place)
    assert found is not None
    notes = [{**note, "field": fields.get(note["field"], note["field"])} for note in found["notes"]]
    return {
        "folder": str(place.resolve()),
        "contact_sheets": [str(path.resolve()) for path in overview.sheets(place)],
        **found,
        "notes": notes,
    }
