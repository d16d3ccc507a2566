"""The rows of the option-effect matrix: what a row says, and the three kinds of expectation.

A row names its leaf, the leaves before and after the flip, the observable, and what must be seen
there. How a training is watched stands in `options.probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Where an effect can be seen. The written configuration, headers and logs are no such place.
#   batch         what the denoiser and the loss are given: latents, pixels, masks, sizes, shares
#   conditioning  text states, pooled text, sizes as time ids
#   gradient      of what is trained
#   step          what an optimizer step moves and how far, rates, number of steps
#   tensors       names, shapes, formats and values in the result files
#   files         which files a run leaves
Observable = Literal["batch", "conditioning", "gradient", "step", "tensors", "files"]

FAMILIES = ("sd15", "sdxl")
Leaves = Mapping[str, Any]

# The forms of an adapter, as leaves.
ADAPTER_FORMS: Mapping[str, Leaves] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr"},
    "loha": {"lora_type": "loha"},
}


@dataclass(frozen=True)
class Place:
    """A file or folder that the tests make when a row asks for it; see `options.world`."""

    name: str


@dataclass(frozen=True)
class Row:
    """One statement about one leaf.

    Args:
        leaf: the option.
        says: what must be seen, as a sentence about the flipped training.
        shows: asserts it; takes an `options.case.Case`.
        acts_on: where it is seen. Empty: the row is about a refusal or about no effect.
        base: the leaves of both trainings.
        flipped: the leaves that make the second training another one.
        form: the adapter of both trainings, in `ADAPTER_FORMS`.
        families: those that it holds for.
    """

    leaf: str
    says: str
    shows: Callable[[Any], None]
    acts_on: tuple[Observable, ...] = ()
    base: Leaves = field(default_factory=dict)
    flipped: Leaves = field(default_factory=dict)
    form: str = "lora"
    families: tuple[str, ...] = FAMILIES

    @property
    def name(self) -> str:
        """What the row is called in a report."""
        form = "" if self.form == "lora" else f" ({self.form})"
        return f"{self.leaf}{form}: {self.says}"


def acts(
    leaf: str,
    acts_on: Observable | tuple[Observable, ...],
    says: str,
    shows: Callable[[Any], None],
    *,
    base: Leaves | None = None,
    flipped: Leaves,
    form: str = "lora",
    families: tuple[str, ...] = FAMILIES,
) -> Row:
    """A row about an effect."""
    places: tuple[Observable, ...] = (acts_on,) if isinstance(acts_on, str) else acts_on
    return Row(leaf, says, shows, places, base or {}, flipped, form, families)


def for_each_form(make: Callable[..., Row], *forms: str) -> list[Row]:
    """A row for each of these adapter forms, all of them where none is named."""
    return [make(form=form) for form in forms or ADAPTER_FORMS]


def refused(
    leaf: str,
    flipped: Leaves,
    message: str,
    *,
    base: Leaves | None = None,
    field_named: str = "",
    form: str = "lora",
) -> Row:
    """A row about an error that names the option before any model is loaded.

    Args:
        field_named: the option that the error names, where it is another.
    """

    def shows(case: Any) -> None:
        case.is_refused(field_named or leaf, message)

    return Row(leaf, f"is refused: {message}", shows, (), base or {}, flipped, form)


def idle(
    reason: str, *, base: Leaves | None = None, form: str = "lora", **flipped: Any
) -> list[Row]:
    """Rows about options that have no effect together with the base, one row each.

    They are flipped together: a single one that acted would show.

    Args:
        reason: what the run says of each of them.
    """

    def row(leaf: str) -> Row:
        def shows(case: Any) -> None:
            case.is_ignored(leaf, reason)
            case.changes_nothing()

        return Row(leaf, f"does nothing: {reason}", shows, (), base or {}, flipped, form)

    return [row(leaf) for leaf in flipped]
