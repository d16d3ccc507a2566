"""Which files of a source are pictures, and which are their masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from grid import grid_bytes, write_folder

from trainer.config import DataConfig
from trainer.data.archive import open_source
from trainer.data.inventory import Inventory, take_inventory
from trainer.errors import InputError


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
