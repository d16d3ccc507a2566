"""Rows about captions that a model writes, and about the word that captions are given."""

from __future__ import annotations

from collections.abc import Callable

from options.bases import CAPTIONED, UNCACHED
from options.case import Case
from options.matrix import Leaves, Place, Row, acts, idle, refused
from options.onlookers import ALSO_SAYS, SAYS, SAYS_IN_4_BITS, SAYS_WHOLE
from options.rows_data import CAPTIONS, PLAIN, sees_the_caption_of_each

Shows = Callable[[Case], None]

NAMELESS: Leaves = {"captions_file_url": Place("nameless.jsonl"), **UNCACHED}
BARE = {name: f"a {name}" for name in PLAIN}
# What each mode makes of the captioner's sentence.
MODES = {
    "general": "TOK, a man sits on the red table",
    "character": "a photo of TOK sits on the red table",
    "product": "a photo of TOK, a man sits on the red table",
    "style": "A man sits on the red table, in the style of TOK",
}


def said(sentence: str, word: str = "TOK") -> dict[str, str]:
    """The caption of every picture that the mode `plain` makes of a captioner's sentence."""
    return dict.fromkeys(PLAIN, f"{word} {sentence.removesuffix('.')}")


def captions_become(after: dict[str, str], before: dict[str, str]) -> Shows:
    """Asserts what each picture goes with after the flip and before."""

    def shows(case: Case) -> None:
        sees_the_caption_of_each(case, case.before(), before)
        sees_the_caption_of_each(case, case.after(), after)

    return shows


def writes_in_mode(mode: str, caption: str) -> Row:
    return acts(
        "caption_mode",
        "conditioning",
        f"{mode}: captions are `{caption}`",
        captions_become(dict.fromkeys(PLAIN, caption), said(SAYS)),
        base=CAPTIONED,
        flipped={"caption_mode": mode},
    )


CAPTION = [
    acts(
        "skip_caption_generation",
        "conditioning",
        "false: pictures without a caption go with what the captioner writes",
        captions_become(said(SAYS), PLAIN),
        base={"captioner": Place("captioner"), **UNCACHED},
        flipped={"skip_caption_generation": False},
    ),
    acts(
        "skip_caption_generation",
        (),
        "changes nothing where every picture has a caption",
        Case.changes_nothing,
        base={**CAPTIONS, "captioner": Place("captioner")},
        flipped={"skip_caption_generation": False},
    ),
    acts(
        "skip_caption_generation",
        (),
        "changes nothing where no captioner can be had and none was named",
        Case.changes_nothing,
        flipped={"skip_caption_generation": False},
    ),
    acts(
        "captioner",
        "conditioning",
        "captions are the other model's",
        captions_become(said(ALSO_SAYS), said(SAYS)),
        base=CAPTIONED,
        flipped={"captioner": Place("other captioner")},
    ),
    refused("captioner", {"captioner": "lava"}, "allowed: `auto`, `llava`", base=CAPTIONED),
    refused(
        "captioner",
        {"captioner": Place("clipseg")},
        "is a `clipseg` model; allowed: `llava`",
        base=CAPTIONED,
    ),
    *(writes_in_mode(mode, caption) for mode, caption in MODES.items()),
    refused(
        "caption_mode",
        {"captioner": "blip", "caption_mode": "style"},
        "`blip` tells all that it sees",
        base=CAPTIONED,
    ),
    refused("caption_mode", {"caption_mode": "short"}, "plain, character, product, style, general"),
    acts(
        "captioner_load_in_4bit",
        "conditioning",
        "true: captions are what the captioner writes with weights of 4 bits",
        captions_become(said(SAYS_IN_4_BITS), said(SAYS_WHOLE)),
        base={**CAPTIONED, "captioner": Place("captioner of two minds")},
        flipped={"captioner_load_in_4bit": True},
    ),
    *idle(
        "skip_caption_generation is true",
        captioner=Place("captioner"),
        caption_mode="style",
        captioner_load_in_4bit=True,
    ),
    acts(
        "add_trigger",
        "conditioning",
        "the user's captions get the token in front",
        captions_become({name: f"TOK, {text}" for name, text in BARE.items()}, BARE),
        base=NAMELESS,
        flipped={"add_trigger": True},
    ),
    acts(
        "add_trigger",
        (),
        "changes nothing where every caption has the token",
        Case.changes_nothing,
        base=CAPTIONS,
        flipped={"add_trigger": True},
    ),
    acts(
        "photo_class",
        "conditioning",
        "captions about a person call it so",
        captions_become(
            dict.fromkeys(PLAIN, "a photo of TOK woman sits on the red table"),
            dict.fromkeys(PLAIN, MODES["character"]),
        ),
        base={**CAPTIONED, "caption_mode": "character"},
        flipped={"photo_class": "Woman"},
    ),
    acts(
        "token_abstraction",
        "conditioning",
        "captions that a model writes begin with the other word",
        captions_become(said(SAYS, "sks"), said(SAYS)),
        base=CAPTIONED,
        flipped={"token_abstraction": "sks"},
    ),
    acts(
        "token_abstraction",
        "conditioning",
        "the word that the user's captions get is the other one",
        captions_become(
            {name: f"sks, {text}" for name, text in BARE.items()},
            {name: f"TOK, {text}" for name, text in BARE.items()},
        ),
        base={**NAMELESS, "add_trigger": True},
        flipped={"token_abstraction": "sks"},
    ),
]
