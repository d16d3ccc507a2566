"""The desk on which another program's options become ours, or are left with the reason.

A table has a row for every option of a program. Knows no program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config import LEAVES
from trainer.errors import InputError, Problem
from trainer.importers import reasons
from trainer.importers.lengths import Lengths
from trainer.importers.secret_names import without_secrets
from trainer.leaves import allowed, flag_value, leaf_schema, nearest, shown

# What a base model learns by: a table of noise levels, or flow matching.
Kind = Literal["table", "flow"]
_MEANS_NOTHING: Mapping[Kind, str] = {
    "table": "the base model learns from a table of noise levels",
    "flow": "the base model learns by flow matching",
}


@dataclass(frozen=True)
class Taken:
    """An option of the other program that became one of ours.

    Args:
        name: there.
        value: there.
        option: here.
        becomes: its value here.
    """

    name: str
    value: Any
    option: str
    becomes: Any


@dataclass(frozen=True)
class Left:
    """An option of the other program without a counterpart.

    Args:
        reason: why, and what to do.
        matters: whether the training is another one without it; otherwise it is not needed here.
    """

    name: str
    value: Any
    reason: str
    matters: bool


Act = Callable[["Desk", str, Any], None]


@dataclass(frozen=True)
class Row:
    """What becomes of one option.

    Args:
        leaves: the options here that it may decide over.
        act: takes it over, or leaves it.
        only: kind of base model for which it means something. None: any.
        idle: why it means nothing for the other one, where that is the program's own doing.
    """

    leaves: tuple[str, ...]
    act: Act
    only: Kind | None = None
    idle: str = ""


Table = Mapping[str, Row]


@dataclass
class Desk:
    """An import in the making.

    Args:
        given: option to value, as the files have them; what is null or empty is not given.
        defaults: of the other program, for what is not given.
        kind: what the base model learns by, where it is clear.
        native: side of the base model's own pictures in pixels, where it is clear.
        lengths: how its steps become ours.
        told: options that the row of another one reads, with its name and what both decide over.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    kind: Kind | None = None
    native: int | None = None
    lengths: Lengths = Lengths()
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    filled: list[Taken] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    told: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """The value of an option there: as it is given, else the other program's default."""
        return self.given.get(name, self.defaults.get(name))

    def take(self, name: str, leaf: str, value: Any) -> None:
        """Gives a leaf the value that an option there means.

        A default there that is ours, too, goes without saying.
        """
        value = fitting(leaf, value)
        if name in self.given:
            self.taken.append(Taken(name, self.given[name], leaf, value))
        elif value == LEAVES[leaf].info.default:
            return
        else:
            self.filled.append(Taken(name, self.defaults.get(name), leaf, value))
        self.values[leaf] = value
        self.sources[leaf] = name

    def assume(self, name: str, leaf: str, value: Any) -> None:
        """Writes out what the other program does by itself, where this one does otherwise."""
        self.defaults = {**self.defaults, name: value}
        self.take(name, leaf, value)

    def take_as_given(self, name: str, leaf: str, value: Any) -> None:
        """Takes a value over as of an option that is given, unless it has given it already."""
        self.given = {**self.given, name: self.given.get(name, shown(value))}
        if (self.sources.get(leaf), self.values.get(leaf)) != (name, value):
            self.take(name, leaf, value)

    def leave(self, name: str, reason: str, *, matters: bool = True, value: Any = None) -> None:
        """Says that an option has no counterpart; a default there is left only where it matters.

        Args:
            value: where it is not the option's own.
        """
        if name in self.given or matters or value is not None:
            own = self.setting(name) if value is None else value
            self.left.append(Left(name, without_secrets(name, own), reason, matters))

    def refuse(self, name: str, words: str) -> None:
        """Says that an option cannot be read."""
        message = f"got {shown(self.setting(name))}; allowed: {words}"
        self.problems.append(Problem(name, message))

    def whole(self, name: str) -> int:
        """An option as a whole number; 0 where it is none, which is a problem."""
        number = self.number(name)
        if not number.is_integer():
            self.refuse(name, "a whole number")
            return 0
        return int(number)

    def number(self, name: str) -> float:
        """An option as a number; 0 where it is none, which is a problem."""
        value = self.setting(name)
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            self.refuse(name, "a number")
            return 0.0

    def count(self, name: str) -> float:
        """An option as a number above 0; 0 where it is none, which is a problem."""
        before = len(self.problems)
        number = self.number(name)
        if number > 0 or len(self.problems) > before:
            return number
        self.refuse(name, "a number above 0")
        return 0.0

    def run(self, table: Table) -> None:
        """Goes through a table: what is given, then what the other program assumes."""
        for name in self.given:
            row = table.get(name)
            if row is None:
                hint = nearest(name, table)
                self.leave(name, f"{reasons.UNKNOWN}; {hint}" if hint else reasons.UNKNOWN)
        for name, row in table.items():
            if name in self.given or name in self.defaults:
                self.act(name, row)

    def act(self, name: str, row: Row) -> None:
        """Lets a row act on its option, as it is given or as it is assumed there."""
        value = self.setting(name)
        if row.only is not None and self.kind is not None and row.only != self.kind:
            if name in self.given:
                reason = row.idle or f"means nothing: {_MEANS_NOTHING[self.kind]}"
                self.leave(name, reason, matters=False)
        elif value is not None:
            try:
                row.act(self, name, value)
            except (TypeError, ValueError, OverflowError):
                words = [allowed(leaf) for leaf in row.leaves]
                self.refuse(name, words[0] if words else "another value")

    def close(self) -> None:
        """Says what became of options that another one's row read, and that others do nothing.

        Raises:
            InputError: with all that could not be read.
        """
        if self.problems:
            raise InputError(self.problems)
        said = {entry.name for entry in self.taken} | {entry.name for entry in self.left}
        # An option with parts is spoken of by them.
        said |= {name.partition(": ")[0] for name in said}
        for name in [name for name in self.given if name not in said]:
            self._tell(name)
        order = {name: place for place, name in enumerate(self.given)}
        self.left.sort(key=lambda entry: order.get(entry.name, len(order)))

    def _tell(self, name: str) -> None:
        """Says of an option that no row of its own spoke of where it went."""
        other, leaves = self.told.get(name, ("", ()))
        for leaf in leaves:
            if leaf in self.values and other in (leaf, *leaves, self.sources[leaf]):
                self.taken.append(Taken(name, self.given[name], leaf, self.values[leaf]))
                return
        is_option = bool(other) and other not in leaves
        reason = f"is read with {other}" if is_option else "does nothing beside the other options"
        self.leave(name, reason, matters=False)


def fitting(leaf: str, value: Any) -> Any:
    """A value in the type that a leaf has, where the other program writes another one."""
    if isinstance(value, str):
        return flag_value(leaf, value)
    kinds = [choice.get("type") for choice in _choices(leaf)]
    if isinstance(value, float) and value.is_integer() and "number" not in kinds:
        return int(value)
    return value


def _choices(leaf: str) -> Sequence[Mapping[str, Any]]:
    schema = leaf_schema(leaf)
    choices: Sequence[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return choices
