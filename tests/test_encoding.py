"""Captions on their way to the text encoders: what of them is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import base_model, encoding
from trainer.base_model import Precision
from trainer.config import DataConfig, ModelConfig
from trainer.data.dataset import Dataset
from trainer.data.plan import Plan
from trainer.data.prepare import prepare
from trainer.events import NoteEvent
from trainer.families.base import Family

FULL = Precision(torch.float32, torch.float32, torch.float32)
# The tiny tokenizers have one token per letter, two positions of 77 are the caption's marks.
FITS = "x" * 75
TOO_LONG = "a man who stands " + "y" * 62 + " " + "z" * 40


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> Family:
    folder = request.getfixturevalue(f"{request.param}_folder")
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)


def dataset_with(caption: str, photo_folder: Path, tmp_path: Path) -> Dataset:
    """Five pictures, of which four have the caption."""
    data = DataConfig(
        images_data_url=str(photo_folder),
        instance_prompt=caption,
        resolution_width=64,
        resolution_height=64,
    )
    preparing = prepare(data, tmp_path / "prepared", width=64, height=64)
    while True:
        try:
            next(preparing)
        except StopIteration as end:
            examples = end.value
            break
    plan = Plan(
        num_examples=len(examples),
        batch_size=1,
        gradient_accumulation_steps=1,
        num_processes=1,
        process_index=0,
        seed=0,
    )
    return Dataset(examples, plan, data, with_pixels=False)


def test_a_caption_that_fits_is_not_cut(family: Family) -> None:
    assert encoding.cut_off(family, FITS) == ""
    assert encoding.cut_off(family, "") == ""


def test_what_is_cut_off_makes_no_difference_to_the_text_encoders(family: Family) -> None:
    rest = encoding.cut_off(family, TOO_LONG)
    assert rest
    assert TOO_LONG.endswith(rest)
    cut = TOO_LONG.removesuffix(rest).rstrip()
    whole, kept = family.encode_text([TOO_LONG]), family.encode_text([cut])
    shorter = family.encode_text([cut[:-1]])
    for name, states in whole.items():
        assert torch.equal(states, kept[name])
    assert not torch.equal(whole["hidden_states"], shorter["hidden_states"])


def test_a_caption_that_is_too_long_is_named_with_what_is_cut_off(
    family: Family, photo_folder: Path, tmp_path: Path
) -> None:
    dataset = dataset_with(TOO_LONG, photo_folder, tmp_path)
    events = encoding.encode_captions(family, dataset, torch.device("cpu"))
    notes = [event for event in events if isinstance(event, NoteEvent)]
    (note,) = notes
    assert (note.note, note.field) == ("warning", "instance_prompt")
    assert "`a man who stands yyy" in note.message
    assert "z" * 40 in note.message


def test_captions_that_fit_are_encoded_without_a_word(
    family: Family, photo_folder: Path, tmp_path: Path
) -> None:
    dataset = dataset_with(FITS, photo_folder, tmp_path)
    events = encoding.encode_captions(family, dataset, torch.device("cpu"))
    assert not [event for event in events if isinstance(event, NoteEvent)]
