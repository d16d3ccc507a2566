"""The steps of a picture's preparation: cut to its face, faces redrawn, resized, in any order.

Every step keeps track of which part of the whole picture is left, so that masks and faces follow.
What the picture is trained at in the end is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image

from trainer.data.picture_set import PictureSet
from trainer.fields import PreparationStep
from trainer.images.crop import (
    Box,
    Size,
    Window,
    center_window,
    cover_size,
    face_region,
    face_window,
    resize_to_cover,
)
from trainer.images.faces import Face
from trainer.images.findings import Remark
from trainer.images.pictures import BadPicture
from trainer.images.restore import Restorer, restored

# What the contact sheet shows of a picture, and of a face before and after.
THUMBNAIL = 360
# A panorama is a few windows long; what is longer is no photograph.
_LONGEST_STRIP = 16


@dataclass(frozen=True)
class Stage:
    """A picture between two steps.

    Args:
        part: left, top, width and height of what is left, in pixels of the whole picture.
        faces: in its pixels, the largest first.
        detail: the fewest (height, width) in pixels that what is left ever had.
        restored: JPEGs of the largest face before and after its restoration, where there was one.
    """

    image: Image.Image
    part: Box
    faces: tuple[Face, ...]
    detail: tuple[float, float]
    remarks: tuple[Remark, ...] = ()
    restored: tuple[bytes, bytes] | None = None

    @classmethod
    def of(cls, whole: Image.Image, faces: tuple[Face, ...]) -> Stage:
        """The whole picture."""
        width, height = whole.size
        return cls(whole, (0, 0, width, height), faces, (height, width))

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.image.height, self.image.width

    def cut(self, window: Window) -> Stage:
        """What a window shows of it."""
        height, width = self.size
        left, top, part_width, part_height = self.part
        across, down = part_width / width, part_height / height
        return replace(
            self,
            image=cut_out(self.image, window),
            part=(
                left + window.left * across,
                top + window.top * down,
                window.width * across,
                window.height * down,
            ),
            faces=tuple(face.moved(-window.left, -window.top) for face in self.faces),
            detail=(
                self.detail[0] * window.height / height,
                self.detail[1] * window.width / width,
            ),
        )

    def at(self, image: Image.Image) -> Stage:
        """The same part in other pixels, perhaps fewer or more of them."""
        factor = image.width / self.image.width
        return replace(
            self,
            image=image,
            faces=self.faces if factor == 1 else tuple(face.scaled(factor) for face in self.faces),
            detail=(min(self.detail[0], image.height), min(self.detail[1], image.width)),
        )

    def seen_faces(self) -> tuple[Face, ...]:
        """The faces whose middle is in what is left."""
        height, width = self.size
        return tuple(
            face
            for face in self.faces
            if 0 <= face.centre[0] < width and 0 <= face.centre[1] < height
        )


def prepared_by_steps(stage: Stage, wanted: PictureSet, restorer: Restorer | None) -> Stage:
    """The picture after all steps that are asked for; the resize to what is trained is to come.

    Args:
        restorer: redraws faces, where that is wanted.

    Raises:
        BadPicture: the picture cannot be used.
    """
    for place, step in enumerate(wanted.steps):
        stage = _STEPS[step](stage, wanted, restorer, wanted.steps[place + 1 :])
    return stage


def _cut_to_face(stage: Stage, wanted: PictureSet, *_: object) -> Stage:
    ratio = wanted.face.face_crop_region
    if ratio is None or not stage.faces:
        return stage
    return stage.cut(face_region(stage.size, stage.faces[0].box, ratio))


def _faces_redrawn(
    stage: Stage, wanted: PictureSet, restorer: Restorer | None, *_: object
) -> Stage:
    if restorer is None or not stage.faces:
        return stage
    before = stage.image
    upscale = wanted.face.face_restore_upscale
    after, told = restored(before, stage.faces, restorer, upscale=upscale)
    shown = stage.restored
    if after is not before:
        first = stage.faces[0]
        shown = _face_of(before, first), _face_of(after, first, before)
    return replace(stage.at(after), remarks=(*stage.remarks, *told), restored=shown)


def _resized(
    stage: Stage, wanted: PictureSet, _: Restorer | None, later: tuple[PreparationStep, ...]
) -> Stage:
    """The picture at the trained size, or the one asked for.

    It is cut to a window only where that could not be done as well at the end, when more is known
    of the picture: a later cut must not reach beyond it, and another size has another shape.
    """
    if not later and not wanted.passes_other_size:
        return stage
    target = wanted.passed_size(stage.size)
    refuse_strip(stage.size, target)
    resized = stage.at(resize_to_cover(stage.image, target))
    if "face_crop_region" not in later and not wanted.passes_other_size:
        return resized
    window = center_window(resized.size, target)
    if wanted.data.face_aware_cropping and resized.faces:
        window = face_window(resized.size, target, resized.faces[0].box)
    cut = resized.cut(window)
    return replace(cut, faces=cut.seen_faces())


# What a step does, given the picture so far, what is wanted, the restorer and the later steps.
_Step = Callable[[Stage, PictureSet, Restorer | None, tuple[PreparationStep, ...]], Stage]
_STEPS: Mapping[PreparationStep, _Step] = {
    "face_crop_region": _cut_to_face,
    "face_restore": _faces_redrawn,
    "resize": _resized,
}


def refuse_strip(size: Size, target: Size) -> None:
    """Refuses what would have to be enlarged to a huge strip to cover a window.

    Raises:
        BadPicture: the covering picture is more than `_LONGEST_STRIP` windows.
    """
    height, width = cover_size(size, target)
    if height * width > _LONGEST_STRIP * target[0] * target[1]:
        aspect = max(size) / min(size)
        raise BadPicture(f"it is {size[1]}x{size[0]} pixels, {aspect:.0f}:1; cut it to a window")


def cut_out(image: Image.Image, window: Window) -> Image.Image:
    """What a window shows of a picture."""
    if (window.width, window.height) == image.size:
        # Not copied: a large photograph is hundreds of megabytes.
        return image
    right, bottom = window.left + window.width, window.top + window.height
    return image.crop((window.left, window.top, right, bottom))


def thumbnail_of(image: Image.Image) -> bytes:
    """A small JPEG of a picture."""
    encoded = BytesIO()
    shrunk(image, THUMBNAIL).save(encoded, format="JPEG", quality=90)
    return encoded.getvalue()


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The picture, its longer side no longer than so many pixels."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)


def _face_of(image: Image.Image, face: Face, before: Image.Image | None = None) -> bytes:
    """JPEG of a face with a margin.

    Args:
        face: in pixels of the picture before restoring.
        before: the picture before, where `image` may be an enlarged one.
    """
    factor = 1.0 if before is None else image.width / before.width
    window = face_region((image.height, image.width), face.scaled(factor).box, 1.5)
    return thumbnail_of(cut_out(image, window))
