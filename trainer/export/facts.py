"""What a header or a model card may tell of a training: public facts, never a place or a person."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingFacts:
    """What was trained, on what, and how.

    Args:
        output_name: name of the result.
        base_model: hub id or plain name of the base model; see `public_name`.
        instance_prompts: of each concept the caption of pictures without one of their own; of
            several that are equal just one.
        num_images: training pictures; 0 where that is not known.
        width: trained width in pixels.
        height: trained height in pixels.
        captions: caption to the number of pictures that carry it.
        settings: hyperparameters by their flat names; only those with a place in a header or
            in the card are written.
        tokens: identifier in the captions to the new tokens that stand for it, in the order of
            their rows; empty without new tokens.
        token_prompts: the same with the tokens in the place of the identifiers.
    """

    output_name: str
    base_model: str = ""
    instance_prompts: tuple[str, ...] = ()
    num_images: int = 0
    width: int = 0
    height: int = 0
    captions: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    token_prompts: tuple[str, ...] = ()


def public_name(model_url: str) -> str:
    """A base model's hub id, or just the file or folder name where it is a local path.

    A file keeps its ending, as in sd-scripts' `ss_sd_model_name`.
    """
    is_place = os.sep in model_url and (
        Path(model_url).exists() or model_url.startswith((os.sep, ".", "~"))
    )
    return Path(model_url).name if is_place else model_url
