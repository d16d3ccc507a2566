"""A folder of pictures is the earlier one or the new one, wherever its replacement is cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainer import picture_folder
from trainer.errors import InputError
from trainer.picture_folder import GRID, PictureFolder


class Cut(BaseException):
    """The power fails."""


def put(folder: PictureFolder, **contents: str) -> None:
    """Makes pictures of these contents."""
    with folder.making() as place:
        for name, content in {**contents, "grid": "".join(contents.values())}.items():
            (place / f"{name}.png").write_text(content)
        folder.publish({"pictures": [{"path": f"{name}.png"} for name in contents]})


def seen(folder: PictureFolder) -> dict[str, str]:
    return {
        path.name: path.read_text()
        for path in folder.root.iterdir()
        if path.is_file() and path != folder.index
    }


@pytest.fixture
def folder(tmp_path: Path) -> PictureFolder:
    return PictureFolder(tmp_path / "pictures", "pictures.json")


def test_an_earlier_sampling_is_replaced_whole_and_strangers_stay(folder: PictureFolder) -> None:
    put(folder, a="1", b="2")
    (folder.root / "notes.txt").write_text("mine")

    put(folder, b="3", c="4")

    assert seen(folder) == {"b.png": "3", "c.png": "4", GRID: "34", "notes.txt": "mine"}
    assert json.loads(folder.index.read_text()) == {
        "pictures": [{"path": "b.png"}, {"path": "c.png"}]
    }
    assert [path for path in folder.root.iterdir() if path.is_dir()] == []


def test_pictures_that_were_not_all_made_leave_the_earlier_ones(folder: PictureFolder) -> None:
    put(folder, a="1")

    with pytest.raises(RuntimeError), folder.making() as place:
        (place / "a.png").write_text("2")
        raise RuntimeError

    assert seen(folder) == {"a.png": "1", GRID: "1"}
    assert [path for path in folder.root.iterdir() if path.is_dir()] == []


def test_a_replacement_that_is_cut_off_anywhere_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, cut_at = os.replace, 0
    finished = False
    while not finished:
        folder = PictureFolder(tmp_path / str(cut_at), "pictures.json")
        put(folder, a="1", b="2")
        left = cut_at

        def failing(source: Path, target: Path) -> None:
            nonlocal left
            if left == 0:
                raise Cut
            left -= 1
            replace(source, target)

        monkeypatch.setattr(picture_folder.os, "replace", failing)
        try:
            put(folder, b="3", c="4")
            finished = True
        except Cut:
            pass
        monkeypatch.setattr(picture_folder.os, "replace", replace)

        put(folder, d="5")
        assert seen(folder) == {"d.png": "5", GRID: "5"}, cut_at
        cut_at += 1
    assert cut_at > 4


def test_while_there_is_an_index_all_that_it_names_is_there(
    folder: PictureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, a="1", b="2")
    replace = os.replace

    def watching(source: Path, target: Path) -> None:
        replace(source, target)
        if folder.index.exists():
            paths = [p["path"] for p in json.loads(folder.index.read_text())["pictures"]]
            assert {*paths, GRID} == set(seen(folder))
            texts = {seen(folder)[path] for path in paths}
            assert texts in ({"1", "2"}, {"3", "4"})

    monkeypatch.setattr(picture_folder.os, "replace", watching)
    put(folder, b="3", c="4")
    monkeypatch.undo()

    assert set(seen(folder)) == {"b.png", "c.png", GRID}


@pytest.mark.parametrize("name", ["a.png", GRID, "pictures.json"])
def test_a_file_of_somebody_else_is_not_written_over(folder: PictureFolder, name: str) -> None:
    folder.root.mkdir()
    (folder.root / name).write_text("mine")

    with pytest.raises(InputError, match=f"{name}` is not from an earlier call"):
        folder.refuse_strangers(["a.png"])


def test_ones_own_files_are_no_strangers(folder: PictureFolder) -> None:
    put(folder, a="1")

    folder.refuse_strangers(["a.png", "b.png"])


def test_the_folder_of_a_training_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()

    for root, reason in ((tmp_path, "folder of a training"), (tmp_path / "config.yaml", "no fold")):
        with pytest.raises(InputError, match=reason):
            PictureFolder(root, "pictures.json").refuse_strangers([])


def test_an_index_cannot_lead_out_of_its_folder(folder: PictureFolder, tmp_path: Path) -> None:
    put(folder, a="1")
    outside = tmp_path / "outside.png"
    outside.write_text("mine")
    named = [{"path": path} for path in ("../outside.png", str(outside), "..", "", 7)]
    folder.index.write_text(json.dumps({"pictures": named}))

    put(folder, b="2")

    assert outside.read_text() == "mine"
