"""What single options of an ai-toolkit job become, where that takes an arithmetic of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk, Row
from trainer.importers.pictures import take_sizes
from trainer.importers.prompt_lines import parted
from trainer.importers.rows import computed, is_off, is_true
from trainer.importers.words import take_name, take_way

_LEGACY = "train.gradient_accumulation_steps"
_TRIGGERS = ("[trigger]", "[name]")
# How it draws times: here a density, then a shift.
_WAYS: Mapping[str, tuple[str, Any]] = {
    "sigmoid": ("logit_normal", 1.0),
    "linear": ("uniform", 1.0),
    "weighted": ("uniform", 1.0),
    "flux_shift": ("uniform", None),
    "shift": ("uniform", None),
}
_NO_WEIGHT = "times are drawn as there; the loss has no weight by noise level"
_QUANTIZED: Mapping[str, str] = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "uint4": "nf4"}


def with_trigger(text: str, trigger: Any) -> str:
    """A caption with the trigger in the places that are left for it, or in front."""
    word = str(trigger or "")
    text = _filled(text, word)
    return text if not word or word in text else f"{word} {text}".strip()


def _filled(text: str, word: str) -> str:
    for place in _TRIGGERS:
        text = text.replace(place, word)
    return text


def take_resolution(desk: Desk, name: str, value: Any) -> None:
    sides = [int(side) for side in (value if isinstance(value, list) else [value])]
    take_sizes(desk, name, [(side, side) for side in sides])


def take_file_name(desk: Desk, name: str, value: Any) -> None:
    take_name(desk, name, str(value), "cannot be the name of files: give --output-name")


def take_trigger(desk: Desk, name: str, value: Any) -> None:
    """The trigger stands in every caption there, and is put in where it lacks."""
    desk.take(name, "token_abstraction", [str(value)])
    desk.take(name, "add_trigger", True)


def accumulated(desk: Desk) -> float:
    """Forward passes of a step, where the program counts them as steps: its older option."""
    return max(1.0, desk.number(_LEGACY)) if _LEGACY in desk.given else 1.0


def take_accumulation(desk: Desk, name: str, value: Any) -> None:
    if desk.number(name) < 1:
        desk.leave(name, "an epoch is no number of pictures: give --gradient-accumulation-steps")
        return
    desk.take(name, "gradient_accumulation_steps", value)
    if desk.number(name) > 1:
        desk.remarks.append(
            f"{name} counts every forward pass as a step there: counts of steps are divided by it."
        )


def steps_of(leaf: str) -> Row:
    """A row of a count of steps."""

    def act(desk: Desk, name: str, value: Any) -> None:
        is_length = leaf == "max_train_steps"
        number = desk.count(name) if is_length else desk.number(name)
        steps = number / accumulated(desk)
        if steps <= 0 and is_length:
            return
        if steps <= 0:
            desk.leave(name, "is off", matters=False)
            return
        desk.take(name, leaf, desk.lengths.steps(steps))
        if is_length and desk.lengths.halved:
            desk.remarks.append(reasons.HALVED)

    return computed(act, leaf)


def take_times(desk: Desk, name: str, value: Any) -> None:
    take_way(desk, name, _WAYS)
    if str(value).lower() == "weighted":
        desk.leave(name, _NO_WEIGHT)


def take_weighted_times(desk: Desk, name: str, value: Any) -> None:
    """An older option for even times with a weight on the loss; it goes before the newer one."""
    if is_off(value):
        desk.leave(name, "is off", matters=False)
    else:
        desk.take(name, "timestep_density", "uniform")
        if desk.kind == "flow":
            desk.take(name, "timestep_shift", 1.0)
        desk.leave(name, _NO_WEIGHT)


def take_quantized(desk: Desk, name: str, value: Any) -> None:
    kind = str(desk.setting("model.qtype") or "qfloat8").partition("|")[0].lower()
    if not is_true(value):
        desk.leave(name, "is off", matters=False)
    elif desk.values.get("use_lora") is False:
        desk.leave(name, "weights that all learn are not quantised", matters=False)
    elif kind in _QUANTIZED:
        desk.take(name, "quantization", _QUANTIZED[kind])
    else:
        desk.leave(name, f"{kind} is not among --quantization: int8, fp8, nf4")


def take_kind_of_model(desk: Desk, name: str, value: Any) -> None:
    if desk.kind is None:
        desk.leave(name, reasons.NO_MODEL)
    else:
        desk.leave(name, reasons.CHECKPOINT, matters=False)


def take_prompts(desk: Desk, name: str, value: Any) -> None:
    """Prompts as a list, or as a list of samples with options of their own."""
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    word = str(desk.setting("trigger_word") or "")
    prompts: list[str] = []
    options: dict[str, Any] = {}
    for row in rows:
        said = row.get("prompt") if isinstance(row, Mapping) else row
        prompt, inline = parted("" if said is None else str(said))
        filled = _filled(prompt, word).strip()
        prompts.append(filled if word else filled.lstrip(" ,"))
        own = {str(k): v for k, v in row.items()} if isinstance(row, Mapping) else {}
        options |= {f"{name}: {k}": v for k, v in own.items() if k != "prompt"}
        options |= {f"{name} --{k}": v for k, v in inline.items()}
    for option, given in sorted(options.items()):
        desk.leave(option, "prompts have no options of their own here", matters=False, value=given)
    if is_true(desk.setting("train.disable_sampling")):
        desk.leave(name, "train.disable_sampling is on", matters=False)
    elif any(prompts):
        desk.take(name, "validation_prompts", [prompt for prompt in prompts if prompt])


def take_mean(desk: Desk, name: str, value: Any) -> None:
    if isinstance(value, Mapping) and is_true(value.get("use_ema")):
        desk.leave(name, "no running mean of the weights is kept: the last ones are delivered")
    else:
        desk.leave(name, "is off", matters=False)


def take_rate(desk: Desk, name: str, value: Any) -> None:
    """The general rate is that of the parts that have none of their own."""
    if "train.unet_lr" not in desk.given:
        desk.take(name, "learning_rate", value)
    elif _text_learns(desk) and "train.text_encoder_lr" not in desk.given:
        desk.take(name, "text_encoder_lr", value)
    else:
        desk.leave(name, reasons.RATES_OF_PARTS, matters=False)


def take_text_rate(desk: Desk, name: str, value: Any) -> None:
    if not _text_learns(desk):
        desk.leave(name, reasons.TEXTS, matters=False)
    elif desk.values.get("optimizer") == "prodigy":
        desk.leave(name, reasons.PRODIGY, matters=False)
    else:
        desk.take(name, "text_encoder_lr", value)


def _text_learns(desk: Desk) -> bool:
    return is_true(desk.setting("train.train_text_encoder"))


def take_course_options(desk: Desk, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        desk.refuse(name, "options by name")
        return
    for key, inner in value.items():
        if key in ("num_warmup_steps", "warmup_steps"):
            warmup = float(inner)
            desk.take(name, "lr_warmup_steps", desk.lengths.steps(warmup) if warmup > 0 else inner)
        else:
            desk.leave(f"{name}: {key}", "the course has no such option", value=inner)
