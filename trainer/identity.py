"""What must be equal for two runs to be one, so that the later goes on from the earlier.

Settings that change the training, the number of processes, the pictures and the base model; not
where these lie, nor what only watches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from trainer.config import TrainingConfig
from trainer.data.plan import Portion
from trainer.data.prepared import Example
from trainer.leaves import PLACES

# Leaves that say where something is, and which of what is there; captions, masks, pictures and
# weights that came from there have digests of their own.
_WHERE = PLACES | {"model_family", "revision", "variant"}


def identity_of_settings(
    config: TrainingConfig, *, num_processes: int, in_shards: bool
) -> dict[str, Any]:
    """What is known before the pictures are read, as JSON can hold it."""
    left_out = {*_WHERE, *config.resolved.ignored_options}
    values = {name: v for name, v in config.result_values().items() if name not in left_out}
    if values.get("concepts"):
        values["concepts"] = [
            {name: value for name, value in concept.items() if name not in _WHERE}
            for concept in values["concepts"]
        ]
    spread = {"FSDP": True} if in_shards else {}
    return values | {"number of processes": num_processes} | spread


def identity_of_contents(
    examples: Sequence[Example], portions: Sequence[Portion], base_contents: str
) -> dict[str, Any]:
    """What the pictures and the base model add.

    Args:
        examples: the prepared pictures.
        portions: which of them each concept shows how often.
        base_contents: digest of the base model's weights, schedule and tokenizers.
    """
    pictures = [
        (e.name, e.sha256, e.caption, e.mask_sha256, e.is_class)
        + (e.original_size, e.size, e.target, e.window)
        for e in examples
    ]
    digest = hashlib.sha256(repr((pictures, tuple(portions))).encode()).hexdigest()
    return {"training pictures": digest, "base model's contents": base_contents}
