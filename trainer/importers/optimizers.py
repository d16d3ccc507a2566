"""Optimizers of other programs, with their arguments, and the courses of their rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk

OPTIMIZERS: Mapping[str, str] = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw8bit": "paged_adamw8bit",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
}
# The classes' own weight decay, where none is given: torch's and bitsandbytes' AdamW have 0.01.
_DECAY: Mapping[str, float] = {
    "adamw": 0.01,
    "adamw8bit": 0.01,
    "paged_adamw8bit": 0.01,
    "adafactor": 0.0,
    "prodigy": 0.0,
}
# What Prodigy's class does where nothing is said.
_PRODIGY: Mapping[str, Any] = {
    "prodigy_use_bias_correction": False,
    "prodigy_safeguard_warmup": False,
}
# What the text encoders have for themselves.
_OF_TEXT = "adam_weight_decay_text_encoder"
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "weight_decay": ("adam_weight_decay", _OF_TEXT),
    "eps": ("adam_epsilon",),
    "decouple": ("prodigy_decouple",),
    "use_bias_correction": ("prodigy_use_bias_correction",),
    "safeguard_warmup": ("prodigy_safeguard_warmup",),
    "beta3": ("prodigy_beta3",),
}
# Parts of the names of optimizers that find the learning rate themselves, of which 1 is usual.
_RATE_FINDERS = ("prodigy", "dadapt")
# What is said where one of ours is taken for another one.
_STAND_INS: Mapping[str, str] = {
    "adamw": "adamw is taken, and a rate that was right for the other one may not be",
    "prodigy": "prodigy is taken, which finds the rate itself, too",
}
# What Adafactor is given here by itself.
_AS_HERE: Mapping[str, Any] = {
    "relative_step": False,
    "scale_parameter": False,
    "warmup_init": False,
    "amsgrad": False,
    "betas": (0.9, 0.999),
}
_BETAS = ("adam_beta1", "adam_beta2")
OPTIMIZER_LEAVES = (
    "optimizer",
    *(leaf for leaves in _ARGUMENTS.values() for leaf in leaves),
    *_BETAS,
)
SCHEDULERS: Mapping[str, str] = {
    name: name
    for name in (
        *("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        "constant_with_warmup",
    )
}


def take_optimizer(desk: Desk, name: str, arguments_name: str, *, epsilon: float = 1e-8) -> None:
    """Takes over the optimizer and its arguments, with what its class has by itself.

    Args:
        name: of the option with the optimizer.
        arguments_name: of the option with its arguments.
        epsilon: that the program gives it.
    """
    word, given = str(desk.setting(name)), named_arguments(desk, arguments_name)
    optimizer = optimizer_for(word)
    if _here(word) is not None:
        desk.take(name, "optimizer", optimizer)
        for key, value in given.items():
            _take_argument(desk, arguments_name, key, value)
        _fill(desk, name, optimizer, given, epsilon)
        return
    known = ", ".join(OPTIMIZERS.values())
    desk.leave(name, f"is not among the optimizers here ({known}): {_STAND_INS[optimizer]}")
    desk.assume(f"{name}: nearest", "optimizer", optimizer)
    for key, value in given.items():
        reason = f"is an argument of {word}, which is not here"
        desk.leave(f"{arguments_name}: {key}", reason, value=value)
    _fill(desk, name, optimizer, {}, epsilon)


_NO_ARGUMENT = "the optimizer takes no such argument here"
_UNTAKEN: Mapping[str, str] = {"d_coef": "Prodigy's rate is the one it finds, as with d_coef 1"}


def optimizer_for(word: str) -> str:
    """The optimizer here for one there: that of its name, else the nearest."""
    finds_rate = any(part in word.lower() for part in _RATE_FINDERS)
    return _here(word) or ("prodigy" if finds_rate else "adamw")


def _here(word: str) -> str | None:
    return OPTIMIZERS.get(word.lower().replace("_", "").rpartition(".")[2])


def _take_argument(desk: Desk, name: str, key: str, value: Any) -> None:
    """Takes over one argument of an optimizer."""
    if key == "betas":
        _take_betas(desk, name, value)
        return
    for leaf in _leaves(desk, key):
        desk.take(name, leaf, value)
    if key not in _ARGUMENTS:
        as_here = _AS_HERE.get(key, _Never) == value
        reason = reasons.AS_HERE if as_here else _UNTAKEN.get(key, _NO_ARGUMENT)
        desk.leave(f"{name}: {key}", reason, matters=not as_here, value=value)


def _leaves(desk: Desk, key: str) -> list[str]:
    """What an argument decides over, where it learns."""
    learns = bool(desk.values.get("train_text_encoder"))
    return [leaf for leaf in _ARGUMENTS.get(key, ()) if leaf != _OF_TEXT or learns]


class _Never:
    """Equal to nothing."""


def _fill(desk: Desk, name: str, optimizer: str, given: Mapping[str, Any], epsilon: float) -> None:
    """What the optimizer's class has by itself, and this program has otherwise."""
    own = {"weight_decay": _DECAY[optimizer]}
    if optimizer != "adafactor":
        own["eps"] = epsilon
    for key, value in own.items():
        for leaf in _leaves(desk, key) if key not in given else ():
            desk.assume(f"{name}: {key}", leaf, value)
    if optimizer == "prodigy":
        for leaf, value in _PRODIGY.items():
            if leaf.removeprefix("prodigy_") not in given:
                desk.assume(f"{name}: {leaf.removeprefix('prodigy_')}", leaf, value)


def named_arguments(desk: Desk, name: str) -> dict[str, Any]:
    """Arguments by name: of a mapping, or of texts such as `weight_decay=0.01`."""
    given = desk.setting(name)
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str | list | tuple):
        desk.refuse(name, "texts of the form name=value")
        return {}
    texts = given.split() if isinstance(given, str) else given
    found = {}
    for text in texts:
        key, equals, value = str(text).partition("=")
        if not equals:
            desk.refuse(name, "texts of the form name=value")
            continue
        found[key.strip()] = plain(value)
    return found


def plain(text: str) -> Any:
    """The value that a text writes: a switch, a number, several of them, or the text itself."""
    text = text.strip().strip("()[]").strip("'\"")
    if "," in text:
        return tuple(plain(part) for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def _take_betas(desk: Desk, name: str, betas: Any) -> None:
    if not isinstance(betas, Sequence) or len(betas) < 2:
        desk.refuse(name, "two numbers as betas")
        return
    for leaf, beta in zip(_BETAS, betas, strict=False):
        desk.take(name, leaf, beta)
    if len(betas) > 2:
        desk.leave(f"{name}: betas", "the third one has no counterpart", value=list(betas))
