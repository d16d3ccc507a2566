"""What the files of a source are: pictures, the masks that belong to them, captions, and others.

By their names only; no picture is decoded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from trainer.config import DataConfig, MaskConfig, Note
from trainer.data.archive import FIELD, BadEntry, Source, open_source
from trainer.data.captions import Caption, find_captions, listed
from trainer.data.masks import BadMask
from trainer.data.pictures import ACCEPTED
from trainer.data.remarks import warning
from trainer.errors import InputError

# A file without a suffix may be a picture; HEIC is refused by name, not overlooked.
_PICTURE_SUFFIXES = frozenset(("", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"))
_PICTURE_SUFFIXES |= {".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
_TABLE_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".parquet"))
_TEXT_SUFFIXES = _TABLE_SUFFIXES | {".txt", ".md"}

_MASKS = "masks"
_MASK_ENDING = "_mask"


@dataclass(frozen=True)
class Inventory:
    """What a source holds.

    Args:
        names: of the files that should be pictures, in their order.
        captions: by picture.
        masks: the name of the mask file by picture, where there is one.
        notes: what the user should know of the rest.
    """

    names: tuple[str, ...]
    captions: Mapping[str, Caption]
    masks: Mapping[str, str]
    notes: tuple[Note, ...]


def take_inventory(source: Source, data: DataConfig) -> Inventory:
    """The pictures of a source with their captions and masks, and what is left out.

    Raises:
        InputError: there is no picture, or the captions cannot be used.
    """
    suffixes = {entry.name: PurePosixPath(entry.name).suffix.lower() for entry in source.entries()}
    candidates = [name for name, suffix in suffixes.items() if suffix in _PICTURE_SUFFIXES]
    names, masks, mask_notes = _pictures_and_masks(candidates)
    if not names:
        raise InputError.of(
            FIELD,
            f"`{source.label}` holds {len(suffixes)} files but no picture",
            f"put pictures into it; accepted: {ACCEPTED}",
        )
    notes = [*source.notes, *mask_notes]
    others = _PICTURE_SUFFIXES | _TEXT_SUFFIXES
    ignored = [name for name, suffix in suffixes.items() if suffix not in others]
    if ignored:
        notes.append(warning(f"these files are not pictures and are left out: {listed(ignored)}"))
    tables = [name for name, suffix in suffixes.items() if suffix in _TABLE_SUFFIXES]
    if tables and data.captions_file_url is None:
        notes.append(
            Note(
                kind="warning",
                field="captions_file_url",
                message=f"{listed(tables)} among the pictures is not read; give the path of a "
                "JSON lines file here if it holds captions",
            )
        )
    captions, caption_notes = find_captions(source, names, data)
    return Inventory(tuple(names), captions, masks, (*notes, *caption_notes))


def _pictures_and_masks(
    candidates: Sequence[str],
) -> tuple[list[str], dict[str, str], list[Note]]:
    """The files that are pictures, the mask file of each that has one, and what is odd.

    A mask is `masks/NAME.png` in the folder of `NAME.jpg` or of the source, or `NAME_mask.png`
    beside it; any other kind of picture will do too. What lies in `masks` is never a picture.
    """
    outside = [name for name in candidates if not _is_in_masks(name)]
    stems = {_stem(name) for name in outside}
    beside = {
        name
        for name in outside
        if _stem(name).endswith(_MASK_ENDING) and _stem(name).removesuffix(_MASK_ENDING) in stems
    }
    names = [name for name in outside if name not in beside]
    files: dict[str, str] = {}
    # Where one mask is there in two formats, PNG loses nothing.
    for name in sorted(set(candidates) - set(names), key=lambda n: not n.lower().endswith(".png")):
        files.setdefault(_stem(name), name)
    masks = _masks(names, files)
    notes = []
    unused = sorted(set(candidates) - set(names) - set(masks.values()))
    if unused:
        notes.append(
            warning(f"these masks belong to no picture and are left out: {listed(unused)}")
        )
    lone = [name for name in names if _stem(name).endswith(_MASK_ENDING)]
    if lone:
        notes.append(
            warning(
                f"{listed(lone)} would be the mask of a picture that is not there, and is "
                "trained as a picture"
            )
        )
    return names, masks, notes


def _masks(names: Sequence[str], files: Mapping[str, str]) -> dict[str, str]:
    """The mask file of each picture that has one.

    Args:
        names: of the pictures.
        files: mask files by their path without its suffix.
    """
    bases = Counter(stem.rpartition("/")[2] for stem in {_stem(name) for name in names})
    masks = {}
    for name in names:
        folder, slash, base = _stem(name).rpartition("/")
        places = [
            f"{folder}{slash}{_MASKS}/{base}",
            f"{folder}{slash}{base}{_MASK_ENDING}",
            f"{_MASKS}/{folder}{slash}{base}",
        ]
        # As with captions: by the base name alone only where it fits one picture.
        if bases[base] == 1:
            places.append(f"{_MASKS}/{base}")
        found = [files[place] for place in places if place in files]
        if found:
            masks[name] = found[0]
    return masks


def _is_in_masks(name: str) -> bool:
    return _MASKS in _stem(name).split("/")[:-1]


def _stem(name: str) -> str:
    """The path without its suffix; a folder of masks is written small."""
    *folders, last = PurePosixPath(name).with_suffix("").parts
    small = [_MASKS if folder.lower() == _MASKS else folder for folder in folders]
    return "/".join([*small, last])


@contextmanager
def opened(data: DataConfig, *, of_class: bool) -> Iterator[tuple[Source, Inventory]]:
    """The files of the pictures, and what they are.

    Args:
        data: for class pictures theirs, under the same names.
        of_class: whether they are class pictures.

    Raises:
        InputError: see `take_inventory`.
    """
    with open_source(data.images_data_url) as source:
        inventory = take_inventory(source, data)
        if of_class:
            # There is no option for a captions file of class pictures.
            notes = tuple(n for n in inventory.notes if n.field != "captions_file_url")
            inventory = replace(inventory, notes=notes)
        yield source, inventory


def given_mask_file(
    source: Source, inventory: Inventory, name: str, mask: MaskConfig
) -> bytes | None:
    """The content of the mask file that the user gave for a picture, if it is wanted.

    Raises:
        BadMask: it cannot be read.
    """
    if not mask.use_given_masks or name not in inventory.masks:
        return None
    try:
        return source.read(inventory.masks[name])
    except BadEntry as error:
        raise BadMask(f"cannot be used: {error}", "save it as a greyscale PNG") from error
