"""What was prepared, to be looked at: the contact sheet and `report.json` beside the pictures.

Made from what lies in the prepared folder and what was said while it was filled; no training
reads it again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config import DataConfig, Note
from trainer.data import sheet
from trainer.data.advice import Advice, Subject, advise, recommended_size
from trainer.data.buckets import bucket_table
from trainer.data.prepared import Index, Prepared, sha256_of
from trainer.data.remarks import notes_on_the_set
from trainer.data.thumbnails import fitted_weights
from trainer.durable import disk_errors, write_bytes, write_text
from trainer.images.crop import Mask, Size, Window, center_window
from trainer.images.findings import Remark
from trainer.sources.captions import Origin

REPORT = "report.json"
SHEET = "contact_sheet_{}.jpg"

# Where a caption comes from, in words.
_ORIGINS: Mapping[Origin, str] = {
    "file": "captions file",
    "metadata": "metadata.jsonl",
    "txt": "text file",
    "folder": "folder name",
    "generated": "written by the captioner",
    "instance_prompt": "instance prompt",
}

_SHEETS = re.compile(r"contact_sheet_\d+\.jpg")

# The options that say how windows are drawn.
_GEOMETRY = {
    "center_crop",
    "random_flip",
    "random_crop_offset_x",
    "random_crop_offset_y",
    "random_rotation_start",
    "random_rotation_end",
}


def is_there(folder: Path, data: DataConfig) -> bool:
    """Whether report and sheet lie in a prepared folder.

    Args:
        data: how windows are drawn, if they are to tell that.
    """
    written = written_report(folder)
    if written is None or not (folder / SHEET.format(1)).is_file():
        return False
    return written.get("geometry") == _geometry(data)


def write(
    index: Index, folder: Path, *, of_class: bool, data: DataConfig, notes: Sequence[Note] = ()
) -> None:
    """Writes report and contact sheet of prepared pictures into their folder.

    What an earlier report noted on the same files stays: whoever finds a caption in the folder
    has nothing to say of how it came there.

    Args:
        data: how windows are drawn.
        notes: what was said while the pictures were prepared.

    Raises:
        DiskError: the folder cannot be written.
    """
    _write_sheets(index, folder, of_class=of_class, data=data)
    found = report(index, of_class=of_class, data=data, notes=notes)
    earlier = written_report(folder)
    if earlier is not None and earlier.get("prepared_sha256") == found["prepared_sha256"]:
        said = (*earlier["notes"], *found["notes"])
        found["notes"] = [note for place, note in enumerate(said) if note not in said[:place]]
    write_text(folder / REPORT, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def written_report(folder: Path) -> dict[str, Any] | None:
    """The report that lies in a prepared folder, if one can be read there."""
    try:
        found = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_sheets(index: Index, folder: Path, *, of_class: bool, data: DataConfig) -> None:
    # A generator: the pictures of one page are enough to hold.
    rows = chain((_row(picture, folder, data) for picture in index.pictures), _left_out(index))
    count = len(index.pictures) + len(index.left_out)
    kind = "class picture" if of_class else "picture"
    title = f"{len(index.pictures)} {kind}" + ("" if len(index.pictures) == 1 else "s")
    if index.left_out:
        title += f", {len(index.left_out)} left out"
    counts = Counter(scale.target for p in index.pictures for scale in p.view.scales)
    subtitle = " · ".join(bucket_table(counts))
    written = set()
    pages = sheet.pages(rows, count, title=title, subtitle=subtitle)
    for number, page in enumerate(pages, start=1):
        write_bytes(folder / SHEET.format(number), sheet.jpeg(page))
        written.add(SHEET.format(number))
    with disk_errors(folder):
        for path in folder.iterdir():
            if _SHEETS.fullmatch(path.name) and path.name not in written:
                path.unlink()


def sheets(folder: Path) -> list[Path]:
    """The pages of the contact sheet in a prepared folder."""
    found = [path for path in folder.iterdir() if _SHEETS.fullmatch(path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def report(
    index: Index, *, of_class: bool, data: DataConfig, notes: Sequence[Note] = ()
) -> dict[str, Any]:
    """What is known of prepared pictures, as JSON can hold it; each thing in one place.

    Args:
        data: how windows are drawn.
        notes: what was said while the pictures were prepared.
    """
    elsewhere = _told_elsewhere(index, of_class)
    return {
        "advice": advice_on(index, of_class=of_class, data=data).as_dict(),
        "notes": [note.model_dump() for note in notes if note.message not in elsewhere],
        "pictures": [_described(picture, data) for picture in index.pictures],
        "left_out": [picture.model_dump() for picture in index.left_out],
        "geometry": _geometry(data),
        "prepared_sha256": sha256_of(index.model_dump_json().encode()),
    }


def advice_on(index: Index, *, of_class: bool, data: DataConfig) -> Advice:
    """What the pictures are like together; none on those of a class, which teach no subject."""
    if of_class:
        return Advice(())
    recommended = recommended_size(data.priority)
    return advise([_subject(picture, recommended) for picture in index.pictures])


def _told_elsewhere(index: Index, of_class: bool) -> set[str]:
    """What is said of pictures while they are prepared and has a place of its own in the report."""
    messages = {
        f"`{picture.name}` {remark.text}"
        for picture in index.pictures
        for remark in picture.all_remarks()
    }
    messages |= {f"`{picture.name}` is left out: {picture.reason}" for picture in index.left_out}
    if not of_class:
        digests = [(picture.name, picture.sha256) for picture in index.pictures]
        messages |= {note.message for note in notes_on_the_set(digests, of_class)}
    return messages


def _geometry(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(include=_GEOMETRY)


def _subject(picture: Prepared, recommended: Size) -> Subject:
    view = picture.view
    return Subject(
        name=picture.name,
        size=view.original_size,
        sha256=picture.sha256,
        measures=view.measures,
        remarks=picture.all_remarks(),
        faces=view.faces if view.faces_sought else None,
        target=view.target,
        recommended=recommended,
    )


def _described(picture: Prepared, data: DataConfig) -> dict[str, Any]:
    view = picture.view
    return {
        "name": picture.name,
        "size": view.picture_size,
        "trained_size": view.target,
        "smaller_sizes": view.smaller,
        "trained_box": _trained_box(picture),
        "each_time": list(_each_time(picture, data)),
        "faces": [face.model_dump() for face in view.faces],
        "caption": picture.caption,
        "caption_origin": picture.caption_origin,
        "repeats": picture.repeats,
        "mask": None if picture.mask is None else picture.mask.origin.kind,
        "mean_weight": 1.0 if picture.mask is None else picture.mask.mean,
        "remarks": [remark.model_dump() for remark in picture.all_remarks()],
        "measures": view.measures.model_dump(),
    }


def _window(picture: Prepared) -> Window:
    """What is seen of the prepared picture, as long as nothing moves it."""
    view = picture.view
    if picture.window is None:
        return center_window(view.size, view.target)
    return Window(*picture.window, *view.target)


def _trained_box(picture: Prepared) -> tuple[float, float, float, float]:
    """Left, top, width and height of what is trained, in pixels of the whole picture."""
    view, window = picture.view, _window(picture)
    scale = view.part[2] / view.size[1]
    left, top = view.part[0] + window.left * scale, view.part[1] + window.top * scale
    return left, top, window.width * scale, window.height * scale


def _row(picture: Prepared, folder: Path, data: DataConfig) -> sheet.Row:
    view, window = picture.view, _window(picture)
    box = window.left, window.top, window.left + window.width, window.top + window.height
    with Image.open(folder / picture.file) as image:
        crop = sheet.thumbnail(image.crop(box))
    return sheet.Row(
        name=picture.name,
        source=_opened(folder / picture.thumbnail),
        source_size=view.picture_size,
        faces=tuple(face.box for face in view.faces),
        crop_box=_trained_box(picture),
        crop=crop,
        weights=_weights(picture, folder, window, (crop.height, crop.width)),
        caption=picture.caption,
        caption_origin=_ORIGINS[picture.caption_origin],
        remarks=picture.all_remarks(),
        restored=_restored(picture, folder),
        facts=(*_facts(picture), *_each_time(picture, data)),
    )


def _weights(picture: Prepared, folder: Path, window: Window, size: Size) -> Mask | None:
    """The weights in a window, as small as its picture."""
    if picture.mask is None or not picture.mask.file:
        return None
    mask: Mask = np.load(folder / picture.mask.file, mmap_mode="r")
    rows = slice(window.top, window.top + window.height)
    return fitted_weights(mask[rows, window.left : window.left + window.width], size)


def _restored(picture: Prepared, folder: Path) -> tuple[Image.Image, Image.Image] | None:
    if picture.restored is None:
        return None
    before, after = picture.restored
    return _opened(folder / before), _opened(folder / after)


def _facts(picture: Prepared) -> Iterator[str]:
    view = picture.view
    (height, width), (down, right) = view.picture_size, view.target
    yield f"{width}x{height} → {right}x{down}"
    if view.smaller:
        yield "also at " + ", ".join(f"{right}x{down}" for down, right in view.smaller)
    if picture.repeats > 1:
        yield f"{picture.repeats} times an epoch"


def _each_time(picture: Prepared, data: DataConfig) -> Iterator[str]:
    """How what is seen of a picture changes from one step to the next."""
    view = picture.view
    down, right = (long - short for long, short in zip(view.size, view.target, strict=True))
    offsets = min(data.random_crop_offset_x, right), min(data.random_crop_offset_y, down)
    if picture.window is None and not data.center_crop:
        if down or right:
            yield "window drawn anew each time"
    elif any(offsets):
        yield f"moved by up to ±{offsets[0]}, ±{offsets[1]} pixels"
    start, end = data.random_rotation_start, data.random_rotation_end
    if start != end:
        yield f"turned by {start} to {end} degrees"
    elif start:
        yield f"turned by {start} {'degree' if abs(start) == 1 else 'degrees'}"
    if data.random_flip:
        yield "mirrored half of the time"


def _left_out(index: Index) -> Iterator[sheet.Row]:
    for picture in index.left_out:
        reason = Remark.warning(f"is left out: {picture.reason}")
        yield sheet.Row(name=picture.name, remarks=(reason,))


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
