"""Identifiers that are everyday words: the model knows them, and training would change them all."""

from __future__ import annotations

import re

from trainer.rules.draft import Draft
from trainer.sections.subjects import subjects_of

_WORD_LIST = """
a about an and at by for from in it my of on one or our some style that the this to with your
man woman person people human boy girl baby child kid guy lady teen adult male female
gentleman husband wife father mother dad mom mum son daughter brother sister friend couple
family face head body hair hand eye smile
dog puppy cat kitten pet animal horse bird fish
car bike truck house home building room tree flower plant food cake bottle cup mug shoe
sneaker boot bag backpack watch chair table sofa lamp phone toy doll dress shirt hat jacket
glass ring product object item thing stuff subject character concept brand logo
photo photograph picture image portrait selfie painting drawing illustration sketch artwork
art render anime cartoon comic poster icon landscape city street beach sky
"""
_ORDINARY_WORDS = frozenset(_WORD_LIST.split())


def is_ordinary(identifier: str) -> bool:
    """Whether an identifier is nothing but everyday words, which the model knows already."""
    parts = re.findall(r"\w+", identifier.lower())
    return bool(parts) and all({part, part.removesuffix("s")} & _ORDINARY_WORDS for part in parts)


def warn_of_ordinary_identifiers(draft: Draft) -> None:
    """Learning an everyday word changes what the model knows by it; a new token changes none."""
    if draft.values["train_text_encoder_ti"]:
        return
    identifiers = [subject.token or "" for subject in subjects_of(draft.values)]
    for identifier in dict.fromkeys(filter(is_ordinary, identifiers)):
        message = f"`{identifier}` is an ordinary word: all that the model knows by it would change"
        advice = "use a made-up one such as `TOK` or `SIDAI`"
        draft.note("warning", "token_abstraction", f"{message}; {advice}")
