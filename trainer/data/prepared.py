"""What a folder of prepared pictures holds: `prepared.json`, the files that it names, examples.

How pictures and masks are made is not known here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data.views import Rendering, View, alpha_of
from trainer.durable import disk_errors, write_bytes, write_text
from trainer.images.crop import Mask, Size
from trainer.images.findings import Remark
from trainer.images.masks import MaskOrigin
from trainer.images.pictures import decode
from trainer.sources.captions import Origin

INDEX = "prepared.json"
FORMAT_VERSION = 4

_OWN_FILES = re.compile(r"\d+(\.mask|\.source|\.before|\.after)?\.(png|npy|jpg)")


@dataclass(frozen=True)
class Example:
    """One training picture as it stands in the run folder.

    Args:
        number: from 0, in the order of the names.
        name: path inside the user's source.
        path: of the prepared file.
        sha256: of the source bytes.
        original_size: (height, width) upright, before resizing.
        size: (height, width) of the whole picture at this scale, which covers the trained size;
            that of the prepared file at scale 0.
        target: trained (height, width).
        window: (top, left) of what a face or mask puts in view; nothing where the middle or
            chance decides.
        repeats: times that an epoch shows it.
        mask_path: a .npy file of float32 (h, w) in [0, 1], as large as the prepared file; nothing
            where the whole picture counts.
        mask_sha256: of that file.
        is_class: whether it is a picture of the class, not of the subject.
        scale: 0 at the largest size of the picture; 1 and so on at smaller ones, which the
            prepared file and the mask are resized to.
    """

    number: int
    name: str
    caption: str
    caption_origin: Origin
    path: Path
    sha256: str
    original_size: Size
    size: Size
    target: Size
    window: tuple[int, int] | None = None
    repeats: int = 1
    mask_path: Path | None = None
    mask_sha256: str = ""
    is_class: bool = False
    scale: int = 0


class LeftOut(BaseModel):
    """A picture that is not trained, and why."""

    model_config = ConfigDict(frozen=True)
    name: str
    reason: str


class PreparedMask(BaseModel):
    """A mask in `prepared.json`.

    Args:
        origin: what it is made of.
        file: its name; empty where every weight is 1.
        sha256: of that file.
        view: name of a picture of it, to look at; nothing reads it.
        mean: of its weights.
        without_other_faces: whether faces but the largest were taken out.
        remarks: what the user should know of it.
    """

    model_config = ConfigDict(frozen=True)
    origin: MaskOrigin
    file: str = ""
    sha256: str = ""
    view: str = ""
    mean: float = 1.0
    without_other_faces: bool = False
    remarks: tuple[Remark, ...] = ()

    def is_intact(self, folder: Path) -> bool:
        """Whether its file, if it has one, is there with the content it had."""
        return not self.file or _is_intact(folder / self.file, self.sha256)


class Prepared(BaseModel):
    """One line of `prepared.json`: an example, and how to know its files again.

    Args:
        sha256: of the source bytes.
        captioned_by: digest of what a model was to write the caption from, also where it wrote
            nothing of use; empty where none was asked.
        repeats: times that an epoch shows it.
        file: name of the prepared file.
        file_sha256: of that file.
        thumbnail: name of a small JPEG of the whole picture, to look at.
        restored: names of JPEGs of its face before and after, where that was restored.
        view: how it looks at the trained scale.
        mask: nothing where the whole picture counts.
        window: see `Example`.
        smaller_windows: the same at each smaller size of the view.
        remarks: what the user should know of it beside the view's and the mask's remarks.
    """

    model_config = ConfigDict(frozen=True)
    number: int
    name: str
    sha256: str
    caption: str
    caption_origin: Origin
    captioned_by: str = ""
    lacks_captioner: bool = False
    repeats: int
    file: str
    file_sha256: str
    thumbnail: str
    restored: tuple[str, str] | None
    view: View
    mask: PreparedMask | None
    window: tuple[int, int] | None
    smaller_windows: tuple[tuple[int, int] | None, ...] = ()
    remarks: tuple[Remark, ...]

    def all_remarks(self) -> tuple[Remark, ...]:
        """What the user should know of the picture and its mask."""
        return (*self.view.remarks, *self.remarks, *(self.mask.remarks if self.mask else ()))

    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        masks = (self.mask.file, self.mask.view) if self.mask else ()
        return (self.file, self.thumbnail, *(self.restored or ()), *masks)

    def examples(self, folder: Path, *, is_class: bool) -> Iterator[Example]:
        """The picture as the data set takes it, at each size, the largest first."""
        mask = self.mask
        windows = (self.window, *self.smaller_windows)
        for scale, (seen, window) in enumerate(zip(self.view.scales, windows, strict=True)):
            yield Example(
                number=self.number,
                name=self.name,
                caption=self.caption,
                caption_origin=self.caption_origin,
                path=folder / self.file,
                sha256=self.sha256,
                original_size=self.view.original_size,
                size=seen.size,
                target=seen.target,
                window=window,
                repeats=self.repeats,
                mask_path=folder / mask.file if mask and mask.file else None,
                mask_sha256=mask.sha256 if mask else "",
                is_class=is_class,
                scale=scale,
            )


class Index(BaseModel):
    """`prepared.json`: what is trained, and what was left out and why.

    Args:
        captions_sha256: of the captions file beside it, as it was written; empty where there is
            none.
    """

    model_config = ConfigDict(frozen=True)
    version: int = FORMAT_VERSION
    pictures: tuple[Prepared, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    captions_sha256: str = ""

    def known(self, name: str, request: str, folder: Path) -> Prepared | None:
        """The picture that was made of the same, best under this name, if its files lie there."""
        same = [picture for picture in self.pictures if picture.view.request == request]
        for picture in sorted(same, key=lambda picture: picture.name != name):
            whole = _is_intact(folder / picture.file, picture.file_sha256)
            seen = [file for file in picture.files() if file]
            if whole and all((folder / file).is_file() for file in seen):
                return picture
        return None


def earlier_index(folder: Path) -> Index:
    """What an earlier call left in the folder, or an empty index."""
    try:
        index = Index.model_validate_json((folder / INDEX).read_bytes())
    except (OSError, ValidationError):
        return Index()
    return index if index.version == FORMAT_VERSION else Index()


def write_rendering(
    rendering: Rendering, folder: Path, *, number: int, name: str, sha256: str
) -> Prepared:
    """The prepared files of a rendering, whose mask and caption are not known yet.

    Args:
        number: of the picture.
        name: of its file in the user's source.
        sha256: of that file.
    """
    stem = f"{number:03d}"
    write_bytes(folder / f"{stem}.png", rendering.picture)
    write_bytes(folder / f"{stem}.source.jpg", rendering.thumbnail)
    restored = None
    if rendering.restored is not None:
        restored = f"{stem}.before.jpg", f"{stem}.after.jpg"
        for file, content in zip(restored, rendering.restored, strict=True):
            write_bytes(folder / file, content)
    return Prepared(
        number=number,
        name=name,
        sha256=sha256,
        caption="",
        caption_origin="instance_prompt",
        repeats=1,
        file=f"{stem}.png",
        file_sha256=rendering.sha256,
        thumbnail=f"{stem}.source.jpg",
        restored=restored,
        view=rendering.view,
        mask=None,
        window=None,
        remarks=(),
    )


def read_rendering(picture: Prepared, folder: Path, content: Callable[[], bytes]) -> Rendering:
    """The rendering whose files lie in the folder.

    Args:
        content: gives the content of its file in the user's source.
    """
    view = picture.view
    restored = None
    if picture.restored is not None:
        before, after = picture.restored
        restored = (folder / before).read_bytes(), (folder / after).read_bytes()
    alpha = alpha_of(decode(content()), view) if view.has_alpha else None
    return Rendering(
        view=view,
        picture=(folder / picture.file).read_bytes(),
        thumbnail=(folder / picture.thumbnail).read_bytes(),
        alpha=alpha,
        restored=restored,
    )


def write_mask(mask: Mask, folder: Path, *, number: int, described: PreparedMask) -> PreparedMask:
    """The files of a mask: its weights, and a picture of them.

    Args:
        number: of the picture it belongs to.
        described: what it is made of.
    """
    weights = BytesIO()
    np.save(weights, mask)
    shown = BytesIO()
    grey = Image.fromarray(np.rint(mask * 255).astype(np.uint8))
    grey.save(shown, format="PNG", compress_level=1)
    file, view = f"{number:03d}.mask.npy", f"{number:03d}.mask.png"
    write_bytes(folder / view, shown.getvalue())
    write_bytes(folder / file, weights.getvalue())
    update = {
        "file": file,
        "sha256": sha256_of(weights.getvalue()),
        "view": view,
        "mean": round(float(mask.mean(dtype=np.float64)), 4),
    }
    return described.model_copy(update=update)


def publish_index(index: Index, folder: Path) -> None:
    """Writes `prepared.json` last, and removes prepared files that no longer belong to the set."""
    content = index.model_dump_json(indent=2) + "\n"
    path = folder / INDEX
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)
    current = {file for picture in index.pictures for file in picture.files()}
    with disk_errors(folder):
        for file in folder.iterdir():
            if _OWN_FILES.fullmatch(file.name) and file.name not in current:
                file.unlink()


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path.read_bytes()) == sha256


def sha256_of(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
