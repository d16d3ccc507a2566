"""What pictures of a set are rendered with on this machine: detector and restorer, made ready."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from trainer.config import Note
from trainer.data.picture_set import PictureSet
from trainer.events import StageEvent
from trainer.images.detectors import FaceDetector, detector_of
from trainer.images.restore import LICENCES, Restorer, restorer_of
from trainer.stages import drained


@dataclass(frozen=True)
class Means:
    """Detector and restorer.

    Args:
        detector: finds faces, where they are wanted.
        restorer: identity and function, where faces are restored.
        are_makeshift: whether the detector stands in for a better one that cannot be had here.
        notes: what the user should know of them; said with the subject's pictures alone.
    """

    detector: FaceDetector | None = None
    restorer: tuple[str, Restorer] | None = None
    are_makeshift: bool = False
    notes: tuple[Note, ...] = ()

    def identity(self) -> dict[str, str]:
        """What their results depend on beside the pictures and options."""
        return {
            "detector": self.detector.identity if self.detector else "",
            "restorer": self.restorer[0] if self.restorer else "",
        }


def ready_means(wanted: PictureSet) -> Generator[StageEvent, None, Means]:
    """The means for a set of pictures; what is fetched is told on the way.

    Raises:
        InputError: they cannot be had.
    """
    detector, warnings = detector_of(wanted.face) if wanted.wants_faces else (None, ())
    notes = [Note(kind="warning", field="face_detector", message=text) for text in warnings]
    restorer = None
    if wanted.restores:
        restorer = yield from restorer_of(wanted.face)
        licence = LICENCES[str(wanted.face.face_restore)]
        notes.append(Note(kind="warning", field="face_restore", message=licence))
    told = () if wanted.of_class else tuple(notes)
    return Means(detector, restorer, are_makeshift=bool(warnings), notes=told)


def means_of(wanted: PictureSet) -> Means:
    """The same, without a word on the way."""
    return drained(ready_means(wanted))
