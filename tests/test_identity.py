"""What makes two runs one: what is in the places that a configuration names, not where they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.data.plan import Portion
from trainer.data.prepared import Example
from trainer.identity import identity_of_contents, identity_of_settings
from trainer.leaves import PLACES
from trainer.resolve import Layer, resolve

# Places, and settings with which each is read: what is not read makes no difference anyway.
READ: dict[str, dict[str, Any]] = {
    "captions_file_url": {},
    "captioner": {"skip_caption_generation": False},
    "class_images_url": {"with_prior_preservation": True, "photo_class": "Man"},
    "clipseg_url": {"segmenter": "clipseg", "clip_seg_mask_prompt": "head"},
    "face_detector_path": {"face_crop_region": 2.0},
    "face_restorer_path": {"face_restore": "gfpgan_1.4"},
    "images_data_url": {},
    "model_url": {},
    "single_file_config": {"model_url": "model.safetensors"},
    "vae_url": {},
}


def identity(**leaves: Any) -> dict[str, Any]:
    config = resolve([Layer("test", {"images_data_url": "photos", **leaves}, explicit=True)])
    read = set(leaves) - config.resolved.ignored_options.keys()
    assert read == set(leaves), config.resolved.ignored_options
    return identity_of_settings(config, num_processes=1, in_shards=False)


@pytest.mark.parametrize("leaf", READ)
def test_what_a_run_reads_may_lie_elsewhere_when_it_goes_on(leaf: str) -> None:
    here, there = (
        identity(**READ[leaf], **{leaf: f"{folder}/weights.safetensors"})
        for folder in ("here", "there")
    )
    assert here == there
    assert leaf in PLACES


def test_no_place_is_forgotten_here() -> None:
    assert READ.keys() == PLACES


def test_how_a_captioner_is_asked_and_what_it_wrote_make_another_run() -> None:
    written = READ["captioner"] | {"captioner": "a/folder"}
    asked = [identity(**written, caption_mode=mode) for mode in ("plain", "style")]
    assert asked[0] != asked[1]
    size = (64, 64)
    example = Example(0, "a.png", "a cat", "generated", Path("a.png"), "0" * 64, size, size, size)
    wrote = [
        identity_of_contents([one], [Portion((0,))], "base model")
        for one in (example, replace(example, caption="a dog"))
    ]
    assert wrote[0] != wrote[1]
