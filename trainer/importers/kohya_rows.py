"""What single options of kohya's sd-scripts become, where that takes an arithmetic of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.importers.desk import Desk, Row, computed, is_true
from trainer.importers.kohya_network import text_learns

_DEV, _SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"


def take_model(desk: Desk, name: str, value: Any) -> None:
    place = str(value)
    if desk.kind == "flow" and place.endswith((".safetensors", ".sft")):
        model = _SCHNELL if "schnell" in place.lower() else _DEV
        desk.take(name, "model_url", model)
        desk.remarks.append(
            f"FLUX.1 is read as a diffusers folder here, not as one file: {model} stands for "
            f"{place}; for weights that were changed, give their folder as model_url."
        )
    elif place.endswith((".ckpt", ".pt", ".pth", ".bin")):
        desk.leave(name, "only .safetensors files are read: convert it, and give it as model_url")
    else:
        desk.take(name, "model_url", place)


def take_size(desk: Desk, name: str, value: Any) -> None:
    parts = value.split(",") if isinstance(value, str) else value
    sides = list(parts) if isinstance(parts, Sequence) else [parts]
    try:
        numbers = [int(float(side)) for side in sides]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2):
        desk.refuse(name, "a size, or a width and a height")
        return
    desk.take(name, "resolution_width", numbers[0])
    desk.take(name, "resolution_height", numbers[-1])


def take_batch(desk: Desk, name: str, value: Any) -> None:
    batch = desk.whole(name)
    if desk.lengths.with_class and batch % 2 == 0:
        desk.take(name, "batch_size", batch // 2)
        desk.remarks.append(
            f"Half of a batch of {batch} is class pictures there; here they come beside it, so "
            f"batch_size is {batch // 2}."
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
        desk.remarks.append(
            "Every second step there is of class pictures; here they come beside each step, so all "
            "counts of steps are halved and the subject's pictures are seen as often."
        )


def take_epochs(desk: Desk, name: str, value: Any) -> None:
    desk.take(name, "num_train_epochs", desk.whole(name) * desk.lengths.repeats)


def total_steps(desk: Desk) -> int | None:
    if "max_train_epochs" in desk.given:
        return desk.lengths.of_epochs(desk.number("max_train_epochs"))
    return desk.lengths.steps(desk.number("max_train_steps"))


def take_warmup(desk: Desk, name: str, value: Any) -> None:
    warmup = desk.number(name)
    if not 0 < warmup < 1:
        desk.take(name, "lr_warmup_steps", desk.lengths.steps(warmup) if warmup > 0 else warmup)
        return
    total = total_steps(desk)
    if total is None:
        desk.leave(name, uncounted("--lr-warmup-steps"))
    else:
        desk.take(name, "lr_warmup_steps", max(1, round(warmup * total)))


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


def take_rate(desk: Desk, name: str, value: Any) -> None:
    """The denoiser's rate goes before the general one, which is the text encoders', too."""
    if "unet_lr" in desk.given:
        if "text_encoder_lr" not in desk.given and desk.values.get("train_text_encoder"):
            desk.take(name, "text_encoder_lr", value)
        else:
            desk.leave(name, "unet_lr and text_encoder_lr go before it", matters=False)
        return
    desk.take(name, "learning_rate", value)


def take_text_rate(desk: Desk, name: str, value: Any) -> None:
    rates = list(value) if isinstance(value, list | tuple) else [value]
    if str(desk.setting("optimizer_type")).lower() == "prodigy":
        desk.leave(name, "Prodigy has one rate for everything, there too", matters=False)
    elif all(float(rate) == 0 for rate in rates):
        desk.leave(name, "0: the text encoders do not learn", matters=False)
    elif not desk.values.get("train_text_encoder", "network_module" not in desk.given):
        desk.leave(name, "the text encoders do not learn", matters=False)
    else:
        desk.take(name, "text_encoder_lr", rates[0])
        if any(rate != rates[0] for rate in rates):
            desk.leave(f"{name}[1]", "one rate for all text encoders", value=rates[1])


def take_times(desk: Desk, name: str, value: Any) -> None:
    """How the times of flow matching are drawn: here a density, then a shift."""
    way = str(value).lower()
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
    if way not in ways:
        desk.leave(name, "is no way to draw times here; see --timestep-density")
        return
    density, moved = ways[way]
    desk.take(name, "timestep_density", density)
    desk.take(name, "timestep_shift", moved)
    if density == "logit_normal" and way != "sigma":
        desk.take(name, "logit_std", scale)


def take_scheme(desk: Desk, name: str, value: Any) -> None:
    """A density of times, which `timestep_sampling` reads, or a weight on the loss."""
    if str(value).lower() in ("sigma_sqrt", "cosmap"):
        desk.leave(name, "the loss has no weight by noise level; see --timestep-density")
    else:
        desk.told[name] = "timestep_sampling"


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
