"""Pictures one by one: a list in the place of one location, gathered into one archive."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from grid import grid_bytes, picture_set, write_folder

from trainer.config_files import as_layers, parse_yaml, write_config
from trainer.data.report import DataReport, inspect
from trainer.errors import InputError
from trainer.picture_lists import ListedPicture, listed_pictures, locations_in, picture_list
from trainer.resolve import Layer, resolve
from trainer.sources.archive import open_source
from trainer.sources.download import downloaded

PICTURES = [grid_bytes(blue=60 * n) for n in range(3)]


def listed(*places: str | Path, captions: Sequence[str | None] = ()) -> str:
    texts = [*captions, *[None] * len(places)]
    return picture_list([ListedPicture(str(p), texts[n]) for n, p in enumerate(places)])


def gathered(location: str, folder: Path) -> Path:
    gathering = downloaded(location, folder)
    while True:
        try:
            next(gathering)
        except StopIteration as end:
            path: Path = end.value
            return path


def found(location: str) -> DataReport:
    return inspect(picture_set(cast(Path, location)))


def everywhere(folder: Path) -> str:
    """A list of a path, a data: URI and bare base64."""
    write_folder(folder, {"a b.png": PICTURES[0]})
    texts = [base64.b64encode(picture).decode() for picture in PICTURES]
    places = (folder / "a b.png", f"data:image/png;base64,{texts[1]}", texts[2])
    return listed(*places, captions=("ohwx, ä\n", None, "three"))


def test_a_list_says_what_was_put_into_it() -> None:
    pictures = (ListedPicture("a/ü %41.jpg", "a, 'b' \"c\"\nd"), ListedPicture("b+/="))

    assert listed_pictures(picture_list(pictures)) == pictures
    assert locations_in(picture_list(pictures)) == ("a/ü %41.jpg", "b+/=")
    assert locations_in("photos") == ("photos",)


def test_pictures_from_everywhere_are_together_in_their_order(tmp_path: Path) -> None:
    location = everywhere(tmp_path / "own")
    path = gathered(location, tmp_path / "folder")

    with open_source(location, path) as source:
        files = {entry.name: source.read(entry.name) for entry in source.entries()}

    assert [content for name, content in files.items() if name[-4:] != ".txt"] == PICTURES
    assert {name: text.decode() for name, text in files.items() if name[-4:] == ".txt"} == {
        "000-a b.txt": "ohwx, ä\n",
        "002-image.txt": "three",
    }


def test_captions_of_a_list_are_the_pictures_own(tmp_path: Path) -> None:
    report = found(everywhere(tmp_path / "own"))

    assert [(p.caption, p.caption_origin) for p in report.pictures] == [
        ("ohwx, ä", "txt"),
        ("A photograph of a TOK", "instance_prompt"),
        ("three", "txt"),
    ]


def test_equal_pictures_give_equal_archives_and_changed_ones_are_packed_again(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path, {"a.png": PICTURES[0]})
    location = listed(tmp_path / "a.png")
    first = gathered(location, tmp_path / "folder").read_bytes()
    again = gathered(location, tmp_path / "other").read_bytes()
    write_folder(tmp_path, {"a.png": PICTURES[1]})

    changed = gathered(location, tmp_path / "folder").read_bytes()

    assert first == again
    assert PICTURES[1] in changed


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nothing.jpg", "does not exist"),
        ("file:///etc/passwd", "file:// is not read"),
        ("http://127.0.0.1:1/a.jpg", "not on the public internet"),
        ("note.txt", "number 2 of the list, `note.txt`, is not a picture"),
    ],
)
def test_a_bad_place_in_a_list_is_refused_and_leaves_nothing(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_folder(tmp_path, {"a.png": PICTURES[0], "note.txt": "words"}))

    with pytest.raises(InputError, match=said) as caught:
        gathered(listed("a.png", place), tmp_path / "folder")

    assert [problem.field for problem in caught.value.problems] == ["images_data_url"]
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    "lines", ["", "[1]", '{"file_name": ""}', '{"file_name": "a", "text": 1}', "{}\n{}", "{"]
)
def test_a_damaged_list_is_told_by_its_line(lines: str) -> None:
    with pytest.raises(InputError, match="line 1 of the list of pictures"):
        locations_in(f"data:application/jsonl,{lines}")


def test_a_list_in_a_list_is_refused() -> None:
    with pytest.raises(InputError, match="has no location"):
        locations_in(listed(listed("a.png")))


def test_a_written_configuration_keeps_the_list_or_its_digest(tmp_path: Path) -> None:
    location = everywhere(tmp_path / "own")
    config = resolve([Layer("flags", {"images_data_url": location}, explicit=True)])

    back = resolve(as_layers(parse_yaml(write_config(config), "a"), "a"))

    assert back.data.images_data_url == location
    assert "data:sha256," in write_config(config, with_contents=False)
