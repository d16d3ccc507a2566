"""Pairs of options that cannot both have their way.

Two that somebody set on purpose are an error; a default that contradicts one gives way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.leaves import shown
from trainer.rules.draft import Condition, Draft, Values, always
from trainer.sections.learning import steps_of_share


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
    clashes: Condition
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


def _keeps_bf16(values: Values) -> bool:
    """Whether all weights are trained, and kept in bf16."""
    return bool(not values["use_lora"] and values["weights_dtype"] == "bf16")


def _updates_in_backward(values: Values) -> bool:
    """Whether all weights are trained, each updated as soon as its gradient is there."""
    return bool(not values["use_lora"] and values["fused_backward"])


EXCLUSIONS = (
    Exclusion(
        "concepts",
        "images_data_url",
        lambda v: v["concepts"] is not None and v["images_data_url"] is not None,
        always(None),
        always(None),
        "each concept has pictures of its own",
    ),
    Exclusion(
        "train_text_encoder",
        "train_text_encoder_ti",
        lambda v: v["train_text_encoder"] and v["train_text_encoder_ti"],
        always(False),
        always(False),
        "the text encoders learn either by an adapter or by new tokens",
    ),
    Exclusion(
        "use_dora",
        "lora_type",
        lambda v: v["use_lora"] and v["use_dora"] and v["lora_type"] != "lora",
        always(False),
        always("lora"),
        "DoRA exists for lora_type lora only",
    ),
    Exclusion(
        "weights_dtype",
        "mixed_precision",
        lambda v: _keeps_bf16(v) and v["mixed_precision"] != "bf16",
        always("fp32"),
        always("bf16"),
        "weights kept in bf16 compute in bf16",
    ),
    Exclusion(
        "weights_dtype",
        "optimizer",
        lambda v: _keeps_bf16(v) and v["optimizer"] == "prodigy",
        always("fp32"),
        always("adamw"),
        "weights kept in bf16 are updated one by one, and prodigy's estimate needs all of them",
    ),
    Exclusion(
        "fused_backward",
        "optimizer",
        lambda v: _updates_in_backward(v) and v["optimizer"] == "prodigy",
        always(False),
        always("adamw"),
        "weights are updated one by one, and prodigy's estimate needs all of them",
    ),
    Exclusion(
        "fused_backward",
        "max_grad_norm",
        lambda v: _updates_in_backward(v) and v["max_grad_norm"] > 0,
        always(False),
        always(0.0),
        "the norm of all gradients is known only when the first weights are updated already",
    ),
    Exclusion(
        "fused_backward",
        "gradient_accumulation_steps",
        lambda v: _updates_in_backward(v) and v["gradient_accumulation_steps"] > 1,
        always(False),
        always(1),
        "gradients are given up at once, so none are summed over several passes",
    ),
    Exclusion(
        "fused_backward",
        "mixed_precision",
        lambda v: _updates_in_backward(v) and v["mixed_precision"] == "fp16",
        always(False),
        always("auto"),
        "the scaler of fp16 must see all gradients before an update",
    ),
    Exclusion(
        "quantization",
        "use_lora",
        lambda v: v["quantization"] != "none" and not v["use_lora"],
        always("none"),
        always(True),
        "weights that learn are not quantised",
    ),
    Exclusion(
        "offload_blocks",
        "use_lora",
        lambda v: v["offload_blocks"] > 0 and not v["use_lora"],
        always(0),
        always(True),
        "weights that learn stay on the GPU",
    ),
    Exclusion(
        "center_crop",
        "face_aware_cropping",
        lambda v: v["center_crop"] and v["face_aware_cropping"],
        always(False),
        always(False),
        "the window lies either in the middle or over the face",
    ),
    Exclusion(
        "face_restore",
        "face_detector",
        lambda v: v["face_restore"] is not None and v["face_detector"] == "haar",
        always(None),
        always("auto"),
        "restoring a face needs its eyes and mouth, which only YuNet finds",
    ),
    Exclusion(
        "disable_unet_during_ti_training",
        "train_text_encoder_ti_frac",
        lambda v: (
            v["train_text_encoder_ti"]
            and v["disable_unet_during_ti_training"]
            and v["train_text_encoder_ti_frac"] == 1
        ),
        always(False),
        always(0.5),
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
        always(0),
        always(1000),
        "the smallest timestep is below the bound of the largest",
    ),
)


def save_as_trained(draft: Draft) -> None:
    """Weights kept in bf16 are written in it: in 32 bits they take twice the room for nothing."""
    is_open = "save_dtype" not in draft.explicit and draft.origins["save_dtype"] == 0
    if is_open and _keeps_bf16(draft.values):
        draft.settle("save_dtype", "bf16", "`weights_dtype` is bf16")


def leave_steps_to_denoiser(draft: Draft) -> None:
    """Steps must be left for a denoiser that waits for the new tokens.

    Where epochs decide, the number of steps is not known before the pictures are.
    """
    waits, steps = "disable_unet_during_ti_training", "max_train_steps"
    values = draft.values
    if not (values["train_text_encoder_ti"] and values[waits]):
        return
    if values["num_train_epochs"] is not None or "num_train_epochs" in draft.wrong:
        return
    pivot = steps_of_share(values["train_text_encoder_ti_frac"], values[steps])
    if pivot < values[steps]:
        return
    reason = f"the new tokens learn in the first {pivot} steps, and the denoiser never"
    if waits in draft.explicit:
        hint = f"lower `train_text_encoder_ti_frac`, or raise `{steps}`"
        draft.clash(waits, steps, reason, hint)
    else:
        draft.settle(waits, False, f"`{steps}` is {values[steps]}: {reason}")
