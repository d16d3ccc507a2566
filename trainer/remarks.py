"""What the user should know of captions, new tokens and masks once the pictures are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trainer.config import Note, TrainingConfig
from trainer.data.dataset import Dataset
from trainer.data.prepared import Example
from trainer.encoding import common_identifiers, cut_captions, tokenizer_of
from trainer.errors import InputError
from trainer.events import NoteEvent
from trainer.families.base import Family, token_encoders
from trainer.sources.captions import listed
from trainer.tokens import TokenNames, pool_at_end_of_text


def notes_on_captions(names: TokenNames, examples: Sequence[Example]) -> list[Note]:
    """Pictures that teach new tokens nothing, and class pictures that teach them the class.

    Raises:
        InputError: no picture teaches them anything.
    """
    identifiers = " or ".join(f"`{name}`" for name in names.identifiers)
    # Each picture once, at whatever sizes it is trained.
    examples = [example for example in examples if example.scale == 0]
    own = [e for e in examples if not e.is_class]
    without = [e.name for e in own if not names.occurs_in(e.caption)]
    if len(without) == len(own):
        raise InputError.of(
            "token_abstraction",
            f"no caption has {identifiers}, so the new tokens would learn nothing",
            "write it into the captions or the instance_prompt, give the word that stands there, "
            "or set `train_text_encoder_ti: false`",
        )
    of_class = [e.name for e in examples if e.is_class and names.occurs_in(e.caption)]
    remarks = {
        f"pictures have captions without {identifiers} and teach the new tokens nothing": without,
        f"class pictures have captions with {identifiers}, which then learns the class": of_class,
    }
    return [
        Note(
            kind="warning",
            field="token_abstraction",
            message=f"{len(found)} {remark}: {listed(found)}",
        )
        for remark, found in remarks.items()
        if found
    ]


def notes_on_words(
    config: TrainingConfig, family: Family, dataset: Dataset, names: TokenNames | None
) -> Iterator[NoteEvent]:
    """What the user should know of captions that are cut, and of identifiers that are words."""
    yield from cut_captions(family, dataset.all_captions(), names, config.data.instance_prompt)
    if names is None:
        yield from common_identifiers(family, [c.token for c in config.subjects() if c.token])


def notes_on_views(dataset: Dataset) -> list[Note]:
    """Pictures of which the masks leave nothing to see, and offsets without room.

    Raises:
        InputError: nothing is left of any picture.
    """
    unseen = dataset.unseen()
    if len(unseen) == sum(not example.is_class for example in dataset.examples):
        raise InputError.of(
            "images_data_url",
            "the masks keep nothing of what is seen of any picture",
            "paint white what lies in the middle window, or set `center_crop: false`",
        )
    notes = [
        Note(kind="ignored", field=option, message="no picture is longer than its window there")
        for option in dataset.offsets_without_room()
    ]
    if dataset.plan.filled:
        message = (
            f"{dataset.plan.filled} places an epoch are filled with pictures of the same size, "
            "which then count more; to fill none, set `batch_size: 1` with "
            "`gradient_accumulation_steps`"
        )
        field = "enable_bucket" if dataset.data.enable_bucket else "priority"
        notes.append(Note(kind="warning", field=field, message=message))
    if unseen:
        which = listed(list(dict.fromkeys(unseen)))
        message = f"the masks keep nothing of what is seen of {which}: they teach nothing"
        notes.append(Note(kind="warning", field="images_data_url", message=message))
    return notes


def pool_at_end(family: Family, names: TokenNames) -> list[Note]:
    """Pools at the end of the text from now on; a note where that changes no conditioning."""
    caption = "".join(names.all_tokens())
    with torch.no_grad():
        before = family.encode_text([caption])
        for name in token_encoders(family):
            pool_at_end_of_text(family.pipeline.components[name], tokenizer_of(family, name))
        after = family.encode_text([caption])
    if any(not torch.equal(before[name], after[name]) for name in before):
        return []
    message = "this base model takes nothing from a pooled vector that new tokens could move"
    return [Note(kind="ignored", field="ti_pooling", message=message)]
