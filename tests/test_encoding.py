"""Captions on their way to the text encoders and on to the denoiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer import base_model, encoding
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.encoding import Text
from trainer.families.base import Family
from trainer.tokens import TokenNames

FULL = Precision(*[torch.float32] * 4)
# The tiny tokenizers have one token per letter, two positions of 77 are the caption's marks.
FITS = "x" * 75
TOO_LONG = "a man who stands " + "y" * 62 + " " + "z" * 40


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> Family:
    folder = request.getfixturevalue(f"{request.param}_folder")
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)


def test_a_caption_that_fits_is_not_cut(family: Family) -> None:
    assert encoding.cut_off(family, FITS, None) == ""
    assert encoding.cut_off(family, "", None) == ""


def test_what_is_cut_off_makes_no_difference_to_the_text_encoders(family: Family) -> None:
    rest = encoding.cut_off(family, TOO_LONG, None)
    assert rest
    assert TOO_LONG.endswith(rest)
    cut = TOO_LONG.removesuffix(rest).rstrip()
    whole, kept = family.encode_text([TOO_LONG]), family.encode_text([cut])
    shorter = family.encode_text([cut[:-1]])
    for name, states in whole.items():
        assert torch.equal(states, kept[name])
    assert not torch.equal(whole["prompt_embeds"], shorter["prompt_embeds"])


def test_the_words_in_which_a_language_model_is_asked_take_room(flux2_folder: Path) -> None:
    family = base_model.load(base_model.locate(ModelConfig(model_url=str(flux2_folder))), FULL)
    family.max_sequence_length = 16
    tokenizer = encoding.tokenizer_of(family, "text_encoder")
    whole = "a" * 10 + "zzz"
    rest = encoding.cut_off(family, whole, None)
    seen = len(tokenizer(whole).input_ids) - len(tokenizer(rest).input_ids)

    assert rest
    states = [family.encode_text([text])["prompt_embeds"] for text in (whole, whole[:seen])]
    shorter = family.encode_text([whole[: seen - 1]])["prompt_embeds"]
    assert torch.equal(*states)
    assert not torch.equal(states[0], shorter)


def test_a_caption_that_is_too_long_is_named_with_what_is_cut_off(family: Family) -> None:
    (note,) = encoding.cut_captions(family, [FITS, TOO_LONG], None, instance_prompt=TOO_LONG)
    assert (note.note, note.field) == ("warning", "instance_prompt")
    assert "`a man who stands yyy" in note.message
    assert "z" * 40 in note.message


def test_new_tokens_take_the_room_of_one_letter_each(family: Family) -> None:
    names = TokenNames(("TOK",), 2)
    for name in family.text_encoder_names:
        encoding.tokenizer_of(family, name).add_tokens(list(names.all_tokens()))
    # 73 letters and two new tokens fill the 75 positions.
    assert encoding.cut_off(family, f"{'x' * 73} TOK", names) == ""
    assert encoding.cut_off(family, f"{'x' * 74} TOK", names) == "<s1>"


def captions_of(family: Family, names: TokenNames | None = None) -> Text:
    captions = ["a TOK", "", "a man"]
    return Text(family, captions, names, torch.device("cpu"))


def test_a_live_batch_has_a_row_for_each_caption_in_its_order(family: Family) -> None:
    text = captions_of(family)
    batch = text.of(["a man", "a TOK", "a man"])
    for row, caption in enumerate(["a man", "a TOK", "a man"]):
        for name, states in family.encode_text([caption]).items():
            torch.testing.assert_close(batch[name][row], states[0])
    assert text.is_live


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize("captions", [["a TOK"], ["a TOK", "a man"]])
def test_an_only_kept_caption_may_be_lent_to_a_whole_batch(
    family: Family, captions: list[str], lends: bool
) -> None:
    text = Text(family, captions, None, torch.device("cpu"), lends=lends)
    asked = [captions[-1]] * 3
    live = text.of(asked)
    list(text.keep())
    for name, states in text.of(asked).items():
        torch.testing.assert_close(states, live[name])
        assert (states.stride(0) == 0) is (lends and len(captions) == 1)
        # What is given is no part of what is kept.
        states[0].fill_(7)
    again = text.of(asked)
    assert all(torch.equal(again[name], live[name].detach()) for name in live)


def test_kept_captions_are_what_they_were_and_the_encoders_are_given_up(family: Family) -> None:
    text = captions_of(family)
    live = text.of(["a man", "", "a TOK"])
    events = list(text.keep())
    assert [(event.done, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert not text.is_live
    assert all(family.pipeline.components[name] is None for name in family.text_encoder_names)
    for name, states in text.of(["a man", "", "a TOK"]).items():
        torch.testing.assert_close(states, live[name])
        assert not states.requires_grad
