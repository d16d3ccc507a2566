"""What options mean together: which exclude each other, which have no effect, which must wait.

Works on leaves whose types and ranges are already right. Two values that somebody set on
purpose and that contradict each other are an error; a default that contradicts one yields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.config import Note
from trainer.errors import Problem
from trainer.leaves import shown

Values = Mapping[str, Any]

PRODIGY_LR = 1.0
ADAPTER_LR = 1e-4
FULL_LR = 1e-6
# Hot learning rates for all weights of a denoiser, and timid ones for Prodigy, whose learning
# rate multiplies the step size that it estimates itself.
HOT_FULL_LR = 1e-5
TIMID_PRODIGY_LR = 0.1
# The min-SNR paper's smallest gamma; the loss all but vanishes well below it.
SMALLEST_USUAL_GAMMA = 1.0


@dataclass
class Draft:
    """A configuration in the making: leaves, who set them, and what was found on the way.

    Args:
        values: every leaf.
        origins: the number of the layer each leaf comes from; later layers are stronger.
        explicit: the leaves that somebody set on purpose.
    """

    values: dict[str, Any]
    origins: Mapping[str, int]
    explicit: frozenset[str]
    notes: list[Note] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def strength(self, leaf: str) -> tuple[bool, int]:
        """The rank of a leaf in a conflict: the weaker one yields."""
        return leaf in self.explicit, self.origins[leaf]

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


def settle(draft: Draft) -> None:
    """Resolves every conflict, fills the learning rates, and notes what is odd or idle."""
    for exclusion in EXCLUSIONS:
        exclusion.apply(draft)
    for rule in (_cached_geometry, _one_sided_size, _prodigy_rates, _fill_rates):
        rule(draft)
    for leaf, odd, message in WARNINGS:
        if odd(draft.values):
            draft.note("warning", leaf, f"{shown(draft.values[leaf])} {message}")
    for leaves, idle, reason in IDLE:
        if idle(draft.values):
            for leaf in leaves:
                draft.note("ignored", leaf, reason)


def refusals(values: Values) -> list[Problem]:
    """What the configuration asks for that this version cannot do."""
    return [
        Problem(
            leaf,
            f"got {shown(values[leaf])}, but {machinery} is not available yet; "
            f"allowed: {shown(off)}",
            f"set `{leaf}: {shown(off)}`",
        )
        for leaf, (off, machinery) in NOT_AVAILABLE_YET.items()
        if values[leaf] != off
    ]


@dataclass(frozen=True)
class Exclusion:
    """Two leaves that cannot both have their way.

    Args:
        clashes: whether they contradict each other in these values.
        first_off: the value with which the first gives way; may depend on the others.
        second_off: the same for the second.
        reason: why they exclude each other.
    """

    first: str
    second: str
    clashes: Callable[[Values], bool]
    first_off: Callable[[Values], Any]
    second_off: Callable[[Values], Any]
    reason: str

    def apply(self, draft: Draft) -> None:
        """Lets the weaker leaf give way, or records the clash of two explicit ones."""
        if not self.clashes(draft.values):
            return
        off = {
            self.first: self.first_off(draft.values),
            self.second: self.second_off(draft.values),
        }
        if {self.first, self.second} <= draft.explicit:
            options = " or ".join(f"`{leaf}: {shown(value)}`" for leaf, value in off.items())
            draft.clash(self.first, self.second, self.reason, f"set {options}")
            draft.values[self.second] = off[self.second]
            return
        weaker = min((self.second, self.first), key=draft.strength)
        stronger = self.first if weaker == self.second else self.second
        why = f"`{stronger}` is {shown(draft.values[stronger])}, and {self.reason}"
        draft.settle(weaker, off[weaker], why)


def _always(value: Any) -> Callable[[Values], Any]:
    return lambda values: value


def _is_off(leaf: str) -> Callable[[Values], bool]:
    return lambda values: not values[leaf]


def _differs(leaf: str, value: Any) -> Callable[[Values], bool]:
    return lambda values: bool(values[leaf] != value)


EXCLUSIONS = (
    Exclusion(
        "train_text_encoder",
        "train_text_encoder_ti",
        lambda v: v["train_text_encoder"] and v["train_text_encoder_ti"],
        _always(False),
        _always(False),
        "the text encoders learn either by an adapter or by new tokens",
    ),
    Exclusion(
        "use_dora",
        "lora_type",
        lambda v: v["use_lora"] and v["use_dora"] and v["lora_type"] != "lora",
        _always(False),
        _always("lora"),
        "DoRA exists for lora_type lora only",
    ),
    Exclusion(
        "center_crop",
        "face_aware_cropping",
        lambda v: v["center_crop"] and v["face_aware_cropping"],
        _always(False),
        _always(False),
        "the window lies either in the middle or over the face",
    ),
    Exclusion(
        "disable_unet_during_ti_training",
        "train_text_encoder_ti_frac",
        lambda v: (
            v["train_text_encoder_ti"]
            and v["disable_unet_during_ti_training"]
            and v["train_text_encoder_ti_frac"] == 1
        ),
        _always(False),
        _always(0.5),
        "with both, the denoiser would never learn",
    ),
    Exclusion(
        "random_rotation_start",
        "random_rotation_end",
        lambda v: v["random_rotation_start"] > v["random_rotation_end"],
        lambda v: v["random_rotation_end"],
        lambda v: v["random_rotation_start"],
        "the smallest rotation is at most the largest",
    ),
    Exclusion(
        "min_timestep_trained",
        "max_timestep_trained",
        lambda v: v["min_timestep_trained"] >= v["max_timestep_trained"],
        _always(0),
        _always(1000),
        "the smallest timestep is below the bound of the largest",
    ),
)


def _random_geometry(values: Values) -> dict[str, Any]:
    """The leaves that move a picture differently each time, with the values that stop it."""
    turning = values["random_rotation_start"] < values["random_rotation_end"]
    moving = {
        "center_crop": (not values["center_crop"] and not values["face_aware_cropping"], True),
        "random_crop_offset_x": (values["random_crop_offset_x"] > 0, 0),
        "random_crop_offset_y": (values["random_crop_offset_y"] > 0, 0),
        "random_rotation_start": (turning, 0),
        "random_rotation_end": (turning, 0),
    }
    return {leaf: still for leaf, (moves, still) in moving.items() if moves}


def _cached_geometry(draft: Draft) -> None:
    """A cached latent shows one window of its picture; a mirrored twin is cached beside it."""
    moving = _random_geometry(draft.values)
    if not draft.values["cache_latents"] or not moving:
        return
    strongest = max(moving, key=draft.strength)
    if "cache_latents" in draft.explicit and strongest in draft.explicit:
        for leaf in sorted(set(moving) & draft.explicit):
            draft.clash(
                leaf,
                "cache_latents",
                "a cached latent shows one fixed window",
                f"set `cache_latents: false` or `{leaf}: {shown(moving[leaf])}`",
            )
        return
    if draft.strength("cache_latents") < draft.strength(strongest):
        why = f"`{strongest}` changes the picture each time"
        draft.settle("cache_latents", False, why)
        return
    for leaf, still in moving.items():
        draft.settle(leaf, still, "`cache_latents` stores one fixed window of each picture")


def _one_sided_size(draft: Draft) -> None:
    """A width without a height means a square, and the other way round."""
    for leaf, other in (
        ("resolution_width", "resolution_height"),
        ("resolution_height", "resolution_width"),
    ):
        if draft.values[leaf] is None and draft.values[other] is not None:
            draft.settle(leaf, draft.values[other], f"only `{other}` is given")


def _trains_text(values: Values) -> bool:
    return bool(values["train_text_encoder"] or values["train_text_encoder_ti"])


def _prodigy_rates(draft: Draft) -> None:
    """Prodigy takes one learning rate for all groups, and estimates the step size itself.

    Source: Mishchenko and Defazio 2023; the authors' own default is 1.
    """
    values = draft.values
    if values["optimizer"] != "prodigy":
        return
    text_rate_is_explicit = "text_encoder_lr" in draft.explicit and _trains_text(values)
    older = draft.strength("learning_rate") < draft.strength("optimizer")
    if values["learning_rate"] is None or (older and "learning_rate" not in draft.explicit):
        wanted = values["text_encoder_lr"] if text_rate_is_explicit else PRODIGY_LR
        draft.settle("learning_rate", wanted, "prodigy estimates the step size itself")
    if values["text_encoder_lr"] in (None, values["learning_rate"]):
        return
    if "text_encoder_lr" not in draft.explicit:
        why = "prodigy takes one learning rate for everything"
        draft.settle("text_encoder_lr", values["learning_rate"], why)
    elif text_rate_is_explicit:
        draft.clash(
            "text_encoder_lr",
            "learning_rate",
            "prodigy takes one learning rate for everything",
            "leave `text_encoder_lr` out",
        )


def _fill_rates(draft: Draft) -> None:
    """Learning rates left open get the usual value of what is trained."""
    values = draft.values
    if values["learning_rate"] is None:
        values["learning_rate"] = ADAPTER_LR if values["use_lora"] else FULL_LR
    if values["text_encoder_lr"] is None:
        values["text_encoder_lr"] = values["learning_rate"]


def _is_file(values: Values) -> bool:
    return str(values["model_url"]).endswith(".safetensors")


def _is_local(values: Values) -> bool:
    return _is_file(values) or Path(values["model_url"]).is_dir()


# leaf, when it is odd, what to say after its value
WARNINGS: tuple[tuple[str, Callable[[Values], bool], str], ...] = (
    (
        "learning_rate",
        lambda v: v["optimizer"] == "prodigy" and v["learning_rate"] < TIMID_PRODIGY_LR,
        "is so small that prodigy hardly learns; its usual learning rate is 1",
    ),
    (
        "learning_rate",
        lambda v: (
            not v["use_lora"] and v["optimizer"] != "prodigy" and v["learning_rate"] >= HOT_FULL_LR
        ),
        "is high for training all weights; 1e-6 is usual",
    ),
    (
        "lr_warmup_steps",
        lambda v: (
            v["lr_scheduler"] != "constant"
            and v["num_train_epochs"] is None
            and v["lr_warmup_steps"] >= v["max_train_steps"]
        ),
        "warm-up steps fill the whole run: the full learning rate is never reached",
    ),
    (
        "snr_gamma",
        lambda v: v["snr_gamma"] is not None and 0 < v["snr_gamma"] < SMALLEST_USUAL_GAMMA,
        "weakens the loss of most timesteps; 5 is the usual value, perhaps 5.0 was meant",
    ),
)

# leaves, when they have no effect, why
IDLE: tuple[tuple[tuple[str, ...], Callable[[Values], bool], str], ...] = (
    (
        ("rank", "alpha", "lora_type", "use_dora", "target_unet_modules"),
        _is_off("use_lora"),
        "all weights are trained, there is no adapter",
    ),
    (
        ("lokr_factor",),
        lambda v: not v["use_lora"] or v["lora_type"] != "lokr",
        "lora_type is not lokr",
    ),
    (
        ("kohya_dora",),
        lambda v: not (v["use_lora"] and v["use_dora"]),
        "no DoRA is trained",
    ),
    (
        ("train_text_encoder_frac", "target_text_encoder_modules"),
        _is_off("train_text_encoder"),
        "train_text_encoder is false",
    ),
    (
        (
            "num_new_tokens_per_abstraction",
            "train_text_encoder_ti_frac",
            "disable_unet_during_ti_training",
        ),
        _is_off("train_text_encoder_ti"),
        "train_text_encoder_ti is false",
    ),
    (
        ("token_abstraction",),
        lambda v: not v["train_text_encoder_ti"] and v["skip_caption_generation"],
        "no new tokens are trained and no captions are written",
    ),
    (
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        lambda v: not _trains_text(v),
        "no text encoder and no new token is trained",
    ),
    (
        ("prior_loss_weight", "photo_class"),
        _is_off("with_prior_preservation"),
        "with_prior_preservation is false",
    ),
    (
        ("class_image_mask_style",),
        lambda v: not v["with_prior_preservation"] or not v["clip_seg_mask_prompt"],
        "there are no class pictures with masks",
    ),
    (
        ("clip_seg_mask_temperature", "clip_seg_mask_bias"),
        _is_off("clip_seg_mask_prompt"),
        "clip_seg_mask_prompt is empty",
    ),
    (("lr_warmup_steps",), lambda v: v["lr_scheduler"] == "constant", "lr_scheduler is constant"),
    (
        ("lr_num_cycles",),
        _differs("lr_scheduler", "cosine_with_restarts"),
        "lr_scheduler is not cosine_with_restarts",
    ),
    (("lr_power",), _differs("lr_scheduler", "polynomial"), "lr_scheduler is not polynomial"),
    (
        (
            "prodigy_beta3",
            "prodigy_decouple",
            "prodigy_use_bias_correction",
            "prodigy_safeguard_warmup",
        ),
        _differs("optimizer", "prodigy"),
        "optimizer is not prodigy",
    ),
    (
        ("max_train_steps",),
        lambda v: v["num_train_epochs"] is not None,
        "num_train_epochs decides the length of the run",
    ),
    (("caption_column",), _is_off("captions_file_url"), "there is no captions_file_url"),
    (
        ("data_archive_format",),
        lambda v: not v["debug_dataset"] and not v["debug_loss_masks"],
        "no folders are delivered",
    ),
    (("num_workers",), lambda v: bool(v["cache_latents"]), "latents are cached"),
    (
        ("upscale_vae_32bit",),
        lambda v: v["mixed_precision"] == "no",
        "everything is computed in 32 bits",
    ),
    (("revision",), _is_local, "model_url is local"),
    (("variant",), _is_file, "model_url is a single file"),
    (("single_file_config",), lambda v: not _is_file(v), "model_url is not a single file"),
)

# leaf: (the value that asks for nothing, what it would need)
NOT_AVAILABLE_YET: Mapping[str, tuple[Any, str]] = {
    "train_text_encoder_ti": (False, "learning new tokens"),
    "train_text_encoder": (False, "training the text encoders"),
    "with_prior_preservation": (False, "prior preservation"),
    "clip_seg_mask_prompt": ("", "masking"),
    "random_rotation_start": (0, "rotation"),
    "random_rotation_end": (0, "rotation"),
    "face_aware_cropping": (False, "finding faces"),
    "debug_dataset": (False, "delivering the trained pictures"),
    "debug_loss_masks": (False, "delivering the masks"),
}
