"""Which files of a source are pictures, and which are their masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from grid import grid_bytes, write_folder, zip_bytes

from trainer.config import DataConfig
from trainer.data.inventory import Inventory, opened, take_inventory
from trainer.errors import InputError
from trainer.sources.archive import open_source


def inventory_of(folder: Path, *names: str) -> Inventory:
    write_folder(folder / "set", dict.fromkeys(names, b"content"))
    data = DataConfig(images_data_url=str(folder / "set"))
    with open_source(data.images_data_url) as source:
        return take_inventory(source, data)


def said(inventory: Inventory) -> str:
    return " | ".join(note.message for note in inventory.notes)


@pytest.mark.parametrize(
    ("picture", "mask"),
    [
        ("a.jpg", "masks/a.png"),
        ("a.jpg", "a_mask.png"),
        ("a.jpg", "Masks/a.png"),
        ("a.jpg", "masks/a.jpg"),
        ("sub/a.jpg", "sub/masks/a.png"),
        ("sub/a.jpg", "sub/a_mask.png"),
        ("sub/a.jpg", "masks/sub/a.png"),
        ("sub/a.jpg", "masks/a.png"),
        ("a.b.jpg", "masks/a.b.png"),
    ],
)
def test_a_mask_is_found_by_its_name_and_is_no_picture(
    tmp_path: Path, picture: str, mask: str
) -> None:
    inventory = inventory_of(tmp_path, picture, mask, "other.jpg")

    assert set(inventory.names) == {picture, "other.jpg"}
    assert inventory.masks == {picture: mask}
    assert set(inventory.captions) == {picture, "other.jpg"}
    assert said(inventory) == ""


def test_a_mask_by_its_base_name_alone_must_fit_one_picture(tmp_path: Path) -> None:
    inventory = inventory_of(tmp_path, "x/a.jpg", "y/a.jpg", "masks/a.png")

    assert inventory.masks == {}
    assert inventory.names == ("x/a.jpg", "y/a.jpg")
    assert "these masks belong to no picture and are left out: `masks/a.png`" in said(inventory)


def test_a_mask_without_its_picture_is_left_out_and_said(tmp_path: Path) -> None:
    inventory = inventory_of(tmp_path, "a.jpg", "masks/b.png")

    assert inventory.names == ("a.jpg",)
    assert "these masks belong to no picture and are left out: `masks/b.png`" in said(inventory)


def test_a_second_mask_of_a_picture_is_left_out_and_said(tmp_path: Path) -> None:
    inventory = inventory_of(tmp_path, "a.jpg", "masks/a.jpg", "masks/a.png", "a_mask.png")

    assert inventory.masks == {"a.jpg": "masks/a.png"}
    assert "`a_mask.png`, `masks/a.jpg`" in said(inventory)


def test_a_picture_that_is_only_named_like_a_mask_stays_a_picture_and_is_said(
    tmp_path: Path,
) -> None:
    inventory = inventory_of(tmp_path, "venice_mask.jpg")

    assert inventory.names == ("venice_mask.jpg",)
    assert "`venice_mask.jpg` would be the mask of a picture that is not there" in said(inventory)


def test_masks_alone_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 2 files but no picture"):
        inventory_of(tmp_path, "masks/a.png", "masks/b.png")


def test_a_caption_of_a_mask_is_not_asked_for(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set", {"a.png": grid_bytes(), "a_mask.png": grid_bytes(), "a.txt": "hello"}
    )
    data = DataConfig(images_data_url=str(tmp_path / "set"), skip_caption_generation=False)

    with open_source(data.images_data_url) as source:
        inventory = take_inventory(source, data)

    assert {name: caption.text for name, caption in inventory.captions.items()} == {
        "a.png": "hello"
    }


def test_a_picture_is_shown_as_often_as_kohyas_folder_says_and_else_once(tmp_path: Path) -> None:
    inventory = inventory_of(tmp_path, "10_sks dog/a.jpg", "img/3_cat/b.jpg", "c.jpg")

    assert inventory.repeats == {"10_sks dog/a.jpg": 10, "img/3_cat/b.jpg": 3, "c.jpg": 1}
    assert inventory.captions["img/3_cat/b.jpg"].text == "cat"
    assert (
        "`10_sks dog`: 10 repeats, caption `sks dog`; `3_cat`: 3 repeats, caption `cat`, "
        "as kohya's folder names say"
    ) in said(inventory)


@pytest.mark.parametrize(
    ("captioned", "says"),
    [
        (["a"], "`1_dog`: 1 repeat, caption `dog` for 1 of 2, as"),
        (["a", "b"], "`1_dog`: 1 repeat, `dog` is not used: all pictures have captions of"),
    ],
)
def test_where_a_kohya_folders_caption_is_not_used_is_said(
    tmp_path: Path, captioned: list[str], says: str
) -> None:
    texts = [f"1_dog/{name}.txt" for name in captioned]

    inventory = inventory_of(tmp_path, "1_dog/a.jpg", "1_dog/b.jpg", *texts)

    assert says in said(inventory)


def test_many_kohya_folders_are_cut_to_what_a_note_can_hold(tmp_path: Path) -> None:
    names = [f"2_thing{number}/a.jpg" for number in range(12)]

    assert "`2_thing7`: 2 repeats, caption `thing7`; and 2 more, as" in said(
        inventory_of(tmp_path, *names)
    )


def test_a_table_that_is_not_read_is_said_and_metadata_is_none(tmp_path: Path) -> None:
    write_folder(
        tmp_path / "set",
        {
            "a.jpg": b"x",
            "metadata.jsonl": '{"file_name": "a.jpg", "text": "A"}',
            "captions.jsonl": "",
            "dataset.json": "",
        },
    )

    with opened(DataConfig(images_data_url=str(tmp_path / "set")), of_class=False) as (_, found):
        (note,) = found.notes

    assert note.field == "captions_file_url"
    assert "`captions.jsonl`, `dataset.json` among the pictures is not read" in note.message
    assert "call it `metadata.jsonl`" in note.message
    assert found.captions["a.jpg"].origin == "metadata"


def test_pairs_before_and_after_an_edit_are_said_to_be_pictures_by_themselves(
    tmp_path: Path,
) -> None:
    pairs = ["x/a_start.jpg", "x/a_end.png", "b_start.jpg", "b_end.jpg"]

    assert "pairs before and after an edit (`b_start`, `b_end`)" in said(
        inventory_of(tmp_path / "pairs", *pairs)
    )
    assert said(inventory_of(tmp_path / "others", *pairs, "c.jpg")) == ""


def test_the_trigger_is_asked_for_in_captions_of_the_subject_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a.jpg": b"x", "a.txt": "a man", "captions.csv": ""})
    data = DataConfig(images_data_url=str(folder), caption_column="long")

    with opened(data, of_class=False, trigger="SIDAI") as (_, of_subject):
        fields = {note.field for note in of_subject.notes}
    with opened(data, of_class=True, trigger="SIDAI", add_trigger=True) as (_, of_class):
        pass

    assert fields == {"token_abstraction", "captions_file_url", "caption_column"}
    assert of_class.notes == ()
    assert of_class.captions["a.jpg"].text == "a man"


def test_pictures_behind_a_web_address_are_read_from_the_file_it_led_to(tmp_path: Path) -> None:
    (tmp_path / "fetched").write_bytes(zip_bytes({"7_sks cat/a.jpg": b"x"}))
    data = DataConfig(images_data_url="https://example.com/set.zip?key=secret")

    with opened(data, of_class=False, downloaded=tmp_path / "fetched") as (source, inventory):
        content = source.read("7_sks cat/a.jpg")

    assert content == b"x"
    assert inventory.repeats == {"7_sks cat/a.jpg": 7}
    assert "secret" not in said(inventory)
