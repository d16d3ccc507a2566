"""What is odd or without effect in a configuration whose conflicts are settled.

An odd value is kept, with a warning; an option without effect is noted as ignored.
"""

from __future__ import annotations

from pathlib import Path

from trainer.config import Concept
from trainer.leaves import shown
from trainer.rules.draft import Condition, Draft, Values, differs, is_off, trains_text
from trainer.sections.subjects import INHERITED, concepts_of, inherits, subjects_of

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


def note_idle(draft: Draft) -> None:
    """Notes every option without an effect, with the first reason that holds."""
    noted: set[str] = set()
    for leaves, idle, reason in IDLE:
        if not idle(draft.values):
            continue
        for leaf in leaves:
            if leaf not in noted:
                draft.note("ignored", leaf, reason)
        noted.update(leaves)


def _is_file(values: Values) -> bool:
    return str(values["model_url"]).endswith(".safetensors")


def _is_local(values: Values) -> bool:
    return _is_file(values) or Path(values["model_url"]).is_dir()


def _prior_concepts(values: Values) -> list[tuple[Concept, Concept]]:
    """The concepts with prior preservation: as given, and with what they inherit."""
    pairs = zip(concepts_of(values), subjects_of(values), strict=True)
    return [(given, filled) for given, filled in pairs if filled.with_prior_preservation]


def _without_prior(values: Values) -> bool:
    return not _prior_concepts(values)


def _makes_no_class_images(values: Values) -> bool:
    return all(filled.class_images_url is not None for _, filled in _prior_concepts(values))


def _without_class_masks(values: Values) -> bool:
    """No class picture has a mask: none is found, and none is given."""
    if values["clip_seg_mask_prompt"]:
        return _without_prior(values)
    folders = [filled.class_images_url for _, filled in _prior_concepts(values)]
    return not values["use_given_masks"] or not any(folders)


def _class_has_its_words(values: Values) -> bool:
    """Whether photo_class is asked by no concept: each has a prompt or a class of its own."""
    return not any(
        inherits(given, "photo_class", values)
        and given.class_prompt is None
        and values["class_prompt"] is None
        for given, _ in _prior_concepts(values)
    )


def _each_has_its_own(leaf: str) -> Condition:
    """Whether no concept takes this option from the run."""
    asked = {"instance_prompt", "with_prior_preservation"}

    def idle(values: Values) -> bool:
        concepts = concepts_of(values)
        if leaf not in asked:
            concepts = tuple(given for given, _ in _prior_concepts(values))
        return values["concepts"] is not None and not any(
            inherits(concept, leaf, values) for concept in concepts
        )

    return idle


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
            not v["use_lora"] and v["optimizer"] != "prodigy" and v["learning_rate"] >= HOT_FULL_LR
        ),
        "is high for training all weights; 1e-6 is usual",
    ),
    (
        "text_encoder_lr",
        lambda v: (
            not v["use_lora"]
            and v["train_text_encoder"]
            and v["optimizer"] != "prodigy"
            and v["text_encoder_lr"] >= HOT_FULL_LR
            and v["text_encoder_lr"] != v["learning_rate"]
        ),
        "is high for training all weights of the text encoders; 1e-6 is usual",
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
IDLE: tuple[tuple[tuple[str, ...], Condition, str], ...] = (
    (
        ("rank", "alpha", "lora_type", "use_dora", "target_unet_modules"),
        is_off("use_lora"),
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
    (("extract_rank",), lambda v: bool(v["use_lora"]), "an adapter is trained already"),
    (
        (
            "train_text_encoder_frac",
            "target_text_encoder_modules",
            "text_encoder_rank",
            "text_encoder_alpha",
        ),
        is_off("train_text_encoder"),
        "train_text_encoder is false",
    ),
    (
        ("target_text_encoder_modules", "text_encoder_rank", "text_encoder_alpha"),
        is_off("use_lora"),
        "all weights are trained, there is no adapter",
    ),
    (
        (
            "num_new_tokens_per_abstraction",
            "train_text_encoder_ti_frac",
            "disable_unet_during_ti_training",
            "token_retraction",
            "ti_pooling",
        ),
        is_off("train_text_encoder_ti"),
        "train_text_encoder_ti is false",
    ),
    (
        ("token_abstraction",),
        lambda v: (
            not v["train_text_encoder_ti"]
            and v["skip_caption_generation"]
            and v["concepts"] is None
        ),
        "no new tokens are trained and no captions are written",
    ),
    (
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        lambda v: not trains_text(v),
        "no text encoder and no new token is trained",
    ),
    (
        (
            "prior_loss_weight",
            "photo_class",
            "class_prompt",
            "class_images_url",
            "num_class_images",
            "class_inference_steps",
            "class_guidance_scale",
        ),
        _without_prior,
        "with_prior_preservation is false",
    ),
    (
        ("num_class_images", "class_inference_steps", "class_guidance_scale"),
        _makes_no_class_images,
        "class_images_url gives the class pictures",
    ),
    (("photo_class",), _class_has_its_words, "class_prompt has the words for the class"),
    *(((leaf,), _each_has_its_own(leaf), "each concept has its own") for leaf in INHERITED),
    (("class_image_mask_style",), _without_class_masks, "there are no class pictures with masks"),
    (
        ("clip_seg_mask_temperature", "clip_seg_mask_bias", "segmenter"),
        is_off("clip_seg_mask_prompt"),
        "clip_seg_mask_prompt is empty",
    ),
    (("lr_warmup_steps",), lambda v: v["lr_scheduler"] == "constant", "lr_scheduler is constant"),
    (
        ("lr_num_cycles",),
        differs("lr_scheduler", "cosine_with_restarts"),
        "lr_scheduler is not cosine_with_restarts",
    ),
    (("lr_power",), differs("lr_scheduler", "polynomial"), "lr_scheduler is not polynomial"),
    (
        (
            "prodigy_beta3",
            "prodigy_decouple",
            "prodigy_use_bias_correction",
            "prodigy_safeguard_warmup",
        ),
        differs("optimizer", "prodigy"),
        "optimizer is not prodigy",
    ),
    (
        ("max_train_steps",),
        lambda v: v["num_train_epochs"] is not None,
        "num_train_epochs decides the length of the run",
    ),
    (
        ("caption_column",),
        lambda v: not any(concept.captions_file_url for concept in concepts_of(v)),
        "there is no captions_file_url",
    ),
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
