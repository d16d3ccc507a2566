"""Rows 48 to 61, 73 to 77 and 80 of the bad inputs: captions, and the words in them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import make_tiny_models
import tiny_vision
import torch
from asking import (
    REFUSED,
    Answer,
    Case,
    Content,
    Place,
    another_picture,
    beside,
    folder_of,
    refusals,
    said_in,
)
from transformers import CLIPTokenizer

from trainer import base_model, encoding
from trainer.base_model import Precision
from trainer.config import CaptionConfig, ModelConfig
from trainer.data.picture_set import PictureSet
from trainer.events import NoteEvent
from trainer.families.base import Family
from trainer.images import captioner
from trainer.resolve import Layer, resolve

ONE_PER_LINE = (
    'hint: write one object per line: {"file_name": "a.jpg", "text": "a photograph of a TOK"}'
)
NAMES = [f"g{number}.jpg" for number in range(5)]


def row(name: str, text: str = "a portrait of TOK") -> str:
    return json.dumps({"file_name": name, "text": text})


def table(*lines: str, encoded_as: str = "utf-8", **options: Any) -> Callable[[Place], PictureSet]:
    """Good pictures with a captions file of these lines."""

    def make(place: Place) -> PictureSet:
        place.folder.mkdir(exist_ok=True)
        path = place.folder / "captions.jsonl"
        path.write_bytes("\n".join(lines).encode(encoded_as))
        return folder_of(captions_file_url=str(path), **options)(place)

    return make


def texts(name: str, text: Content) -> dict[str, Content]:
    """A text file for each good picture."""
    return {name.format(n): text for n in range(5)}


def two_folders(place: Place) -> PictureSet:
    (place.folder / "captions.jsonl").write_text(row("1.jpg") + "\n" + row("g0.jpg"))
    files = {f"{folder}/1.jpg": another_picture(n) for n, folder in enumerate("ab")}
    return beside(files, captions_file_url=str(place.folder / "captions.jsonl"))(place)


def decomposed(place: Place) -> PictureSet:
    """A picture whose name a Mac wrote, and a caption of it that another system wrote."""
    (place.folder / "captions.jsonl").write_text(row(unicodedata.normalize("NFC", "Zoë.jpg")))
    return beside(
        {unicodedata.normalize("NFD", "Zoë.jpg"): another_picture(0)},
        captions_file_url=str(place.folder / "captions.jsonl"),
    )(place)


# Doors of their own


def family_of(place: Place) -> Family:
    base = base_model.locate(ModelConfig(model_url=str(place.base_model)))
    return base_model.load(base, Precision(*[torch.float32] * 4))


def encoded_captions(captions: Sequence[str], place: Place) -> Answer:
    """As the text encoders are given them; the tiny tokenizer has a token per letter."""
    notes = encoding.cut_captions(family_of(place), captions, None, "a TOK")
    return Answer(len(captions), tuple(said_in(notes, place)))


def known_to_the_tokenizer(identifiers: Sequence[str], place: Place) -> Answer:
    """To a tokenizer that has `sid` among its common words, and `sks` among the rare ones."""
    words = make_tiny_models.make_tokenizer(place.folder / "letters", "!").get_vocab()
    merges = ["s i", "si d</w>", *(f"! {letter}" for letter in words), "s k", "sk s</w>"]
    words |= {merge.replace(" ", ""): len(words) + n for n, merge in enumerate(merges)}
    (place.folder / "vocab.json").write_text(json.dumps(words))
    (place.folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    files = (str(place.folder / name) for name in ("vocab.json", "merges.txt"))
    family = family_of(place)
    family.pipeline.tokenizer = CLIPTokenizer(*files, pad_token="!")
    notes = encoding.common_identifiers(family, identifiers)
    return Answer(5, tuple(said_in(notes, place)))


def settled(options: dict[str, Any], place: Place) -> Answer:
    """What options mean together, before any picture is read."""
    with refusals(place) as refused:
        values = {"images_data_url": "photos", **options}
        config = resolve([Layer("train.yaml", values, explicit=True)])
        notes = [
            NoteEvent(note.kind, note.field, note.message)
            for note in config.resolved.notes
            if note.kind != "ignored"
        ]
        return Answer(5, tuple(said_in(notes, place)))
    return Answer(REFUSED, tuple(refused))


def useless_captioner(place: Place) -> PictureSet:
    folder = tiny_vision.tiny_llava(place.folder / "llava", says="I cannot describe this picture.")
    caption = CaptionConfig(captioner=str(folder))
    wanted = folder_of(skip_caption_generation=False, caption=caption)(place)
    return replace(wanted, trigger="TOK")


def chosen_captioner(name: str, place: Place) -> Answer:
    """On a machine with 11 GB to spare."""
    with refusals(place) as refused:
        captioner.choose(
            CaptionConfig(captioner=name, captioner_load_in_4bit=False),
            free_bytes=11 * 10**9,
            has_torchvision=False,
        )
    return Answer(REFUSED, tuple(refused))


CASES = (
    Case(
        48,
        "a captions file that is missing",
        lambda place: folder_of(captions_file_url=str(place.folder / "no.jsonl"))(place),
        REFUSED,
        (
            "error of captions_file_url: `no.jsonl` does not exist",
            "hint: check the path",
        ),
    ),
    Case(
        49,
        "one JSON list",
        table("[" + row("g0.jpg") + "]"),
        REFUSED,
        (
            "error of captions_file_url: `captions.jsonl` is one JSON list",
            ONE_PER_LINE,
        ),
    ),
    Case(
        50,
        "a table of comma-separated values",
        table("file_name,text", "g0.jpg,hello"),
        REFUSED,
        (
            (
                "error of captions_file_url: line 1, column 1 of `captions.jsonl` is not valid "
                "JSON (…): `file_name,text`; 1 more line likewise"
            ),
            ONE_PER_LINE,
        ),
    ),
    Case(
        51,
        "broken JSON in line 3",
        table(row("g0.jpg"), row("g1.jpg"), '{"file_name": "g2.jpg", "text": "a'),
        REFUSED,
        (
            (
                "error of captions_file_url: line 3, column 33 of `captions.jsonl` is not "
                "valid JSON (…)"
            ),
            ONE_PER_LINE,
        ),
    ),
    Case(
        52,
        "two objects on one line, as the fal documentation prints them",
        table(row("g0.jpg") + " " + row("g1.jpg"), *map(row, NAMES[2:])),
        5,
        (
            (
                "warning of captions_file_url: line 1 of `captions.jsonl` holds 2 objects; "
                "they are read, but put each on its own line for other programs"
            ),
        ),
        captions=5,
    ),
    Case(
        53,
        "another name of the column",
        table('{"file_name": "g0.jpg", "caption": "a"}'),
        REFUSED,
        (
            (
                "error of caption_column: line 1 of `captions.jsonl` has no `text` (it has: "
                "caption, file_name)"
            ),
            "hint: set `caption_column` to the key of the captions",
        ),
    ),
    Case(
        54,
        "a caption without a picture, and pictures without a caption",
        table(*map(row, [*NAMES[:3], "zzz.jpg"])),
        5,
        (
            (
                "warning of captions_file_url: 1 captions in `captions.jsonl` have no picture: "
                "`zzz.jpg`"
            ),
            (
                "warning of instance_prompt: 2 of 5 pictures have no caption of their own and "
                "get this one: `g3.jpg`, `g4.jpg`"
            ),
        ),
        captions=3,
    ),
    Case(
        55,
        "captions without the trigger, or in small letters",
        table(*[row(name, "a portrait of tok") for name in NAMES], trigger="TOK"),
        5,
        (
            (
                "warning of token_abstraction: 5 of 5 captions do not have the word `TOK` (5 "
                "have it in other letter case), so their pictures do not teach it; write it "
                "into them, or set `add_trigger: true`: `g0.jpg`, `g1.jpg`, `g2.jpg`, "
                "`g3.jpg`, `g4.jpg`"
            ),
        ),
        captions=5,
    ),
    Case(
        56,
        "UTF-8 with a byte order mark",
        table(*map(row, NAMES), encoded_as="utf-8-sig"),
        5,
        (),
        captions=5,
    ),
    Case(
        57,
        "text files in Windows-1252",
        beside(texts("g{}.txt", "TOK in a café".encode("cp1252"))),
        5,
        tuple(
            f"warning: `g{n}.txt` is not UTF-8 and was read as Windows-1252; save it as UTF-8"
            for n in range(5)
        ),
        captions=5,
    ),
    Case(
        58,
        "an empty text file, and one without its picture",
        beside({**texts("g{}.txt", "TOK"), "g0.txt": " \n", "zz.txt": "TOK"}),
        5,
        (
            "warning: the caption file `g0.txt` is empty",
            "warning: these text files are no picture's caption and are not used: `zz.txt`",
            (
                "warning of instance_prompt: 1 of 5 pictures have no caption of their own and "
                "get this one: `g0.jpg`"
            ),
        ),
        captions=4,
    ),
    Case(
        59, "text files named photo.jpg.txt", beside(texts("g{}.jpg.txt", "TOK")), 5, (), captions=5
    ),
    Case(
        60,
        "a caption that fits two pictures: refused, a wrong one would be learned",
        two_folders,
        REFUSED,
        (
            (
                "error of captions_file_url: line 1 of `captions.jsonl`: `1.jpg` fits "
                "`a/1.jpg`, `b/1.jpg`"
            ),
            "hint: write the path inside the archive",
        ),
    ),
    Case(
        61,
        "a name written in two ways, by a Mac and in the captions file",
        decomposed,
        6,
        (
            (
                "warning of instance_prompt: 5 of 6 pictures have no caption of their own and "
                "get this one: `g0.jpg`, `g1.jpg`, `g2.jpg`, `g3.jpg`, `g4.jpg`"
            ),
        ),
        captions=1,
    ),
    Case(
        73,
        "a caption longer than the text encoder reads",
        lambda _: ["a TOK", "a man who stands " + "y" * 62 + " " + "z" * 28],
        2,
        (
            (
                "warning of captions_file_url: the caption `a man who stands "
                "yyyyyyyyyyyyyyyyyyyyyyy …` is too long for the text encoder, which never "
                "sees: `zzzzzzzzzzzzzzzzzzzzzzzzzzzz`"
            ),
        ),
        door=encoded_captions,
    ),
    Case(
        74,
        "an everyday word as trigger",
        lambda _: {"token_abstraction": ["person"], "instance_prompt": "a photo of a person"},
        5,
        (
            (
                "warning of token_abstraction: `person` is an ordinary word: all that the "
                "model knows by it would change; use a made-up one such as `TOK` or `SIDAI`"
            ),
        ),
        door=settled,
    ),
    Case(
        75,
        "a trigger that is one common token; a rare one is as good as a made-up word",
        lambda _: ["TOK", "sid", "sks", "person", "SIDAI"],
        5,
        (
            (
                "warning of token_abstraction: `sid` is a common word to the text encoder: "
                "what it means already mixes with the subject; a made-up word such as `SIDAI` "
                "is safer"
            ),
        ),
        door=known_to_the_tokenizer,
    ),
    Case(
        76,
        "a captioner that refuses",
        useless_captioner,
        5,
        tuple(
            f"warning: `{name}` got no usable caption; it has the instance prompt" for name in NAMES
        ),
    ),
    Case(
        77,
        "a captioner that does not fit",
        lambda _: "joycaption",
        REFUSED,
        (
            "error of captioner: `joycaption` needs about 18 GB; 11 GB are free",
            "hint: use `captioner: qwen3-vl-2b`, load it in 4 bits, or give captions",
        ),
        door=chosen_captioner,
    ),
    Case(
        80,
        "a caption column and no captions file",
        folder_of(caption_column="long"),
        5,
        (
            (
                "ignored of caption_column: there is no captions_file_url, and no "
                "`metadata.jsonl` among the pictures"
            ),
        ),
    ),
)
