"""A configuration in the making: its leaves, who set them, and what was found on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config import Note
from trainer.errors import Problem
from trainer.leaves import shown

Values = Mapping[str, Any]
Condition = Callable[[Values], bool]


@dataclass
class Draft:
    """A configuration in the making: leaves, who set them, and what was found on the way.

    Args:
        values: every leaf.
        origins: the number of the layer each leaf comes from; later layers are stronger.
        explicit: the leaves that somebody set on purpose.
        wrong: the leaves that are told of as wrong already; their values are defaults.
        written: the numbers of layers that a written configuration is read as: what stands in it
            has been settled together.
    """

    values: dict[str, Any]
    origins: Mapping[str, int]
    explicit: frozenset[str]
    wrong: frozenset[str] = frozenset()
    written: frozenset[int] = frozenset()
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def strength(self, leaf: str) -> tuple[bool, int]:
        """The rank of a leaf in a conflict: the weaker one yields."""
        return leaf in self.explicit, self.origins[leaf]

    def is_written(self, leaf: str) -> bool:
        """Whether a leaf is as a written configuration has it."""
        return self.origins[leaf] in self.written

    def settle(self, leaf: str, value: Any, reason: str) -> None:
        """Gives a leaf the value that a stronger one demands, and says so."""
        old = self.values[leaf]
        if old == value:
            return
        self.values[leaf] = value
        change = f"{shown(old)} gave way to" if old is not None else "became"
        self.note("yielded", leaf, f"{change} {shown(value)}: {reason}")

    def note(self, kind: Literal["yielded", "ignored", "warning"], leaf: str, message: str) -> None:
        """Records what the user should know of a leaf."""
        self.notes.append(Note(kind=kind, field=leaf, message=message))

    def clash(self, leaf: str, other: str, reason: str, hint: str) -> None:
        """Records that two explicit leaves contradict each other."""
        got = f"got {shown(self.values[leaf])} with `{other}` {shown(self.values[other])}"
        self.problems.append(Problem(leaf, f"{got}; allowed: one of the two, {reason}", hint))


def always(value: Any) -> Callable[[Values], Any]:
    """The same value whatever the others are."""
    return lambda values: value


def is_off(leaf: str) -> Condition:
    """Whether a leaf is false, empty, zero or null."""
    return lambda values: not values[leaf]


def differs(leaf: str, value: Any) -> Condition:
    """Whether a leaf has another value than this one."""
    return lambda values: bool(values[leaf] != value)


def trains_text(values: Values) -> bool:
    """Whether text encoders or new tokens learn."""
    return bool(values["train_text_encoder"] or values["train_text_encoder_ti"])
