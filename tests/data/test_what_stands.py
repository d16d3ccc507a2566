"""What an earlier preparation left stands, and for a begun training even what was makeshift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from grid import encoded, grid_bytes, picture_set, prepared, write_folder
from PIL import Image

from trainer.config import CaptionConfig, FaceConfig
from trainer.data import means, views
from trainer.data.captioning import CAPTIONS
from trainer.data.prepare import forget
from trainer.data.prepared import Example, earlier_index
from trainer.errors import InputError
from trainer.events import Event, NoteEvent
from trainer.images import captioner, pretrained
from trainer.images.captioner import Unavailable
from trainer.images.faces import Face

PROMPT = "A photograph of a TOK"


class Writer:
    """A captioner that always says the same."""

    follows_instructions = True

    def caption(self, image: Image.Image, instruction: str) -> str:
        return "a grid of colours"

    def close(self) -> None:
        """Nothing to give back."""


class Detector:
    """Finds one face at a place."""

    def __init__(self, identity: str, left: float) -> None:
        self.identity = identity
        self.left = left

    def find(self, image: Image.Image) -> tuple[Face, ...]:
        return (Face(left=self.left, top=20, width=30, height=30, score=1),)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", {f"{n}.png": grid_bytes(80, 200, 60 * n) for n in (1, 2)})


def with_captioner(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    def identity(_: object) -> str:
        if not there:
            raise Unavailable("the captioner cannot be had")
        return "writer"

    monkeypatch.setattr(pretrained, "free_bytes", lambda: 10**12)
    monkeypatch.setattr(captioner, "identity_of", identity)
    monkeypatch.setattr(captioner, "load", lambda _: Writer())


def with_detector(monkeypatch: pytest.MonkeyPatch, detector: Detector, *warnings: str) -> None:
    monkeypatch.setattr(means, "detector_of", lambda _: (detector, warnings))


def captioned(
    pictures: Path, folder: Path, *, settled: bool = False, skip: bool = False
) -> tuple[list[Event], tuple[Example, ...]]:
    wanted = picture_set(
        pictures, caption=CaptionConfig(), trigger="TOK", skip_caption_generation=skip
    )
    return prepared(wanted, folder, settled=settled)


def texts(examples: tuple[Example, ...]) -> list[str]:
    return [example.caption for example in examples]


def said(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, NoteEvent)]


def test_a_captioner_that_can_be_had_later_is_asked_unless_a_training_has_begun(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captioner(monkeypatch, there=False)
    captioned(pictures, tmp_path / "prepared")
    with_captioner(monkeypatch, there=True)

    _, begun = captioned(pictures, tmp_path / "prepared", settled=True)
    _, later = captioned(pictures, tmp_path / "prepared")

    assert texts(begun) == [PROMPT] * 2
    assert texts(later) == ["TOK a grid of colours"] * 2


def test_captions_that_were_written_stay_where_no_captioner_can_be_had_for_a_new_picture(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captioner(monkeypatch, there=True)
    captioned(pictures, tmp_path / "prepared")
    write_folder(pictures, {"0.png": grid_bytes(80, 200, 0)})
    with_captioner(monkeypatch, there=False)

    events, examples = captioned(pictures, tmp_path / "prepared")

    assert texts(examples) == [PROMPT, *["TOK a grid of colours"] * 2]
    assert any("the instance prompt goes with `0.png`" in message for message in said(events))


def test_a_captions_file_that_the_user_changed_is_kept(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captioner(monkeypatch, there=True)
    captioned(pictures, tmp_path / "prepared")
    mine = '{"file_name": "1.png", "text": "TOK as I see it"}\n'
    (tmp_path / "prepared" / CAPTIONS).write_text(mine)

    events, _ = captioned(pictures, tmp_path / "prepared")

    assert (tmp_path / "prepared" / CAPTIONS).read_text() == mine
    assert any("was changed and is kept" in message for message in said(events))


def test_the_captions_file_goes_where_no_captions_are_wanted_any_more(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captioner(monkeypatch, there=True)
    captioned(pictures, tmp_path / "prepared")

    _, examples = captioned(pictures, tmp_path / "prepared", skip=True)

    assert texts(examples) == [PROMPT] * 2
    assert not (tmp_path / "prepared" / CAPTIONS).exists()


def faces(
    pictures: Path, folder: Path, *, settled: bool = False, **face: Any
) -> tuple[list[Event], tuple[Example, ...]]:
    wanted = picture_set(
        pictures, face=FaceConfig(**face), face_aware_cropping=True, center_crop=False
    )
    return prepared(wanted, folder, settled=settled)


def test_what_a_makeshift_detector_found_gives_way_to_a_better_one_unless_a_training_has_begun(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_detector(monkeypatch, Detector("makeshift", 0), "makeshift")
    _, first = faces(pictures, tmp_path / "prepared")
    with_detector(monkeypatch, Detector("better", 150))

    _, begun = faces(pictures, tmp_path / "prepared", settled=True)
    _, later = faces(pictures, tmp_path / "prepared")

    assert [e.window for e in begun] == [e.window for e in first] == [(0, 0)] * 2
    # 200 columns became 160, of which a window of 64 shows the last.
    assert [e.window for e in later] == [(0, 96)] * 2


def test_what_a_good_detector_found_stands_where_there_is_only_a_makeshift_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_detector(monkeypatch, Detector("better", 150))
    first = faces(pictures, tmp_path / "prepared")
    with_detector(monkeypatch, Detector("makeshift", 0), "makeshift")

    again = faces(pictures, tmp_path / "prepared")

    assert again == first


def test_a_detector_that_is_gone_is_asked_for_only_by_a_new_picture(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_detector(monkeypatch, Detector("better", 150))
    first = faces(pictures, tmp_path / "prepared", face_detector="yunet")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert faces(pictures, tmp_path / "prepared", face_detector="yunet") == first
    write_folder(pictures, {"3.png": grid_bytes(80, 200, 10)})
    with pytest.raises(InputError, match="face_detector"):
        faces(pictures, tmp_path / "prepared", face_detector="yunet")


def test_pictures_that_move_up_or_down_keep_what_was_made_of_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = prepared(picture_set(pictures), tmp_path / "prepared")
    before = [example.path.read_bytes() for example in first]
    write_folder(pictures, {"0.png": grid_bytes(80, 200, 0)})
    _, longer = prepared(picture_set(pictures), tmp_path / "prepared")
    assert [example.path.read_bytes() for example in longer[1:]] == before
    (pictures / "0.png").unlink()
    # Even where the store is lost.
    (tmp_path / "store").rename(tmp_path / "lost")
    monkeypatch.delattr(views, "decode")

    _, shorter = prepared(picture_set(pictures), tmp_path / "prepared")

    assert [example.path.read_bytes() for example in shorter] == before
    assert [example.number for example in shorter] == [0, 1]


def test_a_captioner_that_does_not_exist_is_refused_before_anything_is_decoded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(views, "decode")
    wanted = picture_set(
        pictures,
        caption=CaptionConfig(captioner=str(tmp_path / "nowhere")),
        trigger="TOK",
        skip_caption_generation=False,
    )

    with pytest.raises(InputError) as caught:
        prepared(wanted, tmp_path / "prepared")

    assert caught.value.problems[0].field == "captioner"


def test_of_many_remarked_pictures_ten_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    soft = {f"{n:02d}.png": encoded(Image.new("RGB", (80, 80), (n, 0, 0))) for n in range(13)}

    events, _ = prepared(picture_set(write_folder(tmp_path / "set", soft)), tmp_path / "prepared")

    assert sum("one flat colour" in message for message in said(events)) == 10
    assert any(message.startswith("3 more pictures deserve a look") for message in said(events))


def test_what_was_prepared_is_forgotten_and_nothing_else(pictures: Path, tmp_path: Path) -> None:
    prepared(picture_set(pictures), tmp_path / "prepared")
    (tmp_path / "prepared" / "mine.txt").write_text("mine")
    (tmp_path / "prepared" / "download-0").write_text("theirs")

    forget(tmp_path / "prepared")

    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["mine.txt"]
    assert earlier_index(tmp_path / "prepared").pictures == ()


def test_the_index_and_the_captions_file_agree(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captioner(monkeypatch, there=True)
    captioned(pictures, tmp_path / "prepared")

    lines = (tmp_path / "prepared" / CAPTIONS).read_text().splitlines()
    rows = {row["file_name"]: row["text"] for row in map(json.loads, lines)}

    assert rows == {p.name: p.caption for p in earlier_index(tmp_path / "prepared").pictures}
