"""Sets of pictures of other programs: where they are, of whom, how often and at which size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.errors import InputError
from trainer.importers import folders
from trainer.importers.desk import Desk, Table
from trainer.leaves import shown

# The sizes of a priority, and the side of the base model's own pictures that it is for.
_OF_QUALITY = [(512, 512), (768, 768), (1024, 1024)]
_NATIVE = 1024


@dataclass(frozen=True)
class Pictures:
    """One set of pictures.

    Args:
        folder: where they are.
        repeats: times that an epoch shows each.
        prompt: of those without a caption, where it is known.
        token: the word for what they show, where it is known.
        prompt_name: of the option there that says the prompt. Empty: that of the folder.
        token_name: the same of the token.
    """

    folder: str
    repeats: int = 1
    prompt: str | None = None
    token: str | None = None
    prompt_name: str = ""
    token_name: str = ""

    @property
    def examples(self) -> int | None:
        """Pictures that an epoch shows; None where they are not on this machine."""
        found = folders.count(self.folder)
        return None if found is None else found * self.repeats


def take_pictures(
    desk: Desk,
    subjects: Sequence[Pictures],
    classes: Sequence[Pictures],
    name: str,
    class_name: str,
) -> None:
    """Takes over where pictures are: one set as the run's own, several as concepts.

    Args:
        classes: sets of pictures of the class: one for all subjects, or one for each.
        name: of the option there that has the pictures.
        class_name: of the one that has those of the class.
    """
    if len(subjects) == 1:
        _take_only(desk, subjects[0], name)
        for leaf, value in _of_class(classes[0] if classes else None).items():
            desk.take_as_given(class_name, leaf, value)
    elif subjects:
        paired = len(classes) == len(subjects)
        concepts = [
            {
                "images_data_url": pictures.folder,
                **({"token": pictures.token} if pictures.token else {}),
                **({"instance_prompt": pictures.prompt} if pictures.prompt else {}),
                **({"repeats": pictures.repeats} if pictures.repeats > 1 else {}),
                **_of_class(classes[place if paired else 0] if classes else None),
            }
            for place, pictures in enumerate(subjects)
        ]
        desk.take_as_given(name, "concepts", concepts)
        tokens = [pictures.token for pictures in subjects]
        if desk.values.pop("token_abstraction", None) is not None and all(tokens):
            desk.values["token_abstraction"] = list(dict.fromkeys(tokens))
    unused = [] if len(classes) == len(subjects) else classes[1:]
    for pictures in unused:
        reason = "one set of class pictures for all subjects, or one for each: this one is left out"
        desk.leave(class_name, reason, value=pictures.folder)


def _take_only(desk: Desk, pictures: Pictures, name: str) -> None:
    desk.take_as_given(name, "images_data_url", pictures.folder)
    if pictures.prompt:
        desk.take_as_given(pictures.prompt_name or name, "instance_prompt", pictures.prompt)
    if pictures.token:
        desk.take_as_given(pictures.token_name or name, "token_abstraction", [pictures.token])


def joined(sets: Sequence[Pictures]) -> list[Pictures]:
    """Sets of pictures, of which those of one folder are one that is shown as often as they are."""
    found: dict[Pictures, int] = {}
    for pictures in sets:
        alike = replace(pictures, repeats=1)
        found[alike] = found.get(alike, 0) + pictures.repeats
    return [replace(pictures, repeats=repeats) for pictures, repeats in found.items()]


def tell_others(desk: Desk, table: Table, name: str, label: str, values: Sequence[Any]) -> None:
    """Says what becomes of an option that sets of pictures have differently: one value is taken.

    Args:
        name: of the option, of which the desk was given one value.
        label: what the report calls it.
        values: that the sets have; None where one has none.
    """
    chosen, row = desk.given.get(name), table.get(name)
    trials = []
    for value in values:
        if row is not None and value is not None and value != chosen:
            trial = Desk({**desk.given, name: value}, desk.defaults, desk.kind)
            trial.act(name, row)
            trials.append(trial)
    if any(entry.name == name for each in (desk, *trials) for entry in each.taken):
        desk.leave(label, f"one value for all pictures: {shown(chosen)} is taken", value=values)
        return
    left = [entry for trial in trials for entry in trial.left]
    for reason in dict.fromkeys(entry.reason for entry in left):
        matters = any(entry.matters for entry in left if entry.reason == reason)
        desk.leave(label, reason, matters=matters, value=values)


def take_sizes(desk: Desk, name: str, sizes: Sequence[tuple[int, int]]) -> None:
    """One size, or several that are a priority of a base model of 1024 pixels.

    Args:
        sizes: width and height of each.
    """
    several = sorted(set(sizes), key=lambda size: size[0] * size[1])
    if several == _OF_QUALITY and desk.native == _NATIVE:
        desk.take(name, "priority", "quality")
        return
    width, height = several[-1]
    if len(several) > 1:
        reason = f"one size, or those of --priority: the largest is taken, {width} x {height}"
        desk.leave(name, reason)
    desk.take(name, "resolution_width", width)
    desk.take(name, "resolution_height", height)


def _of_class(pictures: Pictures | None) -> dict[str, Any]:
    if pictures is None:
        return {}
    prompt = {"class_prompt": pictures.prompt} if pictures.prompt else {}
    return {"with_prior_preservation": True, "class_images_url": pictures.folder, **prompt}


def repeats_of(value: Any, name: str) -> int:
    """How often an epoch shows pictures.

    Raises:
        InputError: it is no whole number of at least 1.
    """
    try:
        repeats = int(float(value))
    except (TypeError, ValueError, OverflowError):
        repeats = 0
    if repeats < 1:
        raise InputError.of(name, f"got {shown(value)}; allowed: a whole number, at least 1")
    return repeats
