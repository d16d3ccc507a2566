"""The options of an ai-toolkit job, each with what becomes of it."""

from __future__ import annotations

from trainer.importers import reasons
from trainer.importers.ai_toolkit_network import (
    OTHER_MODELS,
    take_alpha,
    take_conv,
    take_conv_alpha,
    take_network,
    take_rank,
    take_whole_rank,
)
from trainer.importers.ai_toolkit_rows import (
    steps_of,
    take_accumulation,
    take_course_options,
    take_file_name,
    take_kind_of_model,
    take_mean,
    take_prompts,
    take_quantized,
    take_rate,
    take_resolution,
    take_text_rate,
    take_times,
    take_trigger,
    take_weighted_times,
)
from trainer.importers.desk import Table
from trainer.importers.optimizers import OPTIMIZER_LEAVES, SCHEDULERS, take_optimizer
from trainer.importers.rows import (
    becomes,
    belonging,
    chosen,
    computed,
    is_true,
    needless,
    placed,
    told_with,
    without,
)
from trainer.importers.words import PRECISIONS, SAVED

# Its `linear` rises from a third, and has no counterpart.
_COURSES = {name: course for name, course in SCHEDULERS.items() if name != "linear"}
_ALIKE = "every picture counts alike"
_NAMES = "changes only what is written about the run"
_PICTURES = "pictures alone are trained"
_PLAIN = "pictures and noise are taken as they are"
_PRIOR = "what the base model knows is kept by class pictures: see --with-prior-preservation"

# What even times are by here.
_EVEN_TIMES = ("timestep_density", "timestep_shift")
TABLE: Table = {
    "job": needless("`trainer train` is the job"),
    "meta": needless(_NAMES),
    "name": computed(take_file_name, "output_name"),
    "training_folder": needless(reasons.OUTPUT),
    "sqlite_db_path": needless("the run folder has everything"),
    "performance_log_every": needless(reasons.LOGS),
    "device": needless("the GPU of this machine; CUDA_VISIBLE_DEVICES chooses"),
    "embedding": without("new words are learnt by --train-text-encoder-ti, see docs/methods.md"),
    "adapter": without("adapters for pictures that guide are not trained"),
    "trigger_word": computed(take_trigger, "token_abstraction", "add_trigger"),
    "network.type": computed(
        take_network, "lora_type", "use_dora", "use_lora", "target_unet_modules"
    ),
    "network.linear": computed(take_rank, "rank"),
    "network.rank": computed(take_rank, "rank"),
    "network.linear_alpha": computed(take_alpha, "alpha"),
    "network.alpha": computed(take_alpha, "alpha"),
    "network.conv": computed(take_conv),
    "network.conv_alpha": computed(take_conv_alpha),
    "network.lokr_full_rank": computed(take_whole_rank, "rank"),
    "network.lokr_factor": becomes("lokr_factor"),
    "network.dropout": without(reasons.DROPOUT),
    "network.network_kwargs": without(reasons.LAYERS, as_here=({}, {"ignore_if_contains": []})),
    "network.transformer_only": without("adapters are on the blocks alone", as_here=(True,)),
    "save.dtype": chosen("save_dtype", SAVED, reasons.NO_NUMBERS),
    "save.save_every": steps_of("checkpointing_steps"),
    "save.max_step_saves_to_keep": becomes("checkpoints_total_limit"),
    "save.save_format": needless(reasons.FILES),
    "save.push_to_hub": needless(reasons.HUB),
    "save.hf_repo_id": needless(reasons.HUB),
    "save.hf_private": needless(reasons.HUB),
    "datasets.folder_path": placed("images_data_url", "concepts"),
    "datasets.dataset_path": told_with("concepts", "concepts", "images_data_url"),
    "datasets.num_repeats": told_with("concepts", "concepts"),
    "datasets.default_caption": told_with("concepts", "concepts", "instance_prompt"),
    "datasets.trigger_word": told_with("concepts", "concepts", "token_abstraction"),
    "datasets.is_reg": told_with("concepts", "concepts", "with_prior_preservation", "class_prompt"),
    "datasets.caption_ext": without(
        reasons.EXTENSION,
        as_here=("txt", ".txt", "caption", ".caption"),
    ),
    "datasets.caption_dropout_rate": becomes("caption_dropout"),
    "datasets.token_dropout_rate": without(reasons.CAPTIONS_DROPPED),
    "datasets.shuffle_tokens": without(reasons.CAPTIONS),
    "datasets.keep_tokens": belonging(
        reasons.CAPTIONS, "datasets.shuffle_tokens", "datasets.token_dropout_rate"
    ),
    "datasets.random_triggers": without(reasons.CAPTIONS),
    "datasets.replacements": without(reasons.CAPTIONS),
    "datasets.use_short_captions": without(reasons.CAPTIONS),
    "datasets.cache_latents": needless(reasons.KEPT),
    "datasets.cache_latents_to_disk": needless(reasons.KEPT),
    "datasets.cache_text_embeddings": needless(reasons.KEPT),
    "datasets.resolution": computed(
        take_resolution, "resolution_width", "resolution_height", "priority"
    ),
    "datasets.buckets": becomes("enable_bucket", is_true),
    "datasets.bucket_tolerance": needless(reasons.SQUEEZED),
    "datasets.square_crop": without("pictures are cut square where --enable-bucket is false"),
    "datasets.scale": without(
        "pictures come to the trained size: see --resolution-width", as_here=(1,)
    ),
    "datasets.random_scale": without(_PLAIN),
    "datasets.random_crop": becomes("center_crop", lambda on: not is_true(on)),
    "datasets.flip_x": becomes("random_flip", is_true),
    "datasets.flip_y": without("pictures are mirrored left to right alone"),
    "datasets.augments": without(_PLAIN),
    "datasets.augmentations": without(_PLAIN),
    "datasets.shuffle_augmentations": without(_PLAIN),
    "datasets.alpha_mask": becomes("use_given_masks", is_true),
    "datasets.mask_path": without(reasons.MASKS),
    "datasets.mask_min_value": belonging(reasons.MASKS, "datasets.mask_path"),
    "datasets.invert_mask": belonging(reasons.MASKS, "datasets.mask_path"),
    "datasets.control_path": without(reasons.GUIDES),
    "datasets.inpaint_path": without(reasons.GUIDES),
    "datasets.clip_image_path": without(reasons.GUIDES),
    "datasets.unconditional_path": without(reasons.GUIDES),
    "datasets.controls": without(reasons.GUIDES, as_here=([],)),
    "datasets.poi": without("windows lie in the middle; see --face-aware-cropping"),
    "datasets.standardize_images": without(_PLAIN),
    "datasets.network_weight": without(_ALIKE, as_here=(1,)),
    "datasets.loss_multiplier": without(_ALIKE, as_here=(1,)),
    "datasets.num_workers": needless(reasons.WORKERS),
    "datasets.prefetch_factor": needless(reasons.WORKERS),
    "datasets.num_frames": without(_PICTURES, as_here=(1,)),
    "datasets.shrink_video_to_frames": needless(_PICTURES),
    "datasets.do_i2v": needless(_PICTURES),
    "datasets.fps": needless(_PICTURES),
    "datasets.type": needless(_PICTURES),
    "train.batch_size": becomes("batch_size"),
    "train.steps": steps_of("max_train_steps"),
    "train.start_step": needless(reasons.RESUMED),
    "train.gradient_accumulation": becomes("gradient_accumulation_steps"),
    "train.gradient_accumulation_steps": computed(take_accumulation, "gradient_accumulation_steps"),
    "train.train_unet": without(reasons.DENOISER, as_here=(True,)),
    "train.train_text_encoder": becomes("train_text_encoder", is_true),
    "train.gradient_checkpointing": becomes("gradient_checkpointing", is_true),
    "train.noise_scheduler": needless(reasons.SCHEDULE),
    "train.num_train_timesteps": without(reasons.SCHEDULE, as_here=(1000,)),
    "train.optimizer": computed(
        lambda desk, name, value: take_optimizer(
            desk, name, "train.optimizer_params", epsilon=1e-6
        ),
        *OPTIMIZER_LEAVES,
    ),
    "train.optimizer_params": told_with("train.optimizer", *OPTIMIZER_LEAVES),
    "train.lr": computed(take_rate, "learning_rate", "text_encoder_lr"),
    "train.unet_lr": becomes("learning_rate"),
    "train.text_encoder_lr": computed(take_text_rate, "text_encoder_lr"),
    "train.embedding_lr": without("new tokens learn at --text-encoder-lr"),
    "train.lr_scheduler": chosen("lr_scheduler", _COURSES, reasons.NO_COURSE),
    "train.lr_scheduler_params": computed(take_course_options, "lr_warmup_steps"),
    "train.max_grad_norm": becomes("max_grad_norm"),
    "train.dtype": chosen("mixed_precision", PRECISIONS, reasons.NO_NUMBERS),
    "train.ema_config": computed(take_mean),
    "train.min_snr_gamma": becomes("snr_gamma", lambda gamma: gamma or None, only="table"),
    "train.snr_gamma": without(reasons.WEIGHED),
    "train.learnable_snr_gos": without(reasons.WEIGHED),
    "train.noise_offset": becomes("noise_offset"),
    "train.dynamic_noise_offset": without(reasons.ONE_OFFSET),
    "train.content_or_style": without(
        "times are drawn for both; see --timestep-density", as_here=("balanced",)
    ),
    "train.timestep_type": computed(take_times, "timestep_density", "timestep_shift", only="flow"),
    "train.linear_timesteps": computed(take_weighted_times, *_EVEN_TIMES),
    "train.linear_timesteps2": computed(take_weighted_times, *_EVEN_TIMES),
    "train.min_denoising_steps": without(
        "steps are counted from the most noise there: see --max-timestep-trained"
    ),
    "train.max_denoising_steps": without(
        "steps are counted from the most noise there: see --min-timestep-trained",
        as_here=(999, 1000),
    ),
    "train.bypass_guidance_embedding": without(
        "a guided denoiser is always told a guidance: --guidance-scale, 1"
    ),
    "train.loss_type": without(reasons.LOSS, as_here=("mse",)),
    "train.loss_target": without(reasons.LOSS, as_here=("noise",)),
    "train.reg_weight": becomes("prior_loss_weight"),
    "train.diff_output_preservation": without(_PRIOR),
    "train.diff_output_preservation_multiplier": needless("belongs to diff_output_preservation"),
    "train.diff_output_preservation_class": needless("belongs to diff_output_preservation"),
    "train.blank_prompt_preservation": without(_PRIOR),
    "train.blank_prompt_preservation_multiplier": needless("belongs to blank_prompt_preservation"),
    "train.inverted_mask_prior": without(_PRIOR),
    "train.inverted_mask_prior_multiplier": needless("belongs to inverted_mask_prior"),
    "train.prompt_dropout_prob": without(reasons.CAPTIONS_DROPPED),
    "train.negative_prompt": without("captions alone are trained"),
    "train.skip_first_sample": needless(reasons.FIRST_PICTURE),
    "train.force_first_sample": needless(reasons.FIRST_PICTURE),
    "train.disable_sampling": needless("no prompts are taken over"),
    "train.unload_text_encoder": needless(reasons.MEMORY),
    "train.cache_text_embeddings": needless(reasons.KEPT),
    "train.xformers": needless(reasons.ATTENTION),
    "train.sdp": needless(reasons.ATTENTION),
    "train.noise_multiplier": without(_PLAIN, as_here=(1,)),
    "train.img_multiplier": without(_PLAIN, as_here=(1,)),
    "train.latent_multiplier": without(_PLAIN, as_here=(1,)),
    "train.weight_jitter": without(_PLAIN),
    "train.merge_network_on_save": without("the adapter is delivered by itself"),
    **{
        f"train.{name}": without(_PLAIN)
        for name in (
            *(
                "adaptive_scaling_factor",
                "match_noise_norm",
                "correct_pred_norm",
                "standardize_images",
            ),
            *("standardize_latents", "random_noise_multiplier", "random_noise_shift"),
            *("force_consistent_noise", "blended_blur_noise", "target_norm_std"),
        )
    },
    **{
        f"train.{name}": without(_PLAIN, as_here=(1,))
        for name in (
            *("target_noise_multiplier", "noisy_latent_multiplier", "pred_scaler"),
            "optimal_noise_pairing_samples",
        )
    },
    **{
        f"train.{name}": without(reasons.LOSS)
        for name in (
            *("do_cfg", "do_random_cfg", "do_guidance_loss", "do_prior_divergence", "train_turbo"),
            *("do_differential_guidance", "diffusion_feature_extractor_path"),
            "latent_feature_extractor_path",
        )
    },
    "train.short_and_long_captions": without("a picture has one caption"),
    "train.single_item_batching": needless("a batch is computed at once"),
    "train.do_paramiter_swapping": without("everything learns in every step"),
    "train.switch_boundary_every": needless("the base model has one part"),
    "model.name_or_path": becomes("model_url", str),
    "model.arch": computed(take_kind_of_model),
    "model.is_flux": needless(reasons.CHECKPOINT),
    "model.is_xl": needless(reasons.CHECKPOINT),
    **{f"model.{name}": computed(take_kind_of_model) for name in OTHER_MODELS},
    "model.is_v_pred": without(reasons.PREDICTION),
    "model.quantize": computed(take_quantized, "quantization"),
    "model.qtype": needless("see model.quantize"),
    "model.quantize_te": needless("text encoders that do not learn leave the GPU before training"),
    "model.qtype_te": needless("text encoders that do not learn leave the GPU before training"),
    "model.quantize_kwargs": needless(reasons.QUANTIZED),
    "model.low_vram": needless(reasons.MEMORY),
    "model.layer_offloading": needless(reasons.MEMORY),
    "model.dtype": needless("frozen weights have the numbers of --mixed-precision"),
    "model.vae_dtype": needless("see --upscale-vae-32bit"),
    "model.te_dtype": needless("frozen weights have the numbers of --mixed-precision"),
    "model.vae_path": becomes("vae_url", str),
    "model.te_name_or_path": without(reasons.PUBLISHED),
    "model.extras_name_or_path": without(reasons.PUBLISHED),
    "model.unet_path": without(reasons.PUBLISHED),
    "model.assistant_lora_path": without(
        "no adapter is laid under a distilled base model while it trains: better take one that is "
        "not distilled"
    ),
    "model.inference_lora_path": needless(reasons.SAMPLING),
    "model.lora_path": without("merge it into the base model, and give that as model_url"),
    "model.refiner_name_or_path": needless(reasons.SAMPLING),
    "model.accuracy_recovery_adapter": without(reasons.PUBLISHED),
    "model.attn_masking": without("padding is read, as the base model's pipeline does"),
    "model.compile": needless(reasons.COMPILED),
    "model.model_kwargs": without(reasons.PUBLISHED, as_here=({},)),
    "model.split_model_over_gpus": without(reasons.GPUS),
    "sample.prompts": computed(take_prompts, "validation_prompts"),
    "sample.samples": computed(take_prompts, "validation_prompts"),
    "sample.sample_every": steps_of("sample_steps"),
    "sample.sample_steps": becomes("sample_inference_steps"),
    "sample.guidance_scale": becomes("sample_guidance_scale"),
    **{
        f"sample.{name}": needless(reasons.SAMPLING)
        for name in (
            *("sampler", "width", "height", "neg", "seed", "walk_seed", "format", "ext"),
            *("network_multiplier", "guidance_rescale", "num_frames", "fps", "sample_start_step"),
            *("adapter_conditioning_scale", "refiner_start_at", "extra_values"),
        )
    },
    "logging.use_wandb": becomes("wandb", is_true),
    "logging.log_every": needless(reasons.LOGS),
    "logging.verbose": needless(reasons.LOGS),
    "logging.use_ui_logger": needless("`trainer serve` shows every training"),
    "logging.project_name": needless(_NAMES),
    "logging.run_name": needless(_NAMES),
}
