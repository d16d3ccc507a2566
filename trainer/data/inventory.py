"""What the files of a source are: pictures, the masks that belong to them, captions, and others.

By their names only; no picture is decoded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from trainer.config import DataConfig, MaskConfig, Note
from trainer.data.remarks import warning
from trainer.errors import InputError
from trainer.folder_names import PICTURE_SUFFIXES, KohyaFolder, kohya_folder
from trainer.images.masks import BadMask
from trainer.images.pictures import ACCEPTED
from trainer.sources.archive import FIELD, BadEntry, Source, open_source
from trainer.sources.caption_files import TEXT_SUFFIXES, listed
from trainer.sources.captions import METADATA, Caption, find_captions

# A file without a suffix may be a picture; HEIC that cannot be read is refused by name, not
# overlooked.
_PICTURE_SUFFIXES = PICTURE_SUFFIXES | {""}
_TABLE_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".parquet"))
_ARCHIVE_SUFFIXES = frozenset((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"))
_TEXT_SUFFIXES = _TABLE_SUFFIXES | {*TEXT_SUFFIXES, ".md"}

_MASKS = "masks"
_MASK_ENDING = "_mask"
# Pictures before and after an edit, as trainers of edits want them.
_EDIT_ENDINGS = ("_start", "_end")
# Options that class pictures have not: what is said of them would be about other pictures.
_NOT_OF_A_CLASS = ("captions_file_url", "caption_column")
# Folders that one note names.
_SHOWN_FOLDERS = 10


@dataclass(frozen=True)
class Inventory:
    """What a source holds.

    Args:
        names: of the files that should be pictures, in their order.
        captions: by picture.
        masks: the name of the mask file by picture, where there is one.
        repeats: times that an epoch shows each picture, 1 but for kohya's folders.
        notes: what the user should know of the rest.
    """

    names: tuple[str, ...]
    captions: Mapping[str, Caption]
    masks: Mapping[str, str]
    repeats: Mapping[str, int]
    notes: tuple[Note, ...]


def take_inventory(
    source: Source,
    data: DataConfig,
    *,
    trigger: str | None = None,
    identifiers: Sequence[str] = (),
    add_trigger: bool = False,
    captions_file: Path | None = None,
) -> Inventory:
    """The pictures of a source with their captions and masks, and what is left out.

    Args:
        source: the user's files.
        data: where captions are.
        trigger: the word that captions should have, see `find_captions`.
        identifiers: words that do as well.
        add_trigger: whether captions without it get it in front.
        captions_file: the file behind the captions' web address.

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
    captions, caption_notes = find_captions(
        source,
        names,
        data,
        trigger=trigger,
        identifiers=identifiers,
        add_trigger=add_trigger,
        captions_file=captions_file,
    )
    folders = {name: folder for name in names if (folder := kohya_folder(name)) is not None}
    notes = [
        *source.notes,
        *mask_notes,
        *_notes_on_others(suffixes, data),
        *_notes_on_edits(names),
        *_notes_on_folders(folders, captions),
        *caption_notes,
    ]
    repeats = {name: folders[name].repeats if name in folders else 1 for name in names}
    return Inventory(tuple(names), captions, masks, repeats, tuple(notes))


def _notes_on_others(suffixes: Mapping[str, str], data: DataConfig) -> list[Note]:
    """What is neither a picture nor a caption.

    Args:
        suffixes: of all files by their names, in small letters.
        data: whether a captions file is given.
    """
    notes = []
    known = _PICTURE_SUFFIXES | _TEXT_SUFFIXES
    others = [name for name, suffix in suffixes.items() if suffix not in known]
    packed = [name for name in others if suffixes[name] in _ARCHIVE_SUFFIXES]
    if packed:
        notes.append(warning(f"archives among the pictures are not opened: {listed(packed)}"))
    rest = [name for name in others if name not in packed]
    if rest:
        notes.append(warning(f"these files are not pictures and are left out: {listed(rest)}"))
    tables = [
        name
        for name, suffix in suffixes.items()
        if suffix in _TABLE_SUFFIXES and PurePosixPath(name).name != METADATA
    ]
    if tables and data.captions_file_url is None:
        message = f"{listed(tables)} among the pictures is not read; give the path of a JSON lines "
        message += f"file here, or call it `{METADATA}`, if it holds captions"
        notes.append(Note(kind="warning", field="captions_file_url", message=message))
    return notes


def _notes_on_edits(names: Sequence[str]) -> list[Note]:
    """That pictures before and after an edit are no pairs here, where there is nothing else."""
    before, after = _EDIT_ENDINGS
    stems = {_stem(name) for name in names}
    roots = sorted(stem.removesuffix(before) for stem in stems if stem.endswith(before))
    if not roots or stems != {root + ending for root in roots for ending in _EDIT_ENDINGS}:
        return []
    message = f"all pictures are named as pairs before and after an edit (`{roots[0]}{before}`, "
    message += f"`{roots[0]}{after}`); edits are not learned here, each is a picture by itself"
    return [warning(message)]


def _notes_on_folders(
    folders: Mapping[str, KohyaFolder], captions: Mapping[str, Caption]
) -> list[Note]:
    """What the names of kohya's folders do.

    Args:
        folders: by picture.
        captions: by picture.
    """
    said = []
    for folder in dict.fromkeys(folders.values()):
        inside = [name for name, other in folders.items() if other == folder]
        named = sum(captions[name].origin == "folder" for name in inside)
        repeats = f"{folder.repeats} repeat{'s' if folder.repeats > 1 else ''}"
        share = f" for {named} of {len(inside)}" if named < len(inside) else ""
        caption = f", caption `{folder.caption}`{share}" if named else ""
        unused = f", `{folder.caption}` is not used: all pictures have captions of their own"
        said.append(f"`{folder.name}`: {repeats}{caption or unused}")
    if not said:
        return []
    more = len(said) - _SHOWN_FOLDERS
    rest = f"; and {more} more" if more > 0 else ""
    shown = "; ".join(said[:_SHOWN_FOLDERS])
    return [warning(f"{shown}{rest}, as kohya's folder names say")]


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
    for name in sorted(
        set(candidates) - set(names), key=lambda n: (not n.lower().endswith(".png"), n)
    ):
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
def opened(
    data: DataConfig,
    *,
    of_class: bool,
    trigger: str | None = None,
    identifiers: Sequence[str] = (),
    add_trigger: bool = False,
    downloaded: Path | None = None,
    captions_file: Path | None = None,
) -> Iterator[tuple[Source, Inventory]]:
    """The files of the pictures, and what they are.

    Args:
        data: for class pictures theirs, under the same names.
        of_class: whether they are class pictures, which no trigger belongs to.
        trigger: the word that captions should have, see `find_captions`.
        identifiers: words that do as well.
        add_trigger: whether captions without it get it in front.
        downloaded: the file behind the pictures' web address.
        captions_file: the file behind the captions'.

    Raises:
        InputError: see `take_inventory`.
    """
    with open_source(data.images_data_url, downloaded) as source:
        inventory = take_inventory(
            source,
            data,
            trigger=None if of_class else trigger,
            identifiers=identifiers,
            add_trigger=add_trigger,
            captions_file=captions_file,
        )
        if of_class:
            notes = tuple(n for n in inventory.notes if n.field not in _NOT_OF_A_CLASS)
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
