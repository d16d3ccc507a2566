"""The rows of the option-effect matrix: what a row says, and the three kinds of expectation.

A row names its leaf, the leaves before and after the flip, the observable, and what must be seen
there. How a training is watched stands in `options.probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Where an effect can be seen. The written configuration, headers and logs are no such place.
#   batch         what the denoiser and the loss are given: latents, pixels, masks, sizes, shares
#   conditioning  text states, pooled text, sizes as time ids
#   gradient      of what is trained
#   step          what an optimizer step moves and how far, rates, number of steps
#   tensors       names, shapes, formats and values in the result files
#   files         which files a run leaves
Observable = Literal["batch", "conditioning", "gradient", "step", "tensors", "files"]

# The kinds of family: a UNet learning DDPM, a transformer learning rectified flow.
DDPM = ("sd15", "sdxl")
FLOW = ("flux", "flux2")
FAMILIES = (*DDPM, *FLOW)
# Those whose text encoders can learn.
WITH_TEXT = ("sd15", "sdxl", "flux")
Leaves = Mapping[str, Any]

# What the code behind a row knows of: the family; only its kind; neither of them.
Knows = Literal["family", "kind", "nothing"]

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
class Own:
    """A value that is another one in each family; see `options.world`."""

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
        knows: what the code behind it depends on.
    """

    leaf: str
    says: str
    shows: Callable[[Any], None]
    acts_on: tuple[Observable, ...] = ()
    base: Leaves = field(default_factory=dict)
    flipped: Leaves = field(default_factory=dict)
    form: str = "lora"
    families: tuple[str, ...] = FAMILIES
    knows: Knows = "family"

    def runs_in(self, number: int) -> tuple[str, ...]:
        """The families that it is run in where not every one is asked for.

        Args:
            number: its place among all rows; by it rows take turns with the families.
        """
        groups: list[Sequence[str]] = {
            "family": [(name,) for name in self.families],
            "kind": [[n for n in self.families if n in kind] for kind in (DDPM, FLOW)],
            "nothing": [self.families],
        }[self.knows]
        return tuple(group[number % len(group)] for group in groups if group)

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
    families: tuple[str, ...] = FAMILIES,
) -> Row:
    """A row about an error that names the option before any model is loaded.

    Args:
        field_named: the option that the error names, where it is another.
    """

    def shows(case: Any) -> None:
        case.is_refused(field_named or leaf, message)

    return Row(leaf, f"is refused: {message}", shows, (), base or {}, flipped, form, families)


def meaningless(
    leaf: str, value: Any, reason: str, *, families: tuple[str, ...], base: Leaves | None = None
) -> list[Row]:
    """Rows about an option that means nothing for some base models.

    It is refused where somebody sets it, and noted as without effect where nobody does.

    Args:
        value: that somebody might give.
        reason: what the run says.
    """

    def shows(case: Any) -> None:
        assert not case.before().config.is_explicit(leaf)
        assert case.before().ignored[leaf] == reason
        assert case.before().config.resolved.ignored_options[leaf] == reason

    message = f"means nothing here: {reason}"
    return [
        refused(leaf, {leaf: value}, message, base=base, families=families),
        Row(leaf, f"by default: {reason}", shows, (), base or {}, families=families),
    ]


def knowing(what: Knows, rows: Iterable[Row], *, family: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Rows whose code depends on no more than this, but for those of some leaves.

    Args:
        family: leaves whose rows depend on the family.
    """
    return tuple(row if row.leaf in family else replace(row, knows=what) for row in rows)


def idle(
    reason: str,
    *,
    base: Leaves | None = None,
    form: str = "lora",
    families: tuple[str, ...] = FAMILIES,
    **flipped: Any,
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

        return Row(leaf, f"does nothing: {reason}", shows, (), base or {}, flipped, form, families)

    return [row(leaf) for leaf in flipped]
