"""What can be asked for and is not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import Problem
from trainer.leaves import shown
from trainer.rules.draft import Condition, Values


@dataclass(frozen=True)
class Missing:
    """A leaf whose machinery is missing.

    Args:
        asked: whether a configuration needs the machinery.
        machinery: what is missing.
        off: the value of the leaf that does not need it.
        instead: another option with the value that does without, where there is one.
    """

    asked: Condition
    machinery: str
    off: Any
    instead: tuple[str, Any] | None = None

    def problem(self, leaf: str, values: Values) -> Problem:
        """The refusal of a leaf, with what may be set instead."""
        ways = [*([self.instead] if self.instead else []), (leaf, self.off)]
        allowed = " or ".join(
            shown(value) if name == leaf else f"any with `{name}: {value}`" for name, value in ways
        )
        message = f"got {shown(values[leaf])}, but {self.machinery} is not available yet; "
        hint = " or ".join(f"`{name}: {_in_a_file(value)}`" for name, value in ways)
        return Problem(leaf, f"{message}allowed: {allowed}", f"set {hint}")


NOT_AVAILABLE_YET: Mapping[str, Missing] = {
    "face_aware_cropping": Missing(
        lambda values: bool(values["face_aware_cropping"]), "finding faces", False
    ),
    "clip_seg_mask_prompt": Missing(
        lambda values: bool(values["clip_seg_mask_prompt"]) and values["segmenter"] == "clipseg",
        "the segmenter clipseg",
        "",
        ("segmenter", "luminance"),
    ),
}


def refusals(values: Values) -> list[Problem]:
    """What the configuration asks for that this version cannot do."""
    return [
        missing.problem(leaf, values)
        for leaf, missing in NOT_AVAILABLE_YET.items()
        if missing.asked(values)
    ]


def _in_a_file(value: Any) -> str:
    return value if isinstance(value, str) and value else shown(value)
