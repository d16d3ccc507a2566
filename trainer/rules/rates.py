"""Learning rates: what prodigy demands of them, and what those left open become."""

from __future__ import annotations

from trainer.rules.draft import Draft, trains_text

PRODIGY_LR = 1.0
ADAPTER_LR = 1e-4
FULL_LR = 1e-6


def one_rate_for_prodigy(draft: Draft) -> None:
    """Prodigy takes one learning rate for all groups, and estimates the step size itself.

    Source: Mishchenko and Defazio 2023; the authors' own default is 1.
    """
    values = draft.values
    if values["optimizer"] != "prodigy":
        return
    text_rate_is_explicit = "text_encoder_lr" in draft.explicit and trains_text(values)
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


def fill_rates(draft: Draft) -> None:
    """Learning rates left open get the usual value of what is trained."""
    values = draft.values
    if values["learning_rate"] is None:
        values["learning_rate"] = ADAPTER_LR if values["use_lora"] else FULL_LR
    if values["text_encoder_lr"] is None:
        values["text_encoder_lr"] = values["learning_rate"]
