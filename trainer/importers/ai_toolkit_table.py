"""The options of an ai-toolkit job, each with what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.importers.ai_toolkit_network import (
    take_alpha,
    take_conv,
    take_network,
    take_rank,
    take_whole_rank,
)
from trainer.importers.desk import (
    Desk,
    Row,
    Table,
    becomes,
    chosen,
    computed,
    is_true,
    needless,
    told_with,
    without,
)
from trainer.importers.shared import (
    NO_PRECISION,
    NO_SCHEDULER,
    OPTIMIZER_LEAVES,
    PRECISIONS,
    SAVED,
    SCHEDULERS,
    take_optimizer,
)
from trainer.sections.running import DIFFUSERS_NAME

_LEGACY = "train.gradient_accumulation_steps"
# Its `linear` rises from a third, and has no counterpart.
_COURSES = {name: course for name, course in SCHEDULERS.items() if name != "linear"}
_TRIGGERS = ("[trigger]", "[name]")
# Resolutions of a data set that are all of those of a priority, for a base model of 1024 pixels.
_PRIORITIES: Mapping[tuple[int, ...], str] = {(512, 768, 1024): "quality"}
_WAYS: Mapping[str, tuple[str, Any]] = {
    "sigmoid": ("logit_normal", 1.0),
    "linear": ("uniform", 1.0),
    "flux_shift": ("uniform", None),
    "shift": ("uniform", None),
}
_QUANTIZED: Mapping[str, str] = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "uint4": "nf4"}


def with_trigger(text: str, trigger: Any) -> str:
    """A caption with the trigger in the places that are left for it, or in front."""
    word = str(trigger or "")
    for place in _TRIGGERS:
        text = text.replace(place, word)
    return text if not word or word in text else f"{word} {text}".strip()


def _take_resolution(desk: Desk, name: str, value: Any) -> None:
    """One size, or several that are a priority of the base model's own."""
    sizes = sorted({int(size) for size in (value if isinstance(value, list) else [value])})
    if tuple(sizes) in _PRIORITIES:
        desk.take(name, "priority", _PRIORITIES[tuple(sizes)])
        return
    if len(sizes) > 1:
        reason = f"one size, or those of --priority: the largest is taken, {sizes[-1]}"
        desk.leave(name, reason)
    desk.take(name, "resolution_width", sizes[-1])
    desk.take(name, "resolution_height", sizes[-1])


def _take_name(desk: Desk, name: str, value: Any) -> None:
    words = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "-" for c in str(value))
    words = words.strip("-. ")[:100]
    if words and words.lower() != DIFFUSERS_NAME:
        desk.take(name, "output_name", words)
    else:
        desk.leave(name, "cannot be the name of files: give --output-name", matters=False)


def _take_trigger(desk: Desk, name: str, value: Any) -> None:
    """The trigger stands in every caption there, and is put in where it lacks."""
    desk.take(name, "token_abstraction", [str(value)])
    desk.take(name, "add_trigger", True)


def accumulated(desk: Desk) -> float:
    """Forward passes of a step, where the program counts them as steps: its older option."""
    return max(1.0, desk.number(_LEGACY)) if _LEGACY in desk.given else 1.0


def _take_accumulation(desk: Desk, name: str, value: Any) -> None:
    if desk.number(name) < 1:
        desk.leave(name, "an epoch is no number of pictures: give --gradient-accumulation-steps")
        return
    desk.take(name, "gradient_accumulation_steps", value)
    if desk.number(name) > 1:
        desk.remarks.append(
            f"{name} counts every forward pass as a step there: counts of steps are divided by it."
        )


def _take_steps(leaf: str) -> Row:
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
            desk.remarks.append(
                "Every second step there is of class pictures; here they come beside each step, "
                "so all counts of steps are halved and the subject's are seen as often."
            )

    return computed(act, leaf)


def _take_times(desk: Desk, name: str, value: Any) -> None:
    way = str(value).lower()
    if way not in _WAYS:
        desk.leave(name, "is no way to draw times here; see --timestep-density")
        return
    density, shift = _WAYS[way]
    desk.take(name, "timestep_density", density)
    desk.take(name, "timestep_shift", shift)


def _take_quantized(desk: Desk, name: str, value: Any) -> None:
    kind = str(desk.setting("model.qtype") or "qfloat8").partition("|")[0].lower()
    if not is_true(value):
        desk.leave(name, "is off", matters=False)
    elif kind in _QUANTIZED:
        desk.take(name, "quantization", _QUANTIZED[kind])
    else:
        desk.leave(name, f"{kind} is not among --quantization: int8, fp8, nf4")


def _take_prompts(desk: Desk, name: str, value: Any) -> None:
    """Prompts as a list, or as a list of samples with options of their own."""
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    trigger = desk.setting("trigger_word")
    prompts = []
    for row in rows:
        said = row.get("prompt") if isinstance(row, Mapping) else row
        text = "" if said is None else str(said)
        for place in _TRIGGERS:
            text = text.replace(place, str(trigger or ""))
        prompts.append(text.strip())
    others = {key for row in rows if isinstance(row, Mapping) for key in map(str, row)} - {"prompt"}
    for key in sorted(others):
        desk.leave(f"{name}: {key}", "one value for all prompts", matters=False)
    if is_true(desk.setting("train.disable_sampling")):
        desk.leave(name, "train.disable_sampling is on", matters=False)
    elif any(prompts):
        desk.take(name, "validation_prompts", [prompt for prompt in prompts if prompt])


def _take_ema(desk: Desk, name: str, value: Any) -> None:
    if isinstance(value, Mapping) and is_true(value.get("use_ema")):
        desk.leave(name, "no running mean of the weights is kept: the last ones are delivered")
    else:
        desk.leave(name, "is off", matters=False)


def _take_rate(desk: Desk, name: str, value: Any) -> None:
    if "train.unet_lr" in desk.given:
        desk.leave(name, "train.unet_lr goes before it", matters=False)
    else:
        desk.take(name, "learning_rate", value)


def _take_scheduler_params(desk: Desk, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        desk.refuse(name, "options by name")
        return
    for key, inner in value.items():
        if key in ("num_warmup_steps", "warmup_steps"):
            warmup = float(inner)
            desk.take(name, "lr_warmup_steps", desk.lengths.steps(warmup) if warmup > 0 else inner)
        else:
            desk.leave(f"{name}: {key}", "the course has no such option", value=inner)


_SAMPLING = "validation pictures are made as the base model's pipeline makes them"
_KEPT = "what encoders make is kept on disk by itself, where pictures are not moved each time"
_MEMORY = "what fits is found by a forecast; see --offload-blocks"
_OUTPUT = "is `--output` on the command line of `trainer train`"
_HUB = "see --push-to-hub, which sends the finished files"
_CAPTIONS = "captions are taken as they are written"
_PLAIN = "pictures and noise are taken as they are"
_LOSS = "the loss is the mean of squares"
_MASKS = "put masks among the pictures: masks/NAME.png or NAME_mask.png"
_OTHER = "the base model is trained as it is published"

TABLE: Table = {
    "job": needless("`trainer train` is the job"),
    "meta": needless("changes only what is written about the file"),
    "name": computed(_take_name, "output_name"),
    "training_folder": needless(_OUTPUT),
    "sqlite_db_path": needless("the run folder has everything"),
    "performance_log_every": needless("`events.jsonl` has every step"),
    "device": needless("the GPU of this machine; CUDA_VISIBLE_DEVICES chooses"),
    "trigger_word": computed(_take_trigger, "token_abstraction", "add_trigger"),
    "network.type": computed(
        take_network, "lora_type", "use_dora", "use_lora", "target_unet_modules"
    ),
    "network.linear": computed(take_rank, "rank"),
    "network.rank": computed(take_rank, "rank"),
    "network.linear_alpha": computed(take_alpha, "alpha"),
    "network.alpha": computed(take_alpha, "alpha"),
    "network.conv": computed(take_conv),
    "network.conv_alpha": needless("an adapter has one alpha"),
    "network.lokr_full_rank": computed(take_whole_rank, "rank"),
    "network.lokr_factor": becomes("lokr_factor"),
    "network.dropout": without("adapters are trained whole"),
    "network.network_kwargs": without(
        "see --target-unet-modules", as_here=({}, {"ignore_if_contains": []})
    ),
    "network.transformer_only": without("adapters are on the blocks alone", as_here=(True, "true")),
    "save.dtype": chosen("save_dtype", SAVED, NO_PRECISION),
    "save.save_every": _take_steps("checkpointing_steps"),
    "save.max_step_saves_to_keep": becomes("checkpoints_total_limit"),
    "save.save_format": needless("files are written for diffusers and for kohya-style programs"),
    "save.push_to_hub": needless(_HUB),
    "save.hf_repo_id": needless(_HUB),
    "save.hf_private": needless(_HUB),
    "datasets.folder_path": told_with("images_data_url", "images_data_url", "concepts"),
    "datasets.dataset_path": told_with("images_data_url", "images_data_url"),
    "datasets.num_repeats": told_with("images_data_url", "concepts"),
    "datasets.default_caption": told_with("instance_prompt", "instance_prompt"),
    "datasets.trigger_word": told_with("token_abstraction", "token_abstraction"),
    "datasets.is_reg": told_with("class_images_url", "class_images_url", "class_prompt"),
    "datasets.caption_ext": without(
        "captions are read from .txt and .caption files: rename them",
        as_here=("txt", ".txt", "caption", ".caption"),
    ),
    "datasets.caption_dropout_rate": becomes("caption_dropout"),
    "datasets.token_dropout_rate": without("a caption is dropped as a whole; --caption-dropout"),
    "datasets.shuffle_tokens": without(_CAPTIONS),
    "datasets.keep_tokens": without(_CAPTIONS),
    "datasets.random_triggers": without(_CAPTIONS),
    "datasets.replacements": without(_CAPTIONS),
    "datasets.use_short_captions": without(_CAPTIONS),
    "datasets.cache_latents": needless(_KEPT),
    "datasets.cache_latents_to_disk": needless(_KEPT),
    "datasets.cache_text_embeddings": needless(_KEPT),
    "datasets.resolution": computed(
        _take_resolution, "resolution_width", "resolution_height", "priority"
    ),
    "datasets.buckets": becomes("enable_bucket", is_true),
    "datasets.bucket_tolerance": needless("sizes of buckets follow from the trained area"),
    "datasets.square_crop": without("see --enable-bucket false"),
    "datasets.scale": without("see --resolution-width", as_here=(1, 1.0)),
    "datasets.random_scale": without(_PLAIN),
    "datasets.random_crop": becomes("center_crop", lambda on: not is_true(on)),
    "datasets.flip_x": becomes("random_flip", is_true),
    "datasets.flip_y": without("pictures are mirrored left to right alone"),
    "datasets.augments": without(_PLAIN),
    "datasets.augmentations": without(_PLAIN),
    "datasets.shuffle_augmentations": without(_PLAIN),
    "datasets.alpha_mask": becomes("use_given_masks", is_true),
    "datasets.mask_path": without(_MASKS),
    "datasets.mask_min_value": without(_MASKS),
    "datasets.invert_mask": without(_MASKS),
    "datasets.control_path": without("pictures that guide are not trained with"),
    "datasets.inpaint_path": without("pictures that guide are not trained with"),
    "datasets.clip_image_path": without("pictures that guide are not trained with"),
    "datasets.unconditional_path": without("pictures that guide are not trained with"),
    "datasets.controls": without("pictures that guide are not trained with", as_here=([],)),
    "datasets.poi": without("see --face-aware-cropping"),
    "datasets.standardize_images": without(_PLAIN),
    "datasets.network_weight": without("every picture counts alike", as_here=(1, 1.0)),
    "datasets.loss_multiplier": without("every picture counts alike", as_here=(1, 1.0)),
    "datasets.num_workers": needless("see --num-workers, where latents are not cached"),
    "datasets.prefetch_factor": needless("see --num-workers"),
    "datasets.num_frames": without("pictures alone are trained", as_here=(1,)),
    "datasets.shrink_video_to_frames": needless("pictures alone are trained"),
    "datasets.do_i2v": needless("pictures alone are trained"),
    "datasets.fps": needless("pictures alone are trained"),
    "datasets.type": needless("pictures alone are trained"),
    "train.batch_size": becomes("batch_size"),
    "train.steps": _take_steps("max_train_steps"),
    "train.start_step": needless("the same command goes on by itself"),
    "train.gradient_accumulation": becomes("gradient_accumulation_steps"),
    "train.gradient_accumulation_steps": computed(
        _take_accumulation, "gradient_accumulation_steps"
    ),
    "train.train_unet": without("the denoiser always learns", as_here=(True, "true")),
    "train.train_text_encoder": becomes("train_text_encoder", is_true),
    "train.gradient_checkpointing": becomes("gradient_checkpointing", is_true),
    "train.noise_scheduler": needless("the schedule is that of the base model"),
    "train.num_train_timesteps": without("the schedule is that of the base model", as_here=(1000,)),
    "train.optimizer": computed(
        lambda desk, name, value: take_optimizer(
            desk, name, "train.optimizer_params", epsilon=1e-6
        ),
        *OPTIMIZER_LEAVES,
    ),
    "train.optimizer_params": told_with("train.optimizer", *OPTIMIZER_LEAVES),
    "train.lr": computed(_take_rate, "learning_rate"),
    "train.unet_lr": becomes("learning_rate"),
    "train.text_encoder_lr": becomes("text_encoder_lr"),
    "train.embedding_lr": without("new tokens learn at --text-encoder-lr"),
    "train.lr_scheduler": chosen("lr_scheduler", _COURSES, NO_SCHEDULER),
    "train.lr_scheduler_params": computed(_take_scheduler_params, "lr_warmup_steps"),
    "train.max_grad_norm": becomes("max_grad_norm"),
    "train.dtype": chosen("mixed_precision", PRECISIONS, NO_PRECISION),
    "train.ema_config": computed(_take_ema),
    "train.min_snr_gamma": becomes("snr_gamma", lambda gamma: gamma or None, only="table"),
    "train.snr_gamma": without("gamma as a weight alone: see min_snr_gamma"),
    "train.learnable_snr_gos": without("see min_snr_gamma"),
    "train.noise_offset": becomes("noise_offset"),
    "train.dynamic_noise_offset": without("the noise offset has one strength"),
    "train.content_or_style": without("see --timestep-density", as_here=("balanced",)),
    "train.timestep_type": computed(_take_times, "timestep_density", "timestep_shift", only="flow"),
    "train.linear_timesteps": without("see --timestep-density"),
    "train.linear_timesteps2": without("see --timestep-density"),
    "train.min_denoising_steps": without("see --min-timestep-trained"),
    "train.max_denoising_steps": without(
        "see --min-timestep-trained and --max-timestep-trained", as_here=(999, 1000)
    ),
    "train.bypass_guidance_embedding": without("the denoiser is told --guidance-scale, 1"),
    "train.loss_type": without(_LOSS, as_here=("mse",)),
    "train.loss_target": without(_LOSS, as_here=("noise",)),
    "train.reg_weight": becomes("prior_loss_weight"),
    "train.diff_output_preservation": without("see --with-prior-preservation"),
    "train.diff_output_preservation_multiplier": needless("belongs to diff_output_preservation"),
    "train.diff_output_preservation_class": needless("belongs to diff_output_preservation"),
    "train.blank_prompt_preservation": without("see --with-prior-preservation"),
    "train.inverted_mask_prior": without("see --with-prior-preservation"),
    "train.prompt_dropout_prob": without("see --caption-dropout"),
    "train.negative_prompt": without("captions alone are trained"),
    "train.skip_first_sample": needless("the base model's picture is always made first"),
    "train.force_first_sample": needless("the base model's picture is always made first"),
    "train.disable_sampling": needless("see sample.prompts"),
    "train.unload_text_encoder": needless(_MEMORY),
    "train.cache_text_embeddings": needless(_KEPT),
    "train.xformers": needless("attention is computed as is quickest; see --attention"),
    "train.sdp": needless("attention is computed as is quickest; see --attention"),
    "train.noise_multiplier": without(_PLAIN, as_here=(1, 1.0)),
    "train.img_multiplier": without(_PLAIN, as_here=(1, 1.0)),
    "train.latent_multiplier": without(_PLAIN, as_here=(1, 1.0)),
    "train.weight_jitter": without(_PLAIN),
    "train.merge_network_on_save": without("see `trainer generate` for pictures with the result"),
    "train.switch_boundary_every": needless("the base model has one part"),
    "model.name_or_path": becomes("model_url", str),
    "model.arch": needless("the checkpoint tells what it is"),
    "model.is_flux": needless("the checkpoint tells what it is"),
    "model.is_xl": needless("the checkpoint tells what it is"),
    "model.is_v2": without("Stable Diffusion 2 is not among the base models here"),
    "model.is_v3": without("Stable Diffusion 3 is not among the base models here"),
    "model.is_v_pred": without("what the base model predicts is read from its schedule"),
    "model.quantize": computed(_take_quantized, "quantization"),
    "model.qtype": needless("see model.quantize"),
    "model.quantize_te": needless("text encoders that do not learn leave the GPU before training"),
    "model.qtype_te": needless("text encoders that do not learn leave the GPU before training"),
    "model.quantize_kwargs": needless("see --quantization"),
    "model.low_vram": needless(_MEMORY),
    "model.layer_offloading": needless(_MEMORY),
    "model.dtype": needless("frozen weights have the numbers of --mixed-precision"),
    "model.vae_dtype": needless("see --upscale-vae-32bit"),
    "model.te_dtype": needless("frozen weights have the numbers of --mixed-precision"),
    "model.vae_path": becomes("vae_url", str),
    "model.te_name_or_path": without(_OTHER),
    "model.extras_name_or_path": without(_OTHER),
    "model.unet_path": without(_OTHER),
    "model.assistant_lora_path": without(_OTHER),
    "model.inference_lora_path": without(_OTHER),
    "model.lora_path": without("merge it into the base model, and give that as model_url"),
    "model.refiner_name_or_path": without(_OTHER),
    "model.accuracy_recovery_adapter": without(_OTHER),
    "model.attn_masking": without("padding is read, as the base model's pipeline does"),
    "model.compile": needless("blocks are compiled where that is worth it; see --compile-blocks"),
    "model.model_kwargs": without(_OTHER, as_here=({},)),
    "model.split_model_over_gpus": without("several GPUs: see docs/processes.md"),
    "sample.prompts": computed(_take_prompts, "validation_prompts"),
    "sample.samples": computed(_take_prompts, "validation_prompts"),
    "sample.sample_every": _take_steps("sample_steps"),
    "sample.sample_steps": becomes("sample_inference_steps"),
    "sample.guidance_scale": becomes("sample_guidance_scale"),
    **{
        f"sample.{name}": needless(_SAMPLING)
        for name in (
            *("sampler", "width", "height", "neg", "seed", "walk_seed", "format", "ext"),
            *("network_multiplier", "guidance_rescale", "num_frames", "fps"),
        )
    },
    "logging.use_wandb": becomes("wandb", is_true),
    "logging.log_every": needless("`events.jsonl` has every step"),
    "logging.verbose": needless("`events.jsonl` has everything"),
    "logging.use_ui_logger": needless("`trainer serve` shows every training"),
    "logging.project_name": needless("changes only what is written about the run"),
    "logging.run_name": needless("changes only what is written about the run"),
}
