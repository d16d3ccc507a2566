"""A picture as it will be trained: faces restored, cut to its face, at the trained scale.

What is found on the way (faces, measures, remarks) is kept with it. Masks, captions and the run
folder are not known here.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from trainer.data.means import Means
from trainer.data.picture_set import PictureSet
from trainer.data.steps import (
    Stage,
    cut_out,
    prepared_by_steps,
    refuse_strip,
    shrunk,
    thumbnail_of,
)
from trainer.data.store import Store, key_of
from trainer.images.crop import Box, Mask, Size, Window, cover_size, resize_to_cover
from trainer.images.faces import Face
from trainer.images.findings import Remark
from trainer.images.masks import alpha_mask, resized_mask
from trainer.images.pictures import Picture, decode
from trainer.images.quality import Measures, measure

# Faces are looked for in a picture no longer than this: smaller ones teach nothing anyway.
SEEN_SIDE = 1280


@dataclass(frozen=True)
class Scale:
    """One size at which a picture is trained.

    Args:
        size: (height, width) of the picture, which covers `target`.
        target: trained (height, width).
    """

    size: Size
    target: Size


class View(BaseModel):
    """What is known of a picture at the trained scale.

    Args:
        request: digest of the source's bytes and of all options that it depends on.
        picture_size: (height, width) of the whole picture, upright.
        region: (left, top, width, height) of the part that is used, in the whole picture.
        exact_region: the same, where it was cut out of a resized picture between two pixels.
        detail: (height, width) of the part when it had the fewest pixels, where these were less
            than it has in the whole picture and than it is trained at.
        size: (height, width) at the trained scale, which covers `target`.
        target: trained (height, width), the largest where there are several.
        smaller: other trained (height, width), the larger first.
        has_alpha: whether a pixel of the source is not opaque.
        faces_sought: whether faces were looked for.
        is_makeshift: whether they were by a detector that stands in for a better one.
        faces: in pixels of the whole picture, the largest first.
        measures: of the part that is used.
        remarks: what the user should know of it.
    """

    model_config = ConfigDict(frozen=True)
    request: str
    picture_size: Size
    region: tuple[int, int, int, int]
    exact_region: Box | None = None
    detail: Size | None = None
    size: Size
    target: Size
    smaller: tuple[Size, ...] = ()
    has_alpha: bool
    faces_sought: bool
    is_makeshift: bool = False
    faces: tuple[Face, ...]
    measures: Measures
    remarks: tuple[Remark, ...]

    @property
    def original_size(self) -> Size:
        """(height, width) of what is trained, before it is resized."""
        return self.detail or self.region_size

    @property
    def region_size(self) -> Size:
        """(height, width) of the part that is used, in the whole picture."""
        return self.region[3], self.region[2]

    @property
    def part(self) -> Box:
        """(left, top, width, height) of the part that is used, exactly."""
        return self.exact_region or self.region

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The sizes at which it is trained, the largest first."""
        others = (Scale(cover_size(self.size, target), target) for target in self.smaller)
        return Scale(self.size, self.target), *others

    def faces_in_region(self) -> tuple[Face, ...]:
        """The faces whose middle is in the part that is used, in its pixels."""
        left, top, width, height = self.part
        moved = (face.moved(-left, -top) for face in self.faces)
        return tuple(
            face for face in moved if 0 <= face.centre[0] <= width and 0 <= face.centre[1] <= height
        )

    def faces_at(self, size: Size) -> tuple[Face, ...]:
        """Those in pixels of the picture at this size."""
        factor = size[1] / self.part[2]
        return tuple(face.scaled(factor) for face in self.faces_in_region())


@dataclass(frozen=True)
class Rendering:
    """A view with its pixels.

    Args:
        picture: PNG of mode RGB, `view.size` large.
        thumbnail: JPEG of the whole picture.
        alpha: the opacity at the trained scale, or nothing where every pixel is opaque.
        restored: JPEGs of the largest face before and after its restoration, where there was one.
    """

    view: View
    picture: bytes
    thumbnail: bytes
    alpha: Mask | None
    restored: tuple[bytes, bytes] | None

    @property
    def sha256(self) -> str:
        """Digest of the picture's file."""
        return hashlib.sha256(self.picture).hexdigest()

    def image(self) -> Image.Image:
        """The picture's pixels."""
        return Image.open(BytesIO(self.picture)).convert("RGB")

    def packed(self) -> bytes:
        """The rendering as one piece of bytes."""
        parts = {
            "view.json": self.view.model_dump_json().encode(),
            "picture": self.picture,
            "thumbnail": self.thumbnail,
        }
        if self.alpha is not None:
            parts["alpha"] = _npy(self.alpha)
        parts |= zip(("before", "after"), self.restored or (), strict=False)
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for name, content in parts.items():
                # Without a time, which would make each packing different.
                archive.writestr(zipfile.ZipInfo(name), content)
        return packed.getvalue()

    @classmethod
    def unpacked(cls, packed: bytes) -> Rendering:
        """The rendering in such bytes."""
        with zipfile.ZipFile(BytesIO(packed)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        has_faces = "before" in parts
        return cls(
            view=View.model_validate_json(parts["view.json"]),
            picture=parts["picture"],
            thumbnail=parts["thumbnail"],
            alpha=np.load(BytesIO(parts["alpha"])) if "alpha" in parts else None,
            restored=(parts["before"], parts["after"]) if has_faces else None,
        )


@dataclass(frozen=True)
class Darkroom:
    """Makes renderings, each once.

    Args:
        wanted: the pictures.
        means: gives what they are rendered with.
        store: what was made before.
    """

    wanted: PictureSet
    means: Callable[[], Means]
    store: Store

    def request(self, sha256: str, name: str) -> str:
        """What `View.request` is for a file of this digest; the same on every machine."""
        return key_of("view", self._ingredients(sha256, name))

    def rendering(self, content: bytes, sha256: str, name: str) -> Rendering:
        """The rendering of a picture in a file's content.

        Args:
            sha256: of the content.
            name: of the file.

        Raises:
            BadPicture: the picture cannot be used.
        """
        ingredients = {**self._ingredients(sha256, name), **self.means().identity()}
        key = key_of("rendering", ingredients)
        packed = self.store.get(key)
        if packed is not None:
            return Rendering.unpacked(packed)
        rendering = self._made(decode(content, name), self.request(sha256, name))
        self.store.put(key, rendering.packed())
        return rendering

    def _ingredients(self, sha256: str, name: str) -> dict[str, object]:
        # Remarks compare a file's content with its suffix.
        suffix = PurePosixPath(name).suffix.lower()
        return {"source": sha256, "suffix": suffix, **self.wanted.looks}

    def _made(self, picture: Picture, request: str) -> Rendering:
        whole = picture.image
        means = self.means()
        looks_for_faces = means.detector is not None and self._needs_faces(whole)
        faces = self._faces(whole) if looks_for_faces else ()
        restorer = means.restorer[1] if means.restorer is not None else None
        used = prepared_by_steps(Stage.of(whole, faces), self.wanted, restorer)
        target, *smaller = self.wanted.targets(used.size)
        refuse_strip(used.size, target)
        resized = resize_to_cover(used.image, target)
        region = _whole_pixels(used.part)
        view = View(
            request=request,
            picture_size=picture.size,
            region=region,
            exact_region=None if region == used.part else used.part,
            detail=_least(used.detail, (region[3], region[2]), (resized.height, resized.width)),
            size=(resized.height, resized.width),
            target=target,
            smaller=tuple(smaller),
            has_alpha=picture.alpha is not None,
            faces_sought=looks_for_faces,
            is_makeshift=looks_for_faces and means.are_makeshift,
            faces=faces,
            measures=measure(used.image),
            remarks=(*picture.remarks, *used.remarks),
        )
        return Rendering(
            view=view,
            picture=_png(resized),
            thumbnail=thumbnail_of(whole),
            alpha=alpha_of(picture, view),
            restored=used.restored,
        )

    def _needs_faces(self, whole: Image.Image) -> bool:
        """Whether faces decide anything: of class pictures they only place windows."""
        size = whole.height, whole.width
        targets = self.wanted.targets(size)
        return not self.wanted.of_class or any(has_room(size, target) for target in targets)

    def _faces(self, whole: Image.Image) -> tuple[Face, ...]:
        detector = self.means().detector
        assert detector is not None
        seen = shrunk(whole, SEEN_SIDE)
        return tuple(face.scaled(whole.width / seen.width) for face in detector.find(seen))


def has_room(size: Size, target: Size) -> bool:
    """Whether a picture of this size is longer than its window when it covers the target."""
    return cover_size(size, target) != target


def _whole_pixels(part: Box) -> tuple[int, int, int, int]:
    """The pixels nearest to a part, at least one each way."""
    left, top, width, height = part
    return round(left), round(top), max(round(width), 1), max(round(height), 1)


def _least(detail: tuple[float, float], region: Size, size: Size) -> Size | None:
    """The fewest pixels that a part had, if they are fewer than in the whole picture and now."""
    height, width = (max(round(side), 1) for side in detail)
    return (height, width) if height < min(region[0], size[0]) else None


def alpha_of(picture: Picture, view: View) -> Mask | None:
    """The opacity of the part of a picture that is used, or nothing where all of it is opaque."""
    if picture.alpha is None:
        return None
    if view.exact_region is not None:
        alpha = alpha_mask(picture.alpha, inverted=False)
        return resized_mask(alpha, view.size, part=view.exact_region)
    left, top, width, height = view.region
    cut = cut_out(picture.alpha, Window(top, left, height, width))
    return resized_mask(alpha_mask(cut, inverted=False), view.size)


def _npy(values: Mask) -> bytes:
    encoded = BytesIO()
    np.save(encoded, values)
    return encoded.getvalue()


def _png(image: Image.Image) -> bytes:
    encoded = BytesIO()
    # Level 1 is several times faster than the default and a tenth larger.
    image.save(encoded, format="PNG", compress_level=1)
    return encoded.getvalue()
