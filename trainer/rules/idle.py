"""Options without an effect in a configuration whose conflicts are settled: noted as ignored.

What depends on a concept is asked of each concept by itself, with what it takes from the run:
its own options may be idle, and the run's are where none that takes them can use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.rules.concepts import FIRST_IDENTIFIER
from trainer.rules.draft import Condition, Draft, Values, differs, is_off, trains_text
from trainer.sections.subjects import (
    INHERITED,
    OF_THE_CLASS,
    concepts_of,
    fields_of_concept,
    inherits,
    words,
)

ALL_IN_32_BITS = "everything is computed in 32 bits"

# Leaves, when they have no effect, why.
_Idle = Sequence[tuple[Sequence[str], Condition, str]]


def note_idle(draft: Draft) -> None:
    """Notes every option without an effect, with the first reason that holds."""
    for leaf, reason in _reasons(IDLE, draft.values).items():
        draft.note("ignored", leaf, reason)
    in_subjects = [_reasons(IDLE_IN_SUBJECT, view) for view in _views(draft.values)]
    if draft.values["concepts"] is None:
        for leaf, reason in in_subjects[0].items():
            draft.note("ignored", leaf, reason)
        return
    _note_unused(draft, in_subjects)
    for place, concept in enumerate(draft.values["concepts"]):
        fields = fields_of_concept(draft.values["concepts"], place)
        given = dict(concept)
        for leaf, reason in in_subjects[place].items():
            if given.get(leaf) is not None:
                draft.note("ignored", fields[leaf], reason)


def _note_unused(draft: Draft, in_subjects: Sequence[dict[str, str]]) -> None:
    """Notes the run's options that no concept uses.

    Args:
        draft: with concepts.
        in_subjects: what is idle in each concept, and why.
    """
    values = draft.values
    for leaf in dict.fromkeys((*INHERITED, *(n for names, _, _ in IDLE_IN_SUBJECT for n in names))):
        takers = [
            idle
            for concept, idle in zip(values["concepts"], in_subjects, strict=True)
            if leaf not in INHERITED or inherits(concept, leaf, values)
        ]
        if all(leaf in idle for idle in takers):
            other = ", or is of another class" if leaf in OF_THE_CLASS else ""
            reasons = dict.fromkeys(idle[leaf] for idle in takers)
            reason = "; ".join(reasons) or f"each has its own{other}"
            draft.note("ignored", leaf, f"no concept uses it: {reason}")


def _reasons(table: _Idle, values: Values) -> dict[str, str]:
    """The leaves that are idle in these values, each with the first reason that holds."""
    found: dict[str, str] = {}
    for leaves, idle, reason in table:
        if idle(values):
            found = dict.fromkeys(leaves, reason) | found
    return found


def _views(values: Values) -> list[Values]:
    """The leaves as they are for each subject, without what it does not take from the run."""
    views: list[Values] = []
    for concept in concepts_of(values):
        own = dict(concept)
        taken = {
            leaf: values[leaf] if inherits(concept, leaf, values) else own[leaf]
            for leaf in INHERITED
        }
        views.append({**values, **taken, "captions_file_url": concept.captions_file_url})
    return views


def _is_file(values: Values) -> bool:
    return str(values["model_url"]).endswith(".safetensors")


def _is_local(values: Values) -> bool:
    return _is_file(values) or Path(values["model_url"]).is_dir()


def _asks_for_no_identifier(values: Values) -> bool:
    """Whether identifiers go into no new token, no written caption and no prompt."""
    if values["train_text_encoder_ti"] or values["add_trigger"]:
        return False
    if not values["skip_caption_generation"]:
        return False
    names = values["token_abstraction"]
    is_in_prompt = words(names).search(values["instance_prompt"]) is not None
    return values["concepts"] is None and (FIRST_IDENTIFIER in names or not is_in_prompt)


def _without_class_masks(values: Values) -> bool:
    """No class picture has a mask: none is found, and none is given."""
    if not values["with_prior_preservation"]:
        return True
    given = values["use_given_masks"] and values["class_images_url"] is not None
    return not values["clip_seg_mask_prompt"] and not given


def _asks_for_a_class(values: Values) -> bool:
    """Whether a model writes captions that call the subject what it is."""
    return not values["skip_caption_generation"] and values["caption_mode"] == "character"


IDLE: _Idle = (
    (
        ("rank", "alpha", "lora_type", "use_dora", "target_unet_modules", "adapter_layers"),
        is_off("use_lora"),
        "all weights are trained, there is no adapter",
    ),
    (
        ("checkpointing_share",),
        lambda v: v["gradient_checkpointing"] is False,
        "gradient_checkpointing is false",
    ),
    (
        ("channels_last",),
        is_off("use_lora"),
        "all weights are trained, none is frozen",
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
        ("weights_dtype", "fused_backward"),
        lambda v: bool(v["use_lora"]),
        "an adapter is trained, in 32 bits and with small gradients",
    ),
    (
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda v: v["optimizer"] == "adafactor",
        "adafactor has no first moment, and a second with decay and epsilon of its own",
    ),
    (("extract_rank",), lambda v: bool(v["use_lora"]), "an adapter is trained already"),
    (
        ("sample_inference_steps", "sample_guidance_scale"),
        lambda v: not v["validation_prompts"] and v["sample_steps"] is None,
        "no pictures are made on the way",
    ),
    (("validation_steps",), lambda v: v["validation_images"] == 0, "no pictures are held out"),
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
        _asks_for_no_identifier,
        "no new tokens are trained and no captions are written",
    ),
    (
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        lambda v: not trains_text(v),
        "no text encoder and no new token is trained",
    ),
    (
        ("clip_seg_mask_temperature", "clip_seg_mask_bias", "segmenter", "clipseg_url"),
        is_off("clip_seg_mask_prompt"),
        "clip_seg_mask_prompt is empty",
    ),
    (("clipseg_url",), differs("segmenter", "clipseg"), "segmenter is not clipseg"),
    (
        ("face_detector", "face_detector_path"),
        lambda v: not (v["face_aware_cropping"] or v["face_crop_region"] or v["face_restore"]),
        "nothing asks for faces",
    ),
    (("face_detector_path",), lambda v: v["face_detector"] == "haar", "face_detector is haar"),
    (
        ("face_restore_upscale", "face_restorer_path"),
        is_off("face_restore"),
        "no faces are restored",
    ),
    (
        ("preparation_order",),
        lambda v: not (v["face_crop_region"] or v["face_restore"]),
        "pictures are only resized",
    ),
    (
        ("captioner", "caption_mode", "captioner_load_in_4bit"),
        lambda v: bool(v["skip_caption_generation"]),
        "skip_caption_generation is true",
    ),
    (
        ("logit_mean", "logit_std"),
        differs("timestep_density", "logit_normal"),
        "timestep_density is not logit_normal",
    ),
    (("mode_scale",), differs("timestep_density", "mode"), "timestep_density is not mode"),
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
        ("data_archive_format",),
        lambda v: not v["debug_dataset"] and not v["debug_loss_masks"],
        "no folders are delivered",
    ),
    (
        ("hub_model_id", "hub_private"),
        is_off("push_to_hub"),
        "push_to_hub is false",
    ),
    (("num_workers",), lambda v: bool(v["cache_latents"]), "latents are cached"),
    (
        ("upscale_vae_32bit",),
        lambda v: v["mixed_precision"] == "no",
        ALL_IN_32_BITS,
    ),
    (("revision",), _is_local, "model_url is local"),
    (("variant",), _is_file, "model_url is a single file"),
    (("single_file_config",), lambda v: not _is_file(v), "model_url is not a single file"),
)

# The same for what concepts may have of their own, in the leaves as they are for one of them.
IDLE_IN_SUBJECT: _Idle = (
    (
        (
            "prior_loss_weight",
            "class_prompt",
            "class_images_url",
            "num_class_images",
            "class_inference_steps",
            "class_guidance_scale",
            "offload_models",
        ),
        is_off("with_prior_preservation"),
        "with_prior_preservation is false",
    ),
    (
        ("num_class_images", "class_inference_steps", "class_guidance_scale", "offload_models"),
        lambda v: v["class_images_url"] is not None,
        "class_images_url gives the class pictures",
    ),
    (
        ("photo_class",),
        lambda v: not v["with_prior_preservation"] and not _asks_for_a_class(v),
        "with_prior_preservation is false",
    ),
    (
        ("photo_class",),
        lambda v: v["class_prompt"] is not None and not _asks_for_a_class(v),
        "class_prompt has the words for the class",
    ),
    (("class_image_mask_style",), _without_class_masks, "there are no class pictures with masks"),
)
