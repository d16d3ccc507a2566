"""What single options of kohya's sd-scripts become, where that takes an arithmetic of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk, Row
from trainer.importers.kohya_network import (
    NETWORK_RATES,
    are_texts_kept,
    text_learns,
    text_rates,
)
from trainer.importers.optimizers import optimizer_for
from trainer.importers.pictures import take_sizes
from trainer.importers.rows import computed, is_off, is_true
from trainer.importers.words import take_way

# The only prediction there whose loss has a weight by noise level.
_WEIGHED = "sigma_scaled"
_T5_TOKENS = "t5xxl_max_token_length"
# Of a caption, that the scripts read for this model where it is not said: 512 for all others.
_SCHNELL_TOKENS = 256
_DEV, _SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"


def take_model(desk: Desk, name: str, value: Any) -> None:
    place = str(value)
    if desk.kind == "flow" and place.endswith((".safetensors", ".sft")):
        model = _SCHNELL if "schnell" in place.lower() else _DEV
        desk.take(name, "model_url", model)
        if model == _SCHNELL and _T5_TOKENS not in desk.given:
            desk.assume(_T5_TOKENS, "max_sequence_length", _SCHNELL_TOKENS)
        desk.remarks.append(
            f"FLUX.1 is read as a diffusers folder here, not as one file: {model} stands for "
            f"{place}; for weights that were changed, give their folder as model_url."
        )
    elif place.endswith((".ckpt", ".pt", ".pth", ".bin")):
        desk.leave(name, "only .safetensors files are read: convert it, and give it as model_url")
    else:
        desk.take(name, "model_url", place)


def take_model_type(desk: Desk, name: str, value: Any) -> None:
    if str(value).lower() == "chroma":
        desk.leave(name, reasons.NO_MODEL)
    else:
        desk.leave(name, reasons.CHECKPOINT, matters=False)


def take_size(desk: Desk, name: str, value: Any) -> None:
    """A size, a width and a height, or several of these where data sets have their own."""
    has_several = isinstance(value, list) and any(isinstance(size, list) for size in value)
    sizes = [_sides(size) for size in (value if has_several else [value])]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        desk.refuse(name, "a size, or a width and a height")
    else:
        take_sizes(desk, name, known)


def _sides(value: Any) -> tuple[int, int] | None:
    parts = value.split(",") if isinstance(value, str) else value
    sides = list(parts) if isinstance(parts, Sequence) else [parts]
    try:
        numbers = [int(float(side)) for side in sides]
    except (TypeError, ValueError, OverflowError):
        return None
    return (numbers[0], numbers[-1]) if len(numbers) in (1, 2) else None


def take_batch(desk: Desk, name: str, value: Any) -> None:
    batch = desk.whole(name)
    if desk.lengths.with_class and batch % 2 == 0:
        desk.take(name, "batch_size", batch // 2)
        desk.remarks.append(
            f"On average half of a batch of {batch} is class pictures there; here they come beside "
            f"it, so batch_size is {batch // 2}."
        )
    else:
        desk.take(name, "batch_size", batch)


def take_steps(desk: Desk, name: str, value: Any) -> None:
    if "max_train_epochs" in desk.given:
        desk.leave(name, "max_train_epochs decides there", matters=False)
        return
    steps = desk.count(name)
    if steps <= 0:
        return
    desk.take(name, "max_train_steps", desk.lengths.steps(steps))
    if desk.lengths.halved:
        desk.remarks.append(reasons.HALVED)


def take_epochs(desk: Desk, name: str, value: Any) -> None:
    desk.take(name, "num_train_epochs", desk.whole(name) * desk.lengths.repeats)


def total_steps(desk: Desk) -> int | None:
    if "max_train_epochs" in desk.given:
        return desk.lengths.of_epochs(desk.number("max_train_epochs"))
    return desk.lengths.steps(desk.number("max_train_steps"))


def take_warmup(desk: Desk, name: str, value: Any) -> None:
    """Steps, or a share of them: below 1, or with a percent sign."""
    warmup = _percent(value)
    if warmup is None:
        warmup = desk.number(name)
    if not 0 < warmup < 1:
        desk.take(name, "lr_warmup_steps", desk.lengths.steps(warmup) if warmup > 0 else warmup)
        return
    total = total_steps(desk)
    if total is None:
        desk.leave(name, uncounted("--lr-warmup-steps"))
    else:
        desk.take(name, "lr_warmup_steps", max(1, round(warmup * total)))


def _percent(value: Any) -> float | None:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)%\s*", value) if isinstance(value, str) else None
    return None if found is None else float(found.group(1)) / 100


def uncounted(flag: str) -> str:
    reason = "its steps are epochs times pictures times repeats over the batch, and the pictures "
    return reason + f"are not on this machine to be counted: give {flag}"


def every(leaf: str, flag: str, *, is_epochs: bool) -> Row:
    """A row of something that is done every so many steps or epochs."""

    def act(desk: Desk, name: str, value: Any) -> None:
        count = desk.number(name)
        if count <= 0:
            desk.leave(name, "is off", matters=False)
            return
        steps = desk.lengths.of_epochs(count) if is_epochs else desk.lengths.steps(count)
        if steps is None:
            desk.leave(name, uncounted(flag), matters=False)
        else:
            desk.take(name, leaf, steps)

    return computed(act, leaf)


def take_text_encoders(desk: Desk, name: str, value: Any) -> None:
    """With a network both learn there, unless it is said otherwise."""
    del value
    if "network_module" in desk.given:
        desk.take(name, "train_text_encoder", text_learns(desk))
    else:
        desk.leave(name, "counts for networks alone", matters=False)


def take_cached_texts(desk: Desk, name: str, value: Any) -> None:
    del value
    if are_texts_kept(desk) and "network_module" in desk.given:
        desk.leave(name, "no text encoder learns with it, and none does here", matters=False)
    else:
        desk.leave(name, reasons.KEPT, matters=False)


def take_text_end(desk: Desk, name: str, value: Any) -> None:
    """The step after which the text encoders stay as they are; from 0 down they never learn."""
    del value
    end, total = desk.whole(name), total_steps(desk)
    if end <= 0:
        desk.take(name, "train_text_encoder", False)
    elif total is None:
        desk.leave(name, f"{uncounted('--train-text-encoder-frac')}, a share of the steps")
    else:
        desk.take(name, "train_text_encoder_frac", min(1.0, desk.lengths.steps(end) / total))


def take_rate(desk: Desk, name: str, value: Any) -> None:
    """The denoiser's rate goes before the general one, which is the text encoders', too."""
    if "unet_lr" not in desk.given:
        desk.take(name, "learning_rate", value)
    elif desk.values.get("train_text_encoder") and not text_rates(desk):
        desk.take(name, "text_encoder_lr", value)
    else:
        desk.leave(name, reasons.RATES_OF_PARTS, matters=False)


def take_text_rate(desk: Desk, name: str, value: Any) -> None:
    """The first of the text encoders' rates is that of all of them."""
    rates = text_rates(desk)
    learning = [(option, rate) for option, rate in rates if not is_off(rate)]
    if name not in {option for option, _ in rates}:
        is_of_network = name in NETWORK_RATES
        where = "with a network" if is_of_network else "where all weights are trained"
        desk.leave(name, f"counts only {where}", matters=False)
    elif not learning:
        desk.leave(name, "0: the text encoders do not learn", matters=False)
    elif not desk.values.get("train_text_encoder", "network_module" not in desk.given):
        desk.leave(name, reasons.TEXTS, matters=False)
    elif optimizer_for(str(desk.setting("optimizer_type"))) == "prodigy":
        desk.leave(name, reasons.PRODIGY, matters=False)
    else:
        first, rate = learning[0]
        if name == first:
            desk.take(name, "text_encoder_lr", rate)
        others = [other for option, other in rates if option == name and other != rate]
        if others:
            reason = f"one rate for all text encoders: that of {first} is taken, {rate}"
            desk.leave(name, reason, value=value)
        elif name != first:
            desk.leave(name, f"is that of {first}", matters=False)


def take_fused(desk: Desk, name: str, value: Any) -> None:
    if not is_true(value):
        desk.leave(name, "is off", matters=False)
    elif "network_module" in desk.given:
        desk.leave(name, "is for trainings of all weights here", matters=False)
    elif str(desk.setting("mixed_precision")).lower() == "fp16":
        desk.leave(name, "is not there for fp16; with bf16, see --fused-backward", matters=False)
    else:
        desk.take(name, "fused_backward", True)


def take_norm(desk: Desk, name: str, value: Any) -> None:
    if desk.values.get("fused_backward") and not is_off(value):
        desk.leave(name, "weights are updated one by one, so that no norm of all is known")
    else:
        desk.take(name, "max_grad_norm", value)


def for_adapters(row: Row, reason: str) -> Row:
    """A row of what frozen weights alone can have; without a network there are none.

    Args:
        reason: what is said where all weights learn.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        if "network_module" in desk.given or is_off(value):
            row.act(desk, name, value)
        else:
            desk.leave(name, reason, matters=False)

    return computed(act, *row.leaves)


def take_times(desk: Desk, name: str, value: Any) -> None:
    """How the times of flow matching are drawn: here a density, then a shift."""
    shift, scale = desk.setting("discrete_flow_shift"), desk.setting("sigmoid_scale")
    scheme = str(desk.setting("weighting_scheme")).lower()
    densities = {"logit_normal": "logit_normal", "mode": "mode"}
    ways: Mapping[str, tuple[str, Any]] = {
        "sigma": (densities.get(scheme, "uniform"), shift),
        "uniform": ("uniform", 1.0),
        "sigmoid": ("logit_normal", 1.0),
        "shift": ("logit_normal", shift),
        "flux_shift": ("logit_normal", None),
    }
    density = take_way(desk, name, ways)
    if density == "logit_normal" and str(value).lower() != "sigma":
        desk.take(name, "logit_std", scale)


def take_scheme(desk: Desk, name: str, value: Any) -> None:
    """A density of times, which `timestep_sampling` reads, or a weight on the loss."""
    if str(desk.setting("timestep_sampling")).lower() != "sigma":
        desk.leave(name, "counts only where timestep_sampling is sigma", matters=False)
    elif str(value).lower() not in ("sigma_sqrt", "cosmap"):
        desk.told[name] = ("timestep_sampling", ("timestep_density",))
    elif desk.setting("model_prediction_type") == _WEIGHED:
        desk.leave(name, "the loss has no weight by noise level; see --timestep-density")
    else:
        reason = f"weighs the loss only where model_prediction_type is {_WEIGHED}"
        desk.leave(name, reason, matters=False)


def of_ways(leaf: str, *ways: str) -> Row:
    """A row of what `timestep_sampling` reads where it is one of these."""

    def act(desk: Desk, name: str, value: Any) -> None:
        del value
        if str(desk.setting("timestep_sampling")).lower() in ways:
            desk.told[name] = ("timestep_sampling", (leaf,))
        else:
            reason = f"counts only where timestep_sampling is {' or '.join(ways)}"
            desk.leave(name, reason, matters=False)

    return computed(act, leaf, only="flow")


def of_scheme(leaf: str, scheme: str, sign: float = 1.0) -> Row:
    """A row of what belongs to one density of times, which only `sigma` draws by.

    Args:
        scheme: name of the density.
        sign: -1 where a larger value is less noise there, and more here.
    """

    def act(desk: Desk, name: str, value: Any) -> None:
        del value
        way = str(desk.setting("timestep_sampling")).lower()
        if way == "sigma" and str(desk.setting("weighting_scheme")).lower() == scheme:
            desk.take(name, leaf, 0.0 + sign * desk.number(name))
        else:
            reason = f"counts only where timestep_sampling is sigma and weighting_scheme {scheme}"
            desk.leave(name, reason, matters=False)

    return computed(act, leaf, only="flow")


def take_eight_bits(desk: Desk, name: str, value: Any) -> None:
    """An older option for the optimizer; the newer one goes before it."""
    if not is_true(value):
        desk.leave(name, "is off", matters=False)
    elif "optimizer_type" in desk.given:
        desk.leave(name, "optimizer_type goes before it", matters=False)
    else:
        desk.take(name, "optimizer", "adamw8bit")
