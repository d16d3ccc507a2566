"""The rows that tables are made of: what may become of an option of another program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Act, Desk, Kind, Row
from trainer.importers.secret_names import HIDDEN


def is_true(value: Any) -> bool:
    """Whether a switch is on, also as text."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes", "on")
    return bool(value)


def becomes(
    leaf: str, read: Callable[[Any], Any] | None = None, *, only: Kind | None = None
) -> Row:
    """An option whose value is that of a leaf, or is made into it.

    Args:
        read: makes the leaf's value.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        desk.take(name, leaf, value if read is None else read(value))

    return Row((leaf,), act, only)


def switch(leaf: str, value: Any, *, only: Kind | None = None) -> Row:
    """An option that gives a leaf a value when it is on."""

    def act(desk: Desk, name: str, on: Any) -> None:
        if is_true(on):
            desk.take(name, leaf, value)
        else:
            desk.leave(name, "is off", matters=False)

    return Row((leaf,), act, only)


def chosen(
    leaf: str, choices: Mapping[str, Any], otherwise: str, *, only: Kind | None = None
) -> Row:
    """An option with one of several words.

    Args:
        choices: the word there, in small letters, to the value here.
        otherwise: what is said of any other word.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        word = str(value).strip().lower()
        if word in choices:
            desk.take(name, leaf, choices[word])
        else:
            desk.leave(name, otherwise)

    return Row((leaf,), act, only)


def without(
    reason: str, *, as_here: Collection[Any] | None = None, only: Kind | None = None
) -> Row:
    """An option that has no counterpart, and changes the training.

    Args:
        reason: what to do instead, or why it does not exist.
        as_here: values that mean what is done here anyway. None: false, 0 and empty ones.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        known = [] if as_here is None else as_here
        if any(_is_same(value, other) for other in known) or (as_here is None and is_off(value)):
            desk.leave(name, reasons.AS_HERE, matters=False)
        else:
            desk.leave(name, reason)

    return Row((), act, only)


def needless(reason: str) -> Row:
    """An option that has no counterpart and does not change what is trained."""

    def act(desk: Desk, name: str, value: Any) -> None:
        is_switched_off = str(value).strip().lower() == "false"
        desk.leave(name, "is off" if is_switched_off else reason, matters=False)

    return Row((), act)


def belonging(reason: str, *others: str) -> Row:
    """An option that changes the training where one of others is on, and has no counterpart.

    Args:
        reason: what to do instead, or why it does not exist.
        others: without one of which it does nothing.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        # Without defaults the options of the training are in a file that is not read.
        knows_all = bool(desk.defaults)
        if is_off(value) or (knows_all and all(is_off(desk.setting(o)) for o in others)):
            desk.leave(name, f"does nothing without {' or '.join(others)}", matters=False)
        else:
            desk.leave(name, reason)

    return Row((), act)


def idle(row: Row, only: Kind, reason: str) -> Row:
    """A row of an option that the program reads for one kind of base model alone."""
    return replace(row, only=only, idle=reason)


def is_off(value: Any) -> bool:
    """Whether a value says that nothing is to be done, also as text."""
    return not value or str(value).strip().lower() in ("", "false", "none") or _is_same(value, 0)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are one, be they numbers, texts or numbers as text."""
    try:
        return float(value) == float(other)
    except (TypeError, ValueError, OverflowError):
        return bool(value == other) or str(value).strip().lower() == str(other).lower()


def secret(reason: str) -> Row:
    """A key or password: it is not even shown."""
    return Row((), lambda desk, name, value: desk.leave(name, reason, matters=False, value=HIDDEN))


def told_with(other: str, *leaves: str) -> Row:
    """An option that is taken over with another one.

    Args:
        other: the option there whose row reads it, or one of the leaves that it may become.
        leaves: that both decide over.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        desk.told[name] = (other, leaves)

    return Row(leaves, act)


def placed(*leaves: str) -> Row:
    """An option that is taken over beside the table, where it counts."""
    return told_with("", *leaves)


def computed(act: Act, *leaves: str, only: Kind | None = None) -> Row:
    """An option with an arithmetic of its own."""
    return Row(leaves, act, only)
