"""A set of pictures and what is wanted of it: the sections that preparing them needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from trainer.config import (
    CaptionConfig,
    Concept,
    DataConfig,
    FaceConfig,
    MaskConfig,
    TrainingConfig,
)
from trainer.data.buckets import bucket_of, bucket_sizes, smaller_shapes
from trainer.data.inventory import Inventory, opened
from trainer.fields import PREPARATION_STEPS, PreparationStep
from trainer.images.crop import Size
from trainer.sections.data import in_order
from trainer.sections.subjects import ClassSource, class_data_of, data_of
from trainer.sources.archive import Source


@dataclass(frozen=True)
class PictureSet:
    """A set of pictures and what is wanted of it.

    Args:
        data: where pictures and captions are, and the trained size; for class pictures theirs.
        mask: what counts in them.
        face: how faces are found, cut out and restored.
        caption: how captions are written.
        trigger: the word for the subject in captions; nothing for class pictures.
        identifiers: other words of the training that do as well.
        class_word: what the subject is, such as `woman`, for captions that a model writes.
        of_class: the pictures show the class, not the subject.
    """

    data: DataConfig
    mask: MaskConfig
    face: FaceConfig
    caption: CaptionConfig
    trigger: str | None = None
    identifiers: tuple[str, ...] = ()
    class_word: str | None = None
    of_class: bool = False

    @property
    def scales(self) -> tuple[tuple[Size, ...], ...]:
        """The trained (height, width) that a picture may get, for each area, the largest first.

        None before they are known.
        """
        width, height = self.data.resolution_width, self.data.resolution_height
        if width is None or height is None:
            return ()
        shapes = [(width, height), *smaller_shapes(width, height, self.data.priority)]
        if self.data.enable_bucket:
            return tuple(bucket_sizes(*shape) for shape in shapes)
        return tuple(((down, right),) for right, down in shapes)

    @property
    def wants_faces(self) -> bool:
        """Whether faces are looked for."""
        return self.data.face_aware_cropping or self.cuts or self.restores

    @property
    def cuts(self) -> bool:
        """Whether pictures are cut to their largest face."""
        return not self.of_class and self.face.face_crop_region is not None

    @property
    def restores(self) -> bool:
        """Whether small faces are redrawn."""
        return not self.of_class and self.face.face_restore is not None

    @property
    def steps(self) -> tuple[PreparationStep, ...]:
        """The steps of the preparation that are asked for, in their order."""
        return self._asked(in_order(self.data.preparation_order))

    @property
    def passes_other_size(self) -> bool:
        """Whether pictures come through another size than the trained one on their way."""
        other = self.data.resize_width, self.data.resize_height
        return not self.of_class and other != (None, None)

    def passed_size(self, size: Size) -> Size:
        """(height, width) that the resize among the steps brings a picture of this size to."""
        height, width = self.targets(size)[0]
        if not self.passes_other_size:
            return height, width
        return self.data.resize_height or height, self.data.resize_width or width

    def _asked(self, steps: Sequence[PreparationStep]) -> tuple[PreparationStep, ...]:
        asked = {"face_crop_region": self.cuts, "face_restore": self.restores, "resize": True}
        return tuple(step for step in steps if asked[step])

    @property
    def looks(self) -> Mapping[str, object]:
        """All that a picture's view depends on beside the picture itself."""
        sizes, *smaller = self.scales or ((),)
        ours: dict[str, object] = {
            "sizes": sizes,
            "of_class": self.of_class,
            "faces": self.wants_faces,
            "cuts": self.cuts,
            "restores": self.restores,
        }
        if smaller:
            ours["smaller"] = smaller
        if self.steps != self._asked(PREPARATION_STEPS) or self.passes_other_size:
            ours["steps"] = self.steps
            ours["passed"] = (self.data.resize_width, self.data.resize_height)
            # It places the window of a resize among the steps.
            ours["face_aware_cropping"] = self.data.face_aware_cropping
        return {**ours, **(self.face.model_dump() if self.wants_faces else {})}

    def opened(
        self, downloaded: Path | None, *, captions_file: Path | None = None
    ) -> AbstractContextManager[tuple[Source, Inventory]]:
        """The files of the pictures, and what they are.

        Args:
            downloaded: the file behind the pictures' web address.
            captions_file: the file behind the captions'.
        """
        return opened(
            self.data,
            of_class=self.of_class,
            trigger=self.trigger,
            identifiers=self.identifiers,
            add_trigger=self.caption.add_trigger,
            downloaded=downloaded,
            captions_file=captions_file,
        )

    def targets(self, size: Size) -> tuple[Size, ...]:
        """The trained sizes of a picture of this size, the largest first; none if not known."""
        return tuple(bucket_of(size, sizes) for sizes in self.scales)


def pictures_of(config: TrainingConfig, concept: Concept) -> PictureSet:
    """The pictures of a concept whose options are filled in."""
    return PictureSet(
        data=data_of(concept, config.data),
        mask=config.mask,
        face=config.face,
        caption=config.caption,
        trigger=concept.token,
        identifiers=config.token.token_abstraction,
        class_word=concept.photo_class.lower() if concept.photo_class else None,
    )


def class_pictures_of(config: TrainingConfig, source: ClassSource, url: str) -> PictureSet:
    """The pictures of a class that lie at this place."""
    return PictureSet(
        data=class_data_of(source, url, config.data),
        mask=config.mask,
        face=config.face,
        caption=config.caption,
        of_class=True,
    )
