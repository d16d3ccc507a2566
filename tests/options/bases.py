"""Leaves that several rows start from."""

from __future__ import annotations

from options.matrix import Leaves, Place

UNCACHED: Leaves = {"cache_latents": False}
# Hardly any noise: the latents can be told from what the denoiser is given.
CLEAN: Leaves = {"max_timestep_trained": 5}
LUMINANCE: Leaves = {"segmenter": "luminance", "clip_seg_mask_prompt": "head", **UNCACHED}
CLIPSEG: Leaves = {
    "segmenter": "clipseg",
    "clipseg_url": Place("clipseg"),
    "clip_seg_mask_prompt": "head",
    **UNCACHED,
}
# Pictures of people, and a detector that finds them.
FACES: Leaves = {
    "images_data_url": Place("people"),
    "face_detector_path": Place("squares"),
    **UNCACHED,
}
CAPTIONED: Leaves = {
    "skip_caption_generation": False,
    "captioner": Place("captioner"),
    **UNCACHED,
}
PRIOR: Leaves = {
    "with_prior_preservation": True,
    "photo_class": "Man",
    "class_images_url": Place("class pictures"),
}
TOKENS: Leaves = {"train_text_encoder_ti": True, "token_retraction": 0.0}
TEXT: Leaves = {"train_text_encoder": True}
