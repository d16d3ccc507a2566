"""Rows about values that no option takes: named with what is allowed, before any model is read."""

from __future__ import annotations

from options.bases import PRIOR, UNCACHED
from options.matrix import FLOW, refused

NOT_TAKEN = [
    refused("images_data_url", {"images_data_url": ...}, "no training pictures are given"),
    refused("images_data_url", {"images_data_url": "/nowhere"}, "/nowhere"),
    refused("captions_file_url", {"captions_file_url": "/nowhere.jsonl"}, "/nowhere.jsonl"),
    refused("instance_prompt", {"instance_prompt": ""}, "not empty"),
    refused("caption_dropout", {"caption_dropout": 1.1}, "at most 1"),
    refused("resolution_width", {"resolution_width": 770}, "a multiple of 8"),
    refused("resolution_height", {"resolution_height": 770}, "a multiple of 8"),
    *[
        refused(leaf, {leaf: 72}, "a multiple of 16", families=FLOW)
        for leaf in ("resolution_width", "resolution_height")
    ],
    refused("random_crop_offset_x", {"random_crop_offset_x": -1}, "at least 0"),
    refused("random_crop_offset_y", {"random_crop_offset_y": -1}, "at least 0"),
    refused(
        "random_rotation_start",
        {"random_rotation_start": 3, "random_rotation_end": 2},
        "the smallest rotation is at most the largest",
    ),
    refused("random_rotation_end", {"random_rotation_end": 181}, "at most 180"),
    refused(
        "center_crop",
        {"center_crop": False, "cache_latents": True},
        "a cached latent shows one fixed window",
    ),
    refused(
        "center_crop",
        {"face_aware_cropping": True, "center_crop": True},
        "in the middle or over the face",
        base=UNCACHED,
    ),
    refused("clip_seg_mask_temperature", {"clip_seg_mask_temperature": 0.0}, "above 0"),
    refused("clip_seg_mask_bias", {"clip_seg_mask_bias": 1.5}, "at most 1"),
    refused("class_image_mask_style", {"class_image_mask_style": "soft"}, "none, normal, invert"),
    refused("token_abstraction", {"token_abstraction": "TOK, TOK"}, "each identifier once"),
    refused("num_new_tokens_per_abstraction", {"num_new_tokens_per_abstraction": 0}, "at least 1"),
    refused("train_text_encoder_ti_frac", {"train_text_encoder_ti_frac": 0.0}, "above 0"),
    refused("train_text_encoder_frac", {"train_text_encoder_frac": 0.0}, "above 0"),
    refused("rank", {"rank": 0}, "at least 1"),
    refused("lora_type", {"lora_type": "locon"}, "lora, lokr, loha"),
    refused("prior_loss_weight", {"prior_loss_weight": -0.5}, "at least 0", base=PRIOR),
    refused("photo_class", {"photo_class": "Dog"}, "Man, Woman, Person, Boy, Girl, Baby"),
    refused("snr_gamma", {"snr_gamma": -1.0}, "at least 0"),
    refused("noise_offset", {"noise_offset": -0.1}, "at least 0"),
    refused("max_timestep_trained", {"max_timestep_trained": 1001}, "at most 1000"),
    refused("learning_rate", {"learning_rate": 0.0}, "above 0"),
    refused("adam_beta1", {"adam_beta1": 1.0}, "below 1"),
    refused("adam_beta2", {"adam_beta2": 1.0}, "below 1"),
    refused("adam_epsilon", {"adam_epsilon": 0.0}, "above 0"),
    refused("adam_weight_decay", {"adam_weight_decay": -1.0}, "at least 0"),
    refused("prodigy_beta3", {"prodigy_beta3": 1.0}, "below 1"),
    refused("lr_num_cycles", {"lr_num_cycles": 0}, "at least 1"),
    refused("lr_power", {"lr_power": 0.0}, "above 0"),
    refused("lr_warmup_steps", {"lr_warmup_steps": -1}, "at least 0"),
    refused("max_grad_norm", {"max_grad_norm": -1.0}, "at least 0"),
    refused("seed", {"seed": 2**32}, "at most 4294967295"),
    refused("max_train_steps", {"max_train_steps": 0}, "at least 1"),
    refused("num_train_epochs", {"num_train_epochs": 0}, "at least 1"),
    refused("batch_size", {"batch_size": 0}, "at least 1"),
    refused("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}, "at least 1"),
    refused("data_archive_format", {"data_archive_format": "rar"}, "zip, tar, tar.gz"),
]
