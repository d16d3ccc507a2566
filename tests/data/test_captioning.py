"""Captions for pictures without one: who is asked, how often, and what becomes of the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from grid import grid_bytes, picture_set, prepared, write_folder
from PIL import Image
from tiny_vision import tiny_llava

from trainer.config import CaptionConfig
from trainer.data.captioning import CAPTIONS
from trainer.data.prepared import Example, earlier_index
from trainer.errors import InputError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.images import captioner, pretrained
from trainer.images.captioner import Choice, Unavailable

SAID = "one grid of colours lies on the table."
WRITTEN = "TOK one grid of colours lies on the table"


@dataclass
class Writer:
    """A captioner that says these in turn, and remembers what it was asked.

    Args:
        says: answers; an error is raised.
    """

    says: list[str | Exception]
    identity: str = "writer"
    follows_instructions: bool = True
    asked: list[str] = field(default_factory=list)
    loaded: int = 0
    closed: int = 0

    def caption(self, image: Image.Image, instruction: str) -> str:
        self.asked.append(instruction)
        answer = self.says[len(self.asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, the second with a caption of its own."""
    files: dict[str, Any] = {f"{n}.png": grid_bytes(blue=60 * n) for n in range(3)}
    return write_folder(tmp_path / "set", {**files, "1.txt": "my own TOK"})


def writing(monkeypatch: pytest.MonkeyPatch, *says: str | Exception) -> Writer:
    """Puts a writer in the place of every captioner."""
    writer = Writer(list(says))

    def load(_: Choice) -> Writer:
        writer.loaded += 1
        return writer

    monkeypatch.setattr(pretrained, "free_bytes", lambda: 10**12)
    monkeypatch.setattr(captioner, "identity_of", lambda _: writer.identity)
    monkeypatch.setattr(captioner, "load", load)
    return writer


def run(
    pictures: Path, folder: Path, *, trigger: str = "TOK", skip: bool = False, **caption: Any
) -> tuple[list[Event], tuple[Example, ...]]:
    wanted = picture_set(
        pictures,
        caption=CaptionConfig(**caption),
        trigger=trigger,
        skip_caption_generation=skip,
    )
    return prepared(wanted, folder)


def captions(examples: tuple[Example, ...]) -> list[tuple[str, str]]:
    return [(example.caption, example.caption_origin) for example in examples]


def notes(events: list[Event], kind: str) -> list[str]:
    found = [event for event in events if isinstance(event, NoteEvent) and event.note == kind]
    return [event.message for event in found]


def test_pictures_without_a_caption_get_one_and_others_keep_theirs(
    pictures: Path, tmp_path: Path
) -> None:
    model = tiny_llava(tmp_path / "llava", says=SAID)

    events, examples = run(pictures, tmp_path / "prepared", captioner=str(model))

    written = (WRITTEN, "generated")
    assert captions(examples) == [written, ("my own TOK", "txt"), written]
    stages = [e for e in events if isinstance(e, StageEvent) and e.stage == "caption"]
    assert [(stage.done, stage.total) for stage in stages] == [(1, 2), (2, 2)]
    lines = (tmp_path / "prepared" / CAPTIONS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": "0.png", "text": WRITTEN},
        {"file_name": "1.png", "text": "my own TOK"},
        {"file_name": "2.png", "text": WRITTEN},
    ]


def test_another_model_in_the_same_place_is_another_model(pictures: Path, tmp_path: Path) -> None:
    model = str(tiny_llava(tmp_path / "llava", says=SAID))
    run(pictures, tmp_path / "one", captioner=model)
    tiny_llava(tmp_path / "llava", says="two squares.")

    _, examples = run(pictures, tmp_path / "two", captioner=model)

    assert examples[0].caption == "TOK two squares"


def test_where_captions_are_skipped_nobody_is_asked(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writing(monkeypatch)

    _, examples = run(pictures, tmp_path / "prepared", skip=True)

    assert {example.caption_origin for example in examples} == {"instance_prompt", "txt"}
    assert writer.loaded == 0
    assert not (tmp_path / "prepared" / CAPTIONS).exists()


def test_where_every_picture_has_a_caption_no_model_is_even_chosen(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(pictures, {"0.txt": "TOK", "2.txt": "TOK"})
    monkeypatch.delattr(captioner, "choose")

    _, examples = run(pictures, tmp_path / "prepared")

    assert {example.caption_origin for example in examples} == {"txt"}


def test_one_model_is_loaded_for_all_and_given_up_at_the_end(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writing(monkeypatch, "a cup", "a hat")

    _, examples = run(pictures, tmp_path / "prepared")

    assert [example.caption for example in examples] == ["TOK a cup", "my own TOK", "TOK a hat"]
    assert (writer.loaded, len(writer.asked), writer.closed) == (1, 2, 1)


def test_a_model_is_given_up_also_where_it_fails(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writing(monkeypatch, "a cup", InputError.of("captioner", "fails", "take another"))

    with pytest.raises(InputError):
        run(pictures, tmp_path / "prepared")

    assert writer.closed == 1


def test_what_was_written_before_a_failure_is_not_asked_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "a cup", InputError.of("captioner", "fails", "take another"))
    with pytest.raises(InputError):
        run(pictures, tmp_path / "prepared")
    second = writing(monkeypatch, "a hat")

    _, examples = run(pictures, tmp_path / "prepared")

    assert [example.caption for example in examples] == ["TOK a cup", "my own TOK", "TOK a hat"]
    assert len(second.asked) == 1


def test_another_word_for_the_subject_is_put_into_what_is_known(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "a cup", "a hat")
    run(pictures, tmp_path / "prepared")
    second = writing(monkeypatch)

    _, examples = run(pictures, tmp_path / "prepared", trigger="SKS")

    assert [e.caption for e in examples if e.caption_origin == "generated"] == [
        *("SKS a cup", "SKS a hat")
    ]
    assert (second.loaded, second.asked) == (0, [])


def test_another_mode_asks_another_question(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = writing(monkeypatch, "a cup", "a hat")
    run(pictures, tmp_path / "prepared")
    second = writing(monkeypatch, "a red cup", "a red hat")

    run(pictures, tmp_path / "prepared", caption_mode="style")

    assert len(set(first.asked)) == len(set(second.asked)) == 1
    assert set(first.asked) != set(second.asked)


def test_an_answer_of_no_use_leaves_the_instance_prompt_and_a_remark(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "I'm sorry, I cannot help with that.", "a hat")

    events, examples = run(pictures, tmp_path / "prepared")

    assert captions(examples)[0] == ("A photograph of a TOK", "instance_prompt")
    assert captions(examples)[2] == ("TOK a hat", "generated")
    assert "`0.png` got no usable caption; it has the instance prompt" in notes(events, "warning")
    remarks = earlier_index(tmp_path / "prepared").pictures[0].remarks
    assert "got no usable caption" in remarks[-1].text


def test_what_was_of_no_use_is_not_asked_again_and_still_said(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "I'm sorry, I cannot help with that.", "a hat")
    first = run(pictures, tmp_path / "a" / "prepared")
    second = writing(monkeypatch)
    # Even where the store is lost.
    (tmp_path / "a" / "store").rename(tmp_path / "lost")

    again = run(pictures, tmp_path / "a" / "prepared")

    assert again == first
    assert second.loaded == 0


def test_where_none_can_be_had_the_instance_prompt_goes_with_them_and_a_note_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "a cup", Unavailable("the captioner has too little memory"))

    events, examples = run(pictures, tmp_path / "prepared")

    assert captions(examples) == [
        ("TOK a cup", "generated"),
        ("my own TOK", "txt"),
        ("A photograph of a TOK", "instance_prompt"),
    ]
    assert notes(events, "yielded") == [
        "the captioner has too little memory: the instance prompt goes with `2.png`"
    ]


def test_class_pictures_are_never_put_into_words(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writing(monkeypatch)

    wanted = picture_set(pictures, of_class=True, skip_caption_generation=False)
    prepared(wanted, tmp_path / "prepared")

    assert writer.loaded == 0


def test_what_generates_a_caption_is_forgotten_when_the_user_writes_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, "a cup", "a hat")
    run(pictures, tmp_path / "prepared")
    write_folder(pictures, {"0.txt": "TOK drinks"})
    run(pictures, tmp_path / "prepared")
    (pictures / "0.txt").unlink()

    _, examples = run(pictures, tmp_path / "prepared")

    assert captions(examples)[0] == ("TOK a cup", "generated")
