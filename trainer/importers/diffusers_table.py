"""The options of diffusers' training scripts, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.importers import folders, reasons
from trainer.importers.desk import Desk, Table
from trainer.importers.optimizers import SCHEDULERS
from trainer.importers.rows import (
    becomes,
    chosen,
    computed,
    is_off,
    is_true,
    needless,
    secret,
    switch,
    told_with,
    without,
)
from trainer.importers.words import PRECISIONS, take_name, take_tokens

_OPTIMIZERS: Mapping[str, str] = {"adamw": "adamw", "prodigy": "prodigy"}
_DENSITIES: Mapping[str, str] = {
    "none": "uniform",
    "logit_normal": "logit_normal",
    "mode": "mode",
    "cosmap": "cosmap",
}


def _take_data(desk: Desk, name: str, value: Any) -> None:
    """A data set: a folder of this machine, or one on the hub that is to be downloaded."""
    place = str(value)
    is_path = place.startswith((".", "/", "~")) or "\\" in place
    if folders.is_here(place) or is_path or name == "instance_data_dir":
        desk.take(name, "images_data_url", place)
    else:
        desk.leave(
            name,
            f"data sets of the hub are not read: `hf download --repo-type dataset {place} "
            "--local-dir photos`, then give photos as images_data_url",
        )


def _take_caption_column(desk: Desk, name: str, value: Any) -> None:
    desk.take(name, "caption_column", value)
    desk.remarks.append(f"Captions are read from `{value}` in metadata.jsonl among the pictures.")


def _take_class_folder(desk: Desk, name: str, value: Any) -> None:
    """Class pictures that are there are enough, or the base model makes all of them."""
    if "with_prior_preservation" not in desk.given:
        desk.leave(name, "with_prior_preservation is not given", matters=False)
        return
    wanted = int(float(desk.given.get("num_class_images", 100)))
    found = folders.count(str(value)) or 0
    if found >= wanted:
        desk.take(name, "class_images_url", value)
    else:
        reason = f"holds {found} of {wanted} pictures here: the base model makes all of them"
        desk.leave(name, reason, matters=False)


def _take_rate(desk: Desk, name: str, value: Any) -> None:
    """The rate, times the pictures of a step where it is said so."""
    rate = desk.number(name)
    if is_true(desk.setting("scale_lr")):
        accumulated = float(desk.setting("gradient_accumulation_steps") or 1)
        rate *= desk.number("train_batch_size") * accumulated * desk.lengths.processes
    if is_prodigy(desk) and name not in desk.given:
        return
    desk.take(name, "learning_rate", rate)


def is_prodigy(desk: Desk) -> bool:
    """Whether Prodigy is the optimizer."""
    return str(desk.setting("optimizer")).lower() == "prodigy"


def text_learns(desk: Desk) -> bool:
    """Whether text encoders or new tokens learn."""
    options = ("train_text_encoder", "train_text_encoder_ti")
    return any(is_true(desk.setting(option)) for option in options)


def _take_warmup(desk: Desk, name: str, value: Any) -> None:
    if str(desk.setting("lr_scheduler")).lower() == "constant":
        desk.leave(name, "a constant rate has no warm-up, there too", matters=False)
    else:
        desk.take(name, "lr_warmup_steps", value)


def _take_text_rate(desk: Desk, name: str, value: Any) -> None:
    if not text_learns(desk):
        desk.leave(name, reasons.TEXTS, matters=False)
    elif is_prodigy(desk):
        desk.leave(name, reasons.PRODIGY, matters=False)
    else:
        desk.take(name, "text_encoder_lr", value)


def _take_optimizer(desk: Desk, name: str, value: Any) -> None:
    word = str(value).lower()
    if name not in desk.given and is_true(desk.setting("use_8bit_adam")):
        return
    if word not in _OPTIMIZERS:
        desk.leave(name, "the scripts take adamw instead", matters=False)
        word = "adamw"
    if word == "adamw" and is_true(desk.setting("use_8bit_adam")):
        desk.take(name, "optimizer", "adamw8bit")
    else:
        desk.take(name, "optimizer", _OPTIMIZERS[word])


def _take_eight_bits(desk: Desk, name: str, value: Any) -> None:
    if is_prodigy(desk):
        desk.leave(name, "the optimizer is prodigy", matters=False)
    elif is_true(value):
        desk.take(name, "optimizer", "adamw8bit")
    else:
        desk.leave(name, "is off", matters=False)


def take_size(desk: Desk, name: str, value: Any) -> None:
    side = desk.whole(name)
    desk.take(name, "resolution_width", side)
    desk.take(name, "resolution_height", side)


def _take_epochs(desk: Desk, name: str, value: Any) -> None:
    """Passes over the pictures, or steps, where class pictures make an epoch longer."""
    if "max_train_steps" in desk.given:
        if name in desk.given:
            desk.leave(name, "max_train_steps decides there", matters=False)
        return
    epochs = desk.whole(name)
    if not desk.lengths.with_class:
        desk.take(name, "num_train_epochs", epochs * desk.lengths.repeats)
        return
    steps = desk.lengths.of_epochs(epochs)
    if steps is not None:
        desk.take(name, "max_train_steps", steps)
        return
    desk.take(name, "num_train_epochs", epochs * desk.lengths.repeats)
    desk.remarks.append(
        "An epoch there is as long as the class pictures are many; the pictures are not on this "
        "machine to be counted: give max_train_steps."
    )


def _take_validation_epochs(desk: Desk, name: str, value: Any) -> None:
    steps = desk.lengths.of_epochs(desk.number(name))
    if steps is None:
        reason = "the pictures are not on this machine to be counted: give --sample-steps"
        desk.leave(name, reason, matters=False)
    else:
        desk.take(name, "sample_steps", steps)


def _take_output(desk: Desk, name: str, value: Any) -> None:
    """The last folder's name is the result's."""
    take_name(desk, name, Path(str(value)).name, reasons.OUTPUT)


def _take_layers(desk: Desk, name: str, value: Any) -> None:
    parts = value if isinstance(value, list) else str(value).split(",")
    desk.take(name, "target_unet_modules", [str(part).strip() for part in parts])


def _take_schedule(desk: Desk, name: str, value: Any) -> None:
    """How times of flow matching are drawn; a weight on the loss by noise level is not taken."""
    scheme = str(value).lower()
    desk.take(name, "timestep_density", _DENSITIES.get(scheme, "uniform"))
    if scheme == "cosmap":
        reason = (
            "times are drawn by it here, and there it weighs the loss of even ones: on average "
        )
        desk.leave(f"{name}: loss", f"{reason}the same", value=scheme)
    elif scheme not in _DENSITIES:
        desk.leave(name, "times are drawn evenly, as there; the loss has no weight by noise level")


def _with_less_noise(mean: Any) -> float:
    """A larger mean is less noise there, where times are counted from the noisiest one."""
    return 0.0 - float(mean)


def _take_fraction(desk: Desk, name: str, value: Any) -> None:
    if float(value) == 1:
        desk.leave(name, reasons.AS_HERE, matters=False)
    else:
        desk.leave(name, "the denoiser learns to the last step; no training is of new tokens alone")


def _take_t5_tokens(desk: Desk, name: str, value: Any) -> None:
    if is_off(desk.setting("train_text_encoder_ti")):
        desk.leave(name, "no new tokens learn", matters=False)
    elif is_true(value):
        desk.leave(name, "new tokens are learnt in T5 and CLIP, here too", matters=False)
    else:
        desk.leave(name, "new tokens are learnt in T5, too, not in CLIP alone")


_MADE = "class and validation pictures are made as memory allows"
_FOLDERS = "pictures are read from folders and archives"
_BY_ITSELF = "is on whatever is given there, and here"
_LAUNCH = "the launcher says it"

TABLE: Table = {
    "pretrained_model_name_or_path": becomes("model_url", str),
    "pretrained_vae_model_name_or_path": becomes("vae_url", str),
    "revision": becomes("revision", str),
    "variant": becomes("variant", str),
    "tokenizer_name": without(reasons.TOKENIZERS),
    "instance_data_dir": computed(_take_data, "images_data_url"),
    "dataset_name": computed(_take_data, "images_data_url"),
    "dataset_config_name": without(_FOLDERS),
    "image_column": without(_FOLDERS, as_here=("image",)),
    "caption_column": computed(_take_caption_column, "caption_column"),
    "cache_dir": needless("set the environment variable HF_HOME"),
    "instance_prompt": becomes("instance_prompt", str),
    "repeats": told_with("num_train_epochs", "num_train_epochs"),
    "token_abstraction": becomes("token_abstraction"),
    "num_new_tokens_per_abstraction": becomes("num_new_tokens_per_abstraction"),
    "initializer_concept": without("new tokens begin at random, with the deviation of all others"),
    "train_text_encoder_ti": becomes("train_text_encoder_ti", is_true),
    "train_text_encoder_ti_frac": becomes("train_text_encoder_ti_frac"),
    "train_text_encoder": becomes("train_text_encoder", is_true),
    "train_text_encoder_frac": becomes("train_text_encoder_frac"),
    "train_transformer_frac": computed(_take_fraction),
    "enable_t5_ti": computed(_take_t5_tokens),
    "with_prior_preservation": becomes("with_prior_preservation", is_true),
    "prior_loss_weight": becomes("prior_loss_weight"),
    "class_data_dir": computed(_take_class_folder, "class_images_url"),
    "class_prompt": becomes("class_prompt", str),
    "num_class_images": becomes("num_class_images"),
    "sample_batch_size": needless(_MADE),
    "prior_generation_precision": needless(_MADE),
    "class_labels_conditioning": without("the base models here know no class labels"),
    "resolution": computed(take_size, "resolution_width", "resolution_height"),
    "image_interpolation_mode": needless(reasons.RESIZED),
    "center_crop": becomes("center_crop", is_true),
    "random_flip": becomes("random_flip", is_true),
    "cache_latents": needless(reasons.KEPT),
    "pre_compute_text_embeddings": needless(reasons.KEPT),
    "tokenizer_max_length": without(reasons.CAPTION_LENGTH, as_here=(77,)),
    "max_sequence_length": computed(take_tokens, "max_sequence_length", only="flow"),
    "text_encoder_use_attention_mask": without("padding is read, as the pipeline does"),
    "rank": becomes("rank"),
    "lora_alpha": becomes("alpha"),
    "lora_dropout": without(reasons.DROPOUT, as_here=(0,)),
    "lora_layers": computed(_take_layers, "target_unet_modules"),
    "lora_unet_blocks": without(reasons.LAYERS),
    "use_blora": without(reasons.LAYERS),
    "use_dora": becomes("use_dora", is_true),
    "train_batch_size": becomes("batch_size"),
    "gradient_accumulation_steps": becomes("gradient_accumulation_steps"),
    "gradient_checkpointing": becomes("gradient_checkpointing", is_true),
    "num_train_epochs": computed(_take_epochs, "num_train_epochs", "max_train_steps"),
    "max_train_steps": becomes("max_train_steps"),
    "optimizer": computed(_take_optimizer, "optimizer"),
    "use_8bit_adam": computed(_take_eight_bits, "optimizer"),
    "scale_lr": told_with("learning_rate", "learning_rate"),
    "learning_rate": computed(_take_rate, "learning_rate"),
    "text_encoder_lr": computed(_take_text_rate, "text_encoder_lr"),
    "lr_scheduler": chosen("lr_scheduler", SCHEDULERS, reasons.NO_COURSE),
    "lr_warmup_steps": computed(_take_warmup, "lr_warmup_steps"),
    "lr_num_cycles": becomes("lr_num_cycles"),
    "lr_power": becomes("lr_power"),
    "adam_beta1": becomes("adam_beta1"),
    "adam_beta2": becomes("adam_beta2"),
    "adam_epsilon": becomes("adam_epsilon"),
    "adam_weight_decay": becomes("adam_weight_decay"),
    "adam_weight_decay_text_encoder": becomes("adam_weight_decay_text_encoder"),
    # The scripts read any text as true, also "False".
    "prodigy_decouple": needless(_BY_ITSELF),
    "prodigy_use_bias_correction": needless(_BY_ITSELF),
    "prodigy_safeguard_warmup": needless(_BY_ITSELF),
    "prodigy_beta3": becomes("prodigy_beta3"),
    "max_grad_norm": becomes("max_grad_norm"),
    "snr_gamma": becomes("snr_gamma", lambda gamma: gamma or None, only="table"),
    "noise_offset": becomes("noise_offset"),
    "offset_noise": switch("noise_offset", 0.1),
    "do_edm_style_training": without("the base model is trained as its schedule says"),
    "guidance_scale": becomes("guidance_scale", only="flow"),
    "weighting_scheme": computed(_take_schedule, "timestep_density", only="flow"),
    "logit_mean": becomes("logit_mean", _with_less_noise, only="flow"),
    "logit_std": becomes("logit_std", only="flow"),
    "mode_scale": becomes("mode_scale", only="flow"),
    "seed": becomes("seed"),
    "mixed_precision": chosen("mixed_precision", PRECISIONS, reasons.NO_NUMBERS),
    "upcast_before_saving": needless("files have the numbers of --save-dtype, fp32 by itself"),
    "allow_tf32": needless("is on in mixed precision; see --tf32"),
    "enable_xformers_memory_efficient_attention": needless(reasons.ATTENTION),
    "enable_npu_flash_attention": needless(reasons.ATTENTION),
    "set_grads_to_none": needless("gradients are given up after each step"),
    "offload": needless(reasons.MEMORY),
    "bnb_quantization_config_path": without(reasons.QUANTIZED),
    "do_fp8_training": without(reasons.QUANTIZED),
    "dataloader_num_workers": needless(reasons.WORKERS),
    "output_dir": computed(_take_output, "output_name"),
    "output_kohya_format": needless(reasons.FILES),
    "checkpointing_steps": becomes("checkpointing_steps"),
    "checkpoints_total_limit": becomes("checkpoints_total_limit"),
    "resume_from_checkpoint": needless(reasons.RESUMED),
    "logging_dir": needless(reasons.CURVES),
    "report_to": chosen(
        "wandb",
        {"wandb": True, "all": True, "tensorboard": False},
        reasons.TRACKERS,
    ),
    "validation_prompt": becomes("validation_prompts", lambda prompt: [str(prompt)]),
    "num_validation_images": needless("one picture of each prompt, always from the same noise"),
    "validation_epochs": computed(_take_validation_epochs, "sample_steps"),
    "validation_steps": becomes("sample_steps"),
    "validation_scheduler": needless("as the base model's pipeline"),
    "final_validation_prompt": needless("validation pictures are made after the last step, too"),
    "skip_final_inference": needless("validation pictures are made after the last step, too"),
    "validation_images": needless("pictures are made of prompts alone"),
    "local_rank": needless(_LAUNCH),
    "push_to_hub": needless(reasons.HUB),
    "hub_model_id": needless(reasons.HUB),
    "hub_token": secret(reasons.LOGIN),
}
