"""Pictures whose pixels say where they are, and archives of pictures, for the data tests."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.config import CaptionConfig, DataConfig, FaceConfig, MaskConfig
from trainer.data.picture_set import PictureSet
from trainer.data.plan import Plan, Portion
from trainer.data.prepare import prepare
from trainer.data.prepared import Example
from trainer.data.store import Store
from trainer.events import Event
from trainer.images.crop import Size


def grid_image(height: int, width: int, blue: int = 0) -> Image.Image:
    """Red is the column, green the row, blue whatever the test wants to tell pictures apart by."""
    assert max(height, width) <= 256
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    pixels[..., 2] = blue
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as the content of a file."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def grid_bytes(height: int = 40, width: int = 40, blue: int = 0) -> bytes:
    """A grid image as PNG."""
    return encoded(grid_image(height, width, blue))


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip archive of files in the given order."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def write_folder(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """A folder of files, nested as their names say."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def grid_examples(
    folder: Path,
    count: int,
    *,
    height: int,
    width: int,
    target: Size = (64, 64),
    original: int = 500,
    num_class_images: int = 0,
) -> tuple[Example, ...]:
    """Prepared grid pictures; blue is the picture's number, the last ones are of the class."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number in range(count + num_class_images):
        path = folder / f"{number:03d}.png"
        grid_image(height, width, blue=number).save(path)
        examples.append(
            Example(
                number=number,
                name=f"{number}.jpg",
                caption=f"caption {number}",
                caption_origin="txt",
                path=path,
                sha256=str(number),
                original_size=(original, original + 1),
                size=(height, width),
                target=target,
                is_class=number >= count,
            )
        )
    return tuple(examples)


def with_mask(example: Example, mask: np.ndarray) -> Example:
    """The example with a mask of its prepared size."""
    path = example.path.with_suffix(".mask.npy")
    np.save(path, mask.astype(np.float32))
    return dataclasses.replace(example, mask_path=path)


def plan_of(*portions: Portion | int, **changes: object) -> Plan:
    """One process, one picture a step, unless told otherwise.

    Args:
        portions: the subjects' pictures; a number means so many, once each.
        changes: other fields of the plan.
    """
    values = {
        "portions": tuple(
            portion if isinstance(portion, Portion) else Portion(tuple(range(portion)))
            for portion in portions
        ),
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_processes": 1,
        "process_index": 0,
        "seed": 7,
        **changes,
    }
    return Plan(**values)


def bytes_of(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (3, H, W) in [-1, 1] as the bytes (H, W, 3) they came from."""
    values = (pixels.double() + 1) * 127.5
    return values.round().to(torch.uint8).permute(1, 2, 0).numpy()


def seen(pixels: torch.Tensor) -> tuple[int, int, bool, int]:
    """What pixels of a grid picture show: top, left, whether mirrored, and the blue value.

    Left is the smallest column of the resized picture that is seen.
    """
    grid = bytes_of(pixels)
    first, last = int(grid[0, 0, 0]), int(grid[0, -1, 0])
    return int(grid[0, 0, 1]), min(first, last), first > last, int(grid[0, 0, 2])


def picture_set(
    location: Path,
    *,
    width: int = 64,
    height: int = 64,
    of_class: bool = False,
    mask: MaskConfig | None = None,
    face: FaceConfig | None = None,
    caption: CaptionConfig | None = None,
    trigger: str | None = None,
    **options: Any,
) -> PictureSet:
    """Pictures at a place, of which a small window is trained."""
    size = {"resolution_width": width, "resolution_height": height}
    return PictureSet(
        data=DataConfig(images_data_url=str(location), **{**size, **options}),
        mask=mask or MaskConfig(),
        face=face or FaceConfig(),
        caption=caption or CaptionConfig(),
        trigger=trigger,
        of_class=of_class,
    )


def prepared(
    wanted: PictureSet, folder: Path, *, settled: bool = False
) -> tuple[list[Event], tuple[Example, ...]]:
    """Prepares pictures, and keeps what is found out beside the folder."""
    events: list[Event] = []
    stage = prepare(wanted, folder, Store(folder.parent / "store"), settled=settled)
    while True:
        try:
            events.append(next(stage))
        except StopIteration as end:
            return events, end.value
