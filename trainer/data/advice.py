"""What a set of pictures is good for as a whole, one line a topic, measured by the fal guide.

The guide (FAL Model Training Guide, training image collection) asks for 10 to 15 pictures at
least and 20 to 30 better; 1024x1024 at least; about 40 % front views, 30 % three-quarter views
and 20 % profiles; close-ups, half and full figures; sharp, well lit, nobody else in them. How the
advice is shown, and what is odd about single pictures, is not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.data.buckets import largest_side
from trainer.images.crop import Size, enlargement
from trainer.images.findings import Remark
from trainer.images.quality import CLIPPED, LARGEST_ENLARGEMENT, Measures
from trainer.sources.caption_files import listed

if TYPE_CHECKING:
    from trainer.images.faces import Face

Level = Literal["ok", "look", "act"]
# By urgency.
LEVELS: tuple[Level, ...] = ("ok", "look", "act")
Angle = Literal["front", "three-quarter", "side"]
Distance = Literal["close-up", "medium", "full"]

FEWEST, ENOUGH, PLENTY = 10, 20, 30
RECOMMENDED_SIZE: Size = (1024, 1024)
# Share of fingerprint bits under which two pictures are nearly the same: saved again, resized or
# made brighter they differ in up to 0.05, cropped by 3 % or turned by 3 degrees in 0.17 and more,
# different pictures in about 0.5.
NEAR = 0.10
# A picture is soft beside its set from this share of the set's median sharpness down: a blur of 2
# of 512 pixels leaves 0.05 to 0.08 of a photograph's own.
_SOFT_SHARE = 0.1
# A median of fewer pictures says nothing of one of them.
_FEWEST_FOR_MEDIAN = 4
# Fingerprints compared with all others at once: 10 MB for each 5000 pictures.
_ROWS_AT_ONCE = 512
# Pairs of pictures that a line names.
_SHOWN = 3
# How far the nose is off the middle between the eyes, in distances between the eyes. A nose stands
# out about 0.9 times as far as an eye is off the middle, so that a head turned by t degrees has
# 0.45 tan t: 0.15 at 18 degrees, 0.5 at 48.
_FRONT, _THREE_QUARTER = 0.15, 0.5
# Height of the face in heights of what is used of the picture.
_CLOSE_UP, _MEDIUM = 0.35, 0.12


@dataclass(frozen=True)
class Subject:
    """What is known of one usable picture.

    Args:
        name: path inside the user's source.
        size: (height, width) of what is used of it, before it is resized.
        sha256: of the file's bytes.
        measures: of what is used of it.
        remarks: all that is odd about it.
        faces: the largest first, in pixels of the whole picture; nothing where faces were not
            looked for.
        target: trained (height, width) of this picture, the largest of several, if that is known.
        recommended: (height, width) that it should have at least.
    """

    name: str
    size: Size
    sha256: str
    measures: Measures
    remarks: tuple[Remark, ...] = ()
    faces: tuple[Face, ...] | None = None
    target: Size | None = None
    recommended: Size = RECOMMENDED_SIZE


def recommended_size(priority: str | None) -> Size:
    """The (height, width) that pictures should have: of the guide's, the share that is trained.

    Args:
        priority: see the option.
    """
    height, width = RECOMMENDED_SIZE
    return largest_side(height, priority), largest_side(width, priority)


@dataclass(frozen=True)
class Line:
    """What was found on one topic.

    Args:
        found: in the pictures.
        advice: what is recommended, or what to do about what was found.
        level: `ok`; `look`: may well be as it should; `act`: training suffers from it.
    """

    topic: str
    found: str
    advice: str
    level: Level


@dataclass(frozen=True)
class Advice:
    """What there is to say of a set of pictures, in a fixed order of topics."""

    lines: tuple[Line, ...]

    @property
    def level(self) -> Level:
        """The most urgent level of all lines."""
        return max((line.level for line in self.lines), key=LEVELS.index, default="ok")

    def as_dict(self) -> dict[str, Any]:
        """The advice as JSON can hold it."""
        return {"level": self.level, "lines": [asdict(line) for line in self.lines]}


def advise(subjects: Sequence[Subject]) -> Advice:
    """The advice on a set of pictures; on faces only where they were looked for."""
    topics = _TOPICS
    if any(subject.faces is not None for subject in subjects):
        topics = (*topics, *_FACE_TOPICS)
    lines = (line for topic in topics for line in [topic(subjects)] if line is not None)
    return Advice(tuple(lines))


def angle_of(landmarks: Sequence[tuple[float, float]]) -> Angle:
    """From where a face is seen, by where its nose stands between its eyes.

    Args:
        landmarks: (x, y) of both eyes and the nose, in this order; more do not matter.
    """
    (right_x, right_y), (left_x, left_y), (nose_x, nose_y) = landmarks[:3]
    across, down = left_x - right_x, left_y - right_y
    square = across**2 + down**2
    if square == 0:
        return "side"
    # Along the line between the eyes, so that a tilted head does not look turned.
    along = ((nose_x - right_x) * across + (nose_y - right_y) * down) / square
    off = abs(along - 0.5)
    return "front" if off < _FRONT else "three-quarter" if off < _THREE_QUARTER else "side"


def distance_of(face_height: float, used_height: float) -> Distance:
    """From how far a person is seen.

    Args:
        used_height: of what is used of the picture, in the same pixels.
    """
    share = face_height / used_height
    return "close-up" if share > _CLOSE_UP else "medium" if share >= _MEDIUM else "full"


def on_count(count: int) -> Line:
    """The advice on so many pictures."""
    level: Level = "ok" if count >= ENOUGH else "look" if count >= FEWEST else "act"
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    found = f"only {pictures}" if level == "act" else pictures
    return Line("count", found, f"at least {FEWEST}, better {ENOUGH} to {PLENTY}", level)


def on_copies(digests: Sequence[tuple[str, str]]) -> Line:
    """The advice on pictures that are byte for byte an earlier one.

    Args:
        digests: name and sha256 of each picture.
    """
    pairs = [f"`{name}` is the same file as `{first}`" for name, first in copies(digests)]
    if not pairs:
        return Line("copies", "none", "each picture once", "ok")
    advice = "keep one of each; every copy counts once more"
    return Line("copies", _several(pairs), advice, "act")


def copies(digests: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Each picture that is byte for byte an earlier one, with that one's name.

    Args:
        digests: name and sha256 of each picture.
    """
    first: dict[str, str] = {}
    found = []
    for name, sha256 in digests:
        earlier = first.setdefault(sha256, name)
        if earlier != name:
            found.append((name, earlier))
    return tuple(found)


def twins(subjects: Sequence[Subject]) -> tuple[tuple[str, str, bool], ...]:
    """Each picture that is nearly an earlier one, that one's name, and whether it is mirrored.

    Copies and pictures of one flat colour are left out.
    """
    unlike = {subject.sha256: subject for subject in reversed(subjects)}
    rest = [s for s in subjects if unlike[s.sha256] is s and not s.measures.is_flat]
    if not rest:
        return ()
    straight = _signs([subject.measures.fingerprint for subject in rest])
    mirrored = _signs([subject.measures.mirrored for subject in rest])
    near, nearest = _nearest_before(straight, straight)
    turned, nearest_turned = _nearest_before(straight, mirrored)
    found = []
    for place in np.flatnonzero(np.minimum(near, turned) < NEAR):
        is_mirrored = bool(turned[place] < near[place])
        earlier = (nearest_turned if is_mirrored else nearest)[place]
        found.append((rest[place].name, rest[earlier].name, is_mirrored))
    return tuple(found)


def _signs(fingerprints: Sequence[str]) -> npt.NDArray[np.float32]:
    """(n, 256): the bits of each fingerprint as 1 and -1."""
    packed = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in fingerprints]
    return np.unpackbits(np.stack(packed), axis=1).astype(np.float32) * 2 - 1


def _nearest_before(
    signs: npt.NDArray[np.float32], others: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """For each row the share of bits in which the nearest earlier other row differs, and its place.

    A product of matrices counts the bits; whole numbers so small are exact in it. The first row,
    which none is before, differs in all.
    """
    shares, places = [], []
    for start in range(0, len(signs), _ROWS_AT_ONCE):
        rows = signs[start : start + _ROWS_AT_ONCE]
        end = start + len(rows)
        differ = (1 - rows @ others[:end].T / signs.shape[1]) / 2
        differ[~np.tri(len(rows), end, start - 1, dtype=np.bool_)] = 1
        shares.append(differ.min(axis=1))
        places.append(differ.argmin(axis=1))
    return np.concatenate(shares), np.concatenate(places)


def _count(subjects: Sequence[Subject]) -> Line:
    return on_count(len(subjects))


def _resolution(subjects: Sequence[Subject]) -> Line:
    """How many pictures are smaller than trained or, where that is unknown, than recommended."""
    times = [enlargement(s.size, s.target or s.recommended) for s in subjects]
    height, width = next((s.recommended for s in subjects), RECOMMENDED_SIZE)
    advice = f"{width}x{height} or larger"
    # What reads as `1.0 times` is nothing to speak of.
    small = [s for s, t in zip(subjects, times, strict=True) if round(t, 1) > 1]
    if not small:
        return Line("resolution", "all large enough", advice, "ok")
    worst = max(range(len(subjects)), key=lambda place: times[place])
    least = subjects[worst]
    bar = "trained" if least.target else f"{width}x{height}"
    found = (
        f"{_of(len(small), subjects)} smaller than {bar}; the smallest is `{least.name}`, "
        f"{least.size[1]}x{least.size[0]}, to be enlarged {times[worst]:.1f} times"
    )
    return Line(
        "resolution", found, advice, "act" if times[worst] > LARGEST_ENLARGEMENT else "look"
    )


def _sharpness(subjects: Sequence[Subject]) -> Line:
    judged = [s for s in subjects if not (s.measures.is_flat or s.measures.is_dark)]
    median = float(np.median([s.measures.sharpness for s in judged])) if judged else 0.0
    floor = _SOFT_SHARE * median if len(judged) >= _FEWEST_FOR_MEDIAN else 0.0
    soft = [s.name for s in judged if s.measures.is_soft]
    softer = [s.name for s in judged if not s.measures.is_soft and s.measures.sharpness < floor]
    found = [f"{listed(soft)} blurred"] if soft else []
    found += [f"{listed(softer)} much softer than the rest"] if softer else []
    advice = "sharp pictures; replace blurred ones" if found else "sharp pictures"
    level: Level = "act" if soft else "look" if softer else "ok"
    return Line("sharpness", "; ".join(found) or "none looks blurred", advice, level)


def _light(subjects: Sequence[Subject]) -> Line:
    groups = {
        "very dark": [s.name for s in subjects if s.measures.is_dark],
        "one flat colour": [s.name for s in subjects if s.measures.is_flat],
        "mostly pure white": [
            s.name for s in subjects if s.measures.overexposed >= CLIPPED and not s.measures.is_flat
        ],
    }
    found = [f"{listed(names)} {what}" for what, names in groups.items() if names]
    poor = groups["very dark"] + groups["one flat colour"]
    level: Level = "act" if poor else "look" if found else "ok"
    return Line("light", "; ".join(found) or "well lit", "good, varied light", level)


def _copies(subjects: Sequence[Subject]) -> Line:
    return on_copies([(subject.name, subject.sha256) for subject in subjects])


def _twins(subjects: Sequence[Subject]) -> Line:
    pairs = [
        f"`{name}` is nearly `{first}`" + (" mirrored" if mirrored else "")
        for name, first, mirrored in twins(subjects)
    ]
    if not pairs:
        return Line("near copies", "none", "varied pictures", "ok")
    return Line("near copies", _several(pairs), "variety helps more than more of the same", "look")


def _remarked(subjects: Sequence[Subject]) -> Line:
    names = [s.name for s in subjects if any(r.kind == "warning" for r in s.remarks)]
    if not names:
        return Line("warnings", "none", "pictures without warnings", "ok")
    advice = "look at them on the contact sheet"
    return Line("warnings", f"{_of(len(names), subjects)}: {listed(names)}", advice, "look")


def _faces(subjects: Sequence[Subject]) -> Line:
    searched = _searched(subjects)
    without = [s.name for s in searched if not s.faces]
    if not without:
        return Line("faces", "every picture shows one", "a clear face in every picture", "ok")
    if len(without) == len(searched):
        advice = "set `face_aware_cropping: false` if you do not train a person"
        return Line("faces", "no picture shows one", advice, "act")
    found = f"none in {_of(len(without), searched)}: {listed(without)}"
    return Line("faces", found, "a clear face in every picture; crop or remove these", "look")


def _people(subjects: Sequence[Subject]) -> Line | None:
    if not _shown(subjects):
        return None
    groups = [subject.name for subject in subjects if len(subject.faces or ()) > 1]
    if not groups:
        return Line("people", "one person in each picture", "one person in each picture", "ok")
    found = f"several in {_of(len(groups), subjects)}: {listed(groups)}"
    return Line("people", found, "one person in each picture; crop these", "look")


def _angle(subjects: Sequence[Subject]) -> Line | None:
    landmarks = [face.landmarks for face, _ in _shown(subjects) if face.landmarks is not None]
    if not landmarks:
        return None
    counts: Counter[str] = Counter(angle_of(points) for points in landmarks)
    shares = {"front": "40 %", "three-quarter": "30 %", "side": "20 %"}
    return _variety("angle", counts, shares)


def _distance(subjects: Sequence[Subject]) -> Line | None:
    shown = _shown(subjects)
    if not shown:
        return None
    counts: Counter[str] = Counter(distance_of(face.height, height) for face, height in shown)
    return _variety("distance", counts, {"close-up": "", "medium": "", "full": "figure"})


def _variety(topic: str, counts: Counter[str], kinds: Mapping[str, str]) -> Line:
    """A line that is all right where every kind is there.

    Args:
        counts: of pictures by kind.
        kinds: all kinds in their order, with what is added to each in the advice.
    """
    found = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    advice = "a mix: " + ", ".join(f"{kind} {more}".strip() for kind, more in kinds.items())
    return Line(topic, found, advice, "ok" if all(counts[kind] for kind in kinds) else "look")


def _searched(subjects: Sequence[Subject]) -> list[Subject]:
    return [subject for subject in subjects if subject.faces is not None]


def _shown(subjects: Sequence[Subject]) -> list[tuple[Face, int]]:
    """The largest face of each picture that shows one, and the height of what is used of it."""
    return [(s.faces[0], s.size[0]) for s in subjects if s.faces]


def _of(count: int, subjects: Sequence[Subject]) -> str:
    return f"{count} of {len(subjects)}"


def _several(sentences: Sequence[str]) -> str:
    more = len(sentences) - _SHOWN
    return "; ".join(sentences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


_TOPICS: tuple[Callable[[Sequence[Subject]], Line | None], ...] = (
    _count,
    _resolution,
    _sharpness,
    _light,
    _copies,
    _twins,
    _remarked,
)
_FACE_TOPICS: tuple[Callable[[Sequence[Subject]], Line | None], ...] = (
    _faces,
    _people,
    _angle,
    _distance,
)
