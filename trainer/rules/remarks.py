"""What is odd in a configuration whose conflicts are settled: it is kept, with a warning."""

from __future__ import annotations

from trainer.leaves import shown
from trainer.rules.draft import Condition, Draft
from trainer.sections.subjects import concepts_of, fields_of_concept, inherits, subjects_of

# Hot learning rates for all weights of a model, and timid ones: for Prodigy, whose learning rate
# multiplies the step size that it estimates itself, and for new tokens, which AdamW moves by
# about the learning rate each step on a scale of about 1e-2.
HOT_FULL_LR = 1e-5
TIMID_PRODIGY_LR = 0.1
TIMID_TOKEN_LR = 1e-5
# The min-SNR paper's smallest gamma; the loss all but vanishes well below it.
SMALLEST_USUAL_GAMMA = 1.0


def warn_of_odd(draft: Draft) -> None:
    """Notes values that act, but are rarely meant."""
    for leaf, odd, message in WARNINGS:
        if odd(draft.values):
            draft.note("warning", leaf, f"{shown(draft.values[leaf])} {message}")


def warn_of_weightless_class(draft: Draft) -> None:
    """Class pictures whose loss has no weight are made and run for nothing."""
    leaf = "prior_loss_weight"
    concepts = concepts_of(draft.values)
    weightless = set()
    for place, subject in enumerate(subjects_of(draft.values)):
        if subject.with_prior_preservation and subject.prior_loss_weight == 0:
            own = fields_of_concept(draft.values["concepts"], place)
            weightless.add(leaf if inherits(concepts[place], leaf, draft.values) else own[leaf])
    for field in sorted(weightless):
        message = "0: class pictures are made and run for nothing; to save the time, set "
        draft.note("warning", field, f"{message}`with_prior_preservation: false`")


# leaf, when it is odd, what to say after its value
WARNINGS: tuple[tuple[str, Condition, str], ...] = (
    (
        "learning_rate",
        lambda v: v["optimizer"] == "prodigy" and v["learning_rate"] < TIMID_PRODIGY_LR,
        "is so small that prodigy hardly learns; its usual learning rate is 1",
    ),
    (
        "learning_rate",
        lambda v: (
            not v["use_lora"] and v["optimizer"] != "prodigy" and v["learning_rate"] > HOT_FULL_LR
        ),
        "is high for training all weights; 1e-6 to 1e-5 is usual",
    ),
    (
        "text_encoder_lr",
        lambda v: (
            not v["use_lora"]
            and v["train_text_encoder"]
            and v["optimizer"] != "prodigy"
            and v["text_encoder_lr"] > HOT_FULL_LR
            and v["text_encoder_lr"] != v["learning_rate"]
        ),
        "is high for training all weights of the text encoders; 1e-6 to 1e-5 is usual",
    ),
    (
        "text_encoder_lr",
        lambda v: (
            v["train_text_encoder_ti"]
            and v["optimizer"] != "prodigy"
            and v["text_encoder_lr"] < TIMID_TOKEN_LR
        ),
        "is so small that new tokens hardly learn; 1e-4 is usual",
    ),
    (
        "optimizer",
        lambda v: bool(v["use_lora"] and v["optimizer"] == "paged_adamw8bit"),
        "pages no tensor of fewer than 100,000 numbers, and hardly one of an adapter has as many: "
        "it does what adamw8bit does",
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
