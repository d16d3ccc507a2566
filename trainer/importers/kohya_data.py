"""kohya's data set configuration: general, data sets and their subsets, each over the one before.

Source: `library/config_util.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import InputError
from trainer.importers import folders, reasons
from trainer.importers.pictures import Pictures, joined, repeats_of
from trainer.leaves import shown

# What options of a data set are called among those of the training.
_NAMES: Mapping[str, str] = {"batch_size": "train_batch_size"}
# What a subset says of itself alone.
_OWN = ("image_dir", "num_repeats", "class_tokens", "is_reg")
_SIZE = "resolution"


@dataclass
class Sets:
    """What a data set configuration means.

    Args:
        subjects: the sets of pictures of the subjects.
        classes: those of their classes.
        given: options that are the same for all, for the table.
        differ: option, its name there, and its values, of which `given` has one.
        left: option, reason and value of what is not.
        remarks: what is to be known.
    """

    subjects: list[Pictures] = field(default_factory=list)
    classes: list[Pictures] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    differ: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    left: list[tuple[str, str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the sections that they may stand in."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat


def read(training: Mapping[str, Any], content: Mapping[str, Any]) -> Sets:
    """The sets of pictures of a configuration, over the options of the training.

    Raises:
        InputError: it has another shape.
    """
    sets = Sets()
    if not content:
        return sets
    general = _mapping(content.get("general", {}), "general")
    rows = [
        {**general, **dataset, **subset}
        for dataset in _listed(content.get("datasets", []), "datasets")
        for subset in _listed(dataset.get("subsets", [{}]), "datasets.subsets")
    ]
    rows = [
        {n: v for n, v in row.items() if n != "subsets" and v not in ("", None)} for row in rows
    ]
    for name in content.keys() - {"general", "datasets"}:
        sets.left.append((name, reasons.UNKNOWN, content[name]))
    for row in rows:
        _place(sets, row, training)
    sets.subjects, sets.classes = joined(sets.subjects), joined(sets.classes)
    subjects = [row for row in rows if not row.get("is_reg")]
    _join(sets, subjects or rows)
    for name in _OWN:
        if any(name in row for row in rows):
            sets.given[name] = [row[name] for row in rows if name in row]
    return sets


def _place(sets: Sets, row: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Puts the pictures of a subset where they belong."""
    place = _text(row.get("image_dir"), "image_dir")
    if place is None:
        sets.left.append(("subsets", "a subset names no image_dir", dict(row)))
        return
    prompt = _text(row.get("class_tokens", training.get("class_tokens")), "class_tokens")
    pictures = Pictures(
        place,
        repeats=repeats_of(row.get("num_repeats", 1), "num_repeats"),
        prompt=prompt,
        token=folders.identifier_in(prompt) if prompt else None,
        prompt_name="class_tokens",
        token_name="class_tokens",
    )
    (sets.classes if row.get("is_reg") else sets.subjects).append(pictures)
    if row.get("is_reg") and prompt is None:
        sets.remarks.append(reasons.NO_CLASS)


def _join(sets: Sets, rows: Sequence[Mapping[str, Any]]) -> None:
    """Options that all subsets have alike; where they differ, that of the first, and all sizes."""
    for name in dict.fromkeys(name for row in rows for name in row if name not in _OWN):
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        has_several = any(value != known[0] for value in values)
        if has_several and name == _SIZE:
            sets.given[name] = [v if isinstance(v, list) else [v, v] for v in known]
            continue
        sets.given[_NAMES.get(name, name)] = known[0]
        if has_several:
            sets.differ.append((_NAMES.get(name, name), f"subsets: {name}", values))


def _text(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError.of(name, f"got {shown(value)}; allowed: text", f'write {name} = "..."')


def _listed(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return value
    raise InputError.of(name, "is no list of tables", f"write [[{name}]]")


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise InputError.of(name, "is no table", f"write [{name}]")
