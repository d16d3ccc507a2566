"""What several programs' tables have in common: optimizers, number formats, pictures, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import InputError
from trainer.importers import folders
from trainer.importers.desk import Desk
from trainer.leaves import shown

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
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "weight_decay": ("adam_weight_decay", "adam_weight_decay_text_encoder"),
    "eps": ("adam_epsilon",),
    "decouple": ("prodigy_decouple",),
    "use_bias_correction": ("prodigy_use_bias_correction",),
    "safeguard_warmup": ("prodigy_safeguard_warmup",),
    "beta3": ("prodigy_beta3",),
}
# What Adafactor is given here by itself.
_AS_HERE: Mapping[str, Any] = {
    "relative_step": False,
    "scale_parameter": False,
    "warmup_init": False,
    "amsgrad": False,
    "betas": (0.9, 0.999),
}
OPTIMIZER_LEAVES = (
    *("optimizer", "adam_weight_decay", "adam_weight_decay_text_encoder", "adam_epsilon"),
    *("adam_beta1", "adam_beta2", "prodigy_decouple", "prodigy_use_bias_correction"),
    *("prodigy_safeguard_warmup", "prodigy_beta3"),
)
SCHEDULERS: Mapping[str, str] = {
    name: name
    for name in (
        *("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        "constant_with_warmup",
    )
}
NO_SCHEDULER = "there is no such course here: the rate stays as it is; see --lr-scheduler"
PRECISIONS: Mapping[str, str] = {
    **{"no": "no", "fp32": "no", "float32": "no", "float": "no"},
    **{"fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"},
}
SAVED: Mapping[str, str] = {
    **{"float": "fp32", "fp32": "fp32", "float32": "fp32"},
    **{"fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"},
}
NO_PRECISION = "is no number format here; see --mixed-precision and --save-dtype"


def take_optimizer(desk: Desk, name: str, arguments_name: str, *, epsilon: float = 1e-8) -> None:
    """Takes over the optimizer and its arguments, with what its class has by itself.

    Args:
        name: of the option with the optimizer.
        arguments_name: of the option with its arguments.
        epsilon: that the program gives it.
    """
    word = str(desk.setting(name)).lower().replace("_", "")
    optimizer = OPTIMIZERS.get(word.rpartition(".")[2])
    if optimizer is None:
        reason = f"is not among the optimizers here ({', '.join(OPTIMIZERS.values())}): adamw is "
        reason += "taken, and a rate that was right for the other one may not be"
        desk.leave(name, reason)
        optimizer = "adamw"
    else:
        desk.take(name, "optimizer", optimizer)
    given = named_arguments(desk, arguments_name)
    betas = given.get("betas")
    for key, value in given.items():
        leaves = _ARGUMENTS.get(key, ())
        for leaf in leaves:
            desk.take(arguments_name, leaf, value)
        if not leaves and key != "betas":
            as_here = _AS_HERE.get(key, _Never) == value
            reason = "is as it is done here" if as_here else "the optimizer takes no such argument"
            desk.leave(f"{arguments_name}: {key}", reason, matters=not as_here, value=value)
    if betas is not None:
        _take_betas(desk, arguments_name, betas)
    _fill(desk, name, optimizer, given, epsilon)


class _Never:
    """Equal to nothing."""


def _fill(desk: Desk, name: str, optimizer: str, given: Mapping[str, Any], epsilon: float) -> None:
    """What the optimizer's class has by itself, and this program has otherwise."""
    own = {"weight_decay": _DECAY[optimizer]}
    if optimizer != "adafactor":
        own["eps"] = epsilon
    for key, value in own.items():
        for leaf in _ARGUMENTS[key] if key not in given else ():
            assume(desk, f"{name}: {key}", leaf, value)
    if optimizer == "prodigy":
        for leaf, value in _PRODIGY.items():
            if leaf.removeprefix("prodigy_") not in given:
                assume(desk, f"{name}: {leaf.removeprefix('prodigy_')}", leaf, value)


def assume(desk: Desk, name: str, leaf: str, value: Any) -> None:
    """Writes out what the other program does by itself, where this one does otherwise."""
    before = dict(desk.defaults)
    desk.defaults = {**before, name: value}
    desk.take(name, leaf, value)


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
    desk.take(name, "adam_beta1", betas[0])
    desk.take(name, "adam_beta2", betas[1])
    if len(betas) > 2:
        desk.leave(f"{name}: betas", "the third one has no counterpart", value=list(betas))


@dataclass(frozen=True)
class Pictures:
    """One set of pictures.

    Args:
        folder: where they are.
        repeats: times that an epoch shows each.
        prompt: of those without a caption, where it is known.
        token: the word for what they show, where it is known.
        names: of the options there that say so, for the listing.
    """

    folder: str
    repeats: int = 1
    prompt: str | None = None
    token: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)

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
            assume_or_take(desk, class_name, leaf, value)
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
        assume_or_take(desk, name, "concepts", concepts)
        tokens = [pictures.token for pictures in subjects]
        if desk.values.pop("token_abstraction", None) is not None and all(tokens):
            desk.values["token_abstraction"] = list(dict.fromkeys(tokens))
    unused = [] if len(classes) == len(subjects) else classes[1:]
    for pictures in unused:
        reason = "one set of class pictures for all subjects, or one for each: this one is left out"
        desk.leave(class_name, reason, value=pictures.folder)


def _take_only(desk: Desk, pictures: Pictures, name: str) -> None:
    assume_or_take(desk, name, "images_data_url", pictures.folder)
    if pictures.prompt:
        assume_or_take(desk, name, "instance_prompt", pictures.prompt)
    if pictures.token:
        assume_or_take(desk, name, "token_abstraction", [pictures.token])


def assume_or_take(desk: Desk, name: str, leaf: str, value: Any) -> None:
    """Takes a value over as of an option that is given, whatever is said of it before."""
    desk.given = {**desk.given, name: desk.given.get(name, shown(value))}
    desk.take(name, leaf, value)


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
