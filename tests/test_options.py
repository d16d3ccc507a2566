"""Every option acts: for each leaf the tests that show its effect, or why it has none yet.

A leaf stands in exactly one of the three tables. That the named tests exist, that the refused
leaves are refused and that the sleeping ones are reported as ignored is checked here.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import configuration, steps, train

from trainer.config import LEAVES
from trainer.events import StepEvent
from trainer.resolve import Layer, resolve
from trainer.rules import NOT_AVAILABLE_YET

TESTS = Path(__file__).parent

# Leaf: the tests that show what it does, as `module::function` below this folder.
SHOWN = {
    # model
    "model_url": "test_effects::test_another_base_model_gives_another_adapter",
    "model_family": "test_base_model::test_a_contradicting_family_is_refused",
    "single_file_config": "test_base_model::test_one_file_holds_the_same_model_as_the_folder",
    "revision": "test_base_model::test_a_revision_of_the_hub_is_the_one_that_is_loaded",
    "variant": "test_base_model::test_the_variant_decides_which_weights_are_loaded",
    "vae_url": "test_vae::test_an_explicit_vae_of_the_same_latent_space_is_used",
    "upscale_vae_32bit": (
        "test_effects::test_upscale_vae_32bit_decides_the_precision_of_the_latents"
    ),
    # data
    "images_data_url": "data/test_archive::test_every_archive_gives_the_same_entries_as_the_folder",
    "captions_file_url": (
        "data/test_captions::test_rows_are_matched_by_name_whatever_their_order",
        "data/test_captions::test_without_captions_every_picture_gets_the_instance_prompt",
    ),
    "caption_column": "data/test_captions::test_caption_column_chooses_the_key",
    "instance_prompt": (
        "test_effects::test_each_picture_goes_with_its_own_caption_and_the_prompt_with_the_others"
    ),
    "skip_caption_generation": (
        "data/test_captions"
        "::test_a_picture_without_caption_is_refused_where_captions_should_be_generated"
    ),
    "caption_dropout": (
        "test_effects::test_a_dropped_caption_is_the_encoded_empty_one",
        "data/test_dataset::test_caption_dropout_empties_its_share_of_the_captions",
    ),
    "resolution_width": (
        "test_effects"
        "::test_resolution_is_the_size_of_the_latents_and_height_comes_first_in_the_time_ids",
        "data/test_prepare::test_resolution_width_and_height_decide_the_prepared_size",
    ),
    "resolution_height": (
        "test_effects"
        "::test_resolution_is_the_size_of_the_latents_and_height_comes_first_in_the_time_ids",
        "data/test_prepare::test_resolution_width_and_height_decide_the_prepared_size",
    ),
    "center_crop": (
        "data/test_dataset::test_center_crop_shows_the_middle_window_every_time",
        "data/test_dataset::test_without_center_crop_the_window_is_drawn_anew_each_time",
    ),
    "random_flip": (
        "data/test_dataset::test_random_flip_mirrors_half_of_the_uses_of_the_same_picture",
        "data/test_dataset::test_without_random_flip_nothing_is_mirrored",
        "test_effects::test_a_flipped_picture_reaches_the_denoiser_both_ways_also_from_the_cache",
    ),
    "random_crop_offset_x": (
        "data/test_dataset::test_a_crop_offset_moves_the_window_along_its_axis_only"
    ),
    "random_crop_offset_y": (
        "data/test_dataset::test_a_crop_offset_moves_the_window_along_its_axis_only"
    ),
    # What a cache spares is work; what it must not do is change a loss.
    "cache_latents": "test_effects::test_conveniences_do_not_change_the_losses",
    # adapter
    "use_lora": (
        "test_engine::test_the_base_model_is_untouched_by_an_adapter_and_changed_without_one"
    ),
    "lora_type": ("test_engine::test_every_form_trains_and_its_files_give_back_the_trained_model"),
    "use_dora": "test_effects::test_bf16_keeps_trained_weights_in_32_bits_and_moves_magnitudes",
    "rank": "test_effects::test_rank_alpha_and_targets_shape_the_exported_adapter",
    "alpha": "test_effects::test_alpha_scales_what_the_adapter_adds",
    "lokr_factor": "test_options::test_lokr_factor_is_the_size_of_the_small_factor",
    "target_unet_modules": ("test_effects::test_rank_alpha_and_targets_shape_the_exported_adapter"),
    # loss
    "snr_gamma": (
        "test_effects::test_snr_gamma_weights_the_loss_by_gamma_over_snr",
        "test_loss::test_epsilon_weights_are_gamma_over_snr_capped_at_one",
    ),
    "noise_offset": ("test_effects::test_noise_offset_shifts_whole_channels_of_the_noisy_latents"),
    "min_timestep_trained": "test_effects::test_timesteps_stay_inside_their_bounds",
    "max_timestep_trained": "test_effects::test_timesteps_stay_inside_their_bounds",
    # optim
    "optimizer": (
        "test_optim::test_adamw_takes_the_papers_steps",
        "test_optim::test_adamw8bit_keeps_its_state_in_bytes",
        "test_optim::test_prodigy_takes_prodigyopts_steps",
    ),
    "learning_rate": "test_effects::test_the_first_adamw_step_moves_b_by_the_learning_rate",
    "lr_scheduler": (
        "test_optim::test_schedules_follow_their_closed_forms",
        "test_effects::test_the_learning_rate_follows_its_schedule_step_by_step",
    ),
    "lr_warmup_steps": "test_effects::test_the_learning_rate_follows_its_schedule_step_by_step",
    "lr_num_cycles": ("test_optim::test_restarts_jump_to_the_peak_once_less_than_there_are_cycles"),
    "lr_power": ("test_optim::test_polynomial_at_half_time_is_the_rate_times_half_to_the_power"),
    "adam_beta1": "test_optim::test_adamw_takes_the_papers_steps",
    "adam_beta2": "test_optim::test_adamw_takes_the_papers_steps",
    "adam_epsilon": (
        "test_optim::test_a_large_epsilon_shortens_the_first_step_to_g_over_g_plus_one"
    ),
    "adam_weight_decay": (
        "test_effects::test_weight_decay_shrinks_a_which_has_no_gradient_at_first"
    ),
    "prodigy_beta3": "test_optim::test_each_prodigy_option_changes_the_steps",
    "prodigy_decouple": "test_optim::test_prodigys_decoupled_decay_leaves_the_moments_alone",
    "prodigy_use_bias_correction": (
        "test_optim::test_prodigys_bias_correction_scales_the_first_step_by_its_term"
    ),
    "prodigy_safeguard_warmup": (
        "test_optim::test_prodigys_safeguard_keeps_a_low_rate_out_of_its_estimate"
    ),
    "max_grad_norm": (
        "test_options::test_half_the_largest_norm_halves_the_step",
        "test_optim::test_zero_and_a_large_norm_leave_gradients_untouched",
    ),
    # run
    "seed": (
        "test_engine::test_the_same_seed_gives_the_same_bytes",
        "test_engine::test_another_seed_gives_another_adapter",
    ),
    "max_train_steps": "data/test_plan::test_without_epochs_max_train_steps_is_the_number_of_steps",
    "num_train_epochs": "test_effects::test_epochs_decide_the_number_of_steps",
    "batch_size": ("test_effects::test_batch_size_is_the_number_of_latents_in_a_forward_pass"),
    "gradient_accumulation_steps": (
        "test_effects::test_accumulated_small_batches_train_like_one_large_batch"
    ),
    "mixed_precision": (
        "test_effects::test_bf16_keeps_trained_weights_in_32_bits_and_moves_magnitudes",
        "test_effects::test_fp16_on_a_processor_is_refused",
    ),
    "gradient_checkpointing": (
        "test_estimate::test_settings_that_save_memory_lower_the_estimate",
        "test_effects::test_conveniences_do_not_change_the_losses",
    ),
    "num_workers": (
        "data/test_dataset::test_the_number_of_workers_changes_nothing",
        "test_effects::test_conveniences_do_not_change_the_losses",
    ),
    "checkpointing_steps": "test_engine::test_checkpoints_are_published_and_pruned_on_the_way",
    "checkpoints_total_limit": (
        "test_engine::test_checkpoints_are_published_and_pruned_on_the_way"
    ),
    "tensorboard": "test_listeners::test_tensorboard_is_on_unless_it_is_switched_off",
    "wandb": "test_listeners::test_wandb_is_asked_for_before_anything_is_written",
    # output
    "output_name": "test_options::test_the_output_options_decide_names_and_number_formats",
    "save_dtype": "test_options::test_the_output_options_decide_names_and_number_formats",
    "kohya_dora": "test_options::test_the_output_options_decide_names_and_number_formats",
}

# Leaves whose machinery is not there yet: asking for it is an error that names it.
REFUSED = {
    "face_aware_cropping",
    "random_rotation_start",
    "random_rotation_end",
    "clip_seg_mask_prompt",
    "train_text_encoder_ti",
    "train_text_encoder",
    "with_prior_preservation",
    "debug_dataset",
    "debug_loss_masks",
}

# Leaf: the refused ones that it belongs to. Until they come it is reported as ignored.
ASLEEP = {
    "clip_seg_mask_temperature": {"clip_seg_mask_prompt"},
    "clip_seg_mask_bias": {"clip_seg_mask_prompt"},
    "class_image_mask_style": {"clip_seg_mask_prompt", "with_prior_preservation"},
    "token_abstraction": {"train_text_encoder_ti"},
    "num_new_tokens_per_abstraction": {"train_text_encoder_ti"},
    "train_text_encoder_ti_frac": {"train_text_encoder_ti"},
    "disable_unet_during_ti_training": {"train_text_encoder_ti"},
    "train_text_encoder_frac": {"train_text_encoder"},
    "target_text_encoder_modules": {"train_text_encoder"},
    "text_encoder_lr": {"train_text_encoder", "train_text_encoder_ti"},
    "adam_weight_decay_text_encoder": {"train_text_encoder", "train_text_encoder_ti"},
    "prior_loss_weight": {"with_prior_preservation"},
    "photo_class": {"with_prior_preservation"},
    "data_archive_format": {"debug_dataset", "debug_loss_masks"},
}


@cache
def functions_of(module: str) -> set[str]:
    """The test functions that stand in a file."""
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_option_stands_in_exactly_one_table(leaf: str) -> None:
    assert [leaf in SHOWN, leaf in REFUSED, leaf in ASLEEP].count(True) == 1


def test_no_table_names_an_option_that_is_gone() -> None:
    assert len(LEAVES) > 60
    assert {*SHOWN, *REFUSED, *ASLEEP} == set(LEAVES)


@pytest.mark.parametrize("leaf", SHOWN)
def test_the_tests_of_an_effect_exist(leaf: str) -> None:
    named = SHOWN[leaf]
    for test in [named] if isinstance(named, str) else named:
        module, name = test.split("::")
        assert name in functions_of(module)


def test_what_is_refused_here_is_refused_there() -> None:
    assert set(NOT_AVAILABLE_YET) == REFUSED


@pytest.mark.parametrize("leaf", ASLEEP)
def test_an_option_that_sleeps_is_reported_as_ignored(leaf: str) -> None:
    pictures = Layer("test", {"images_data_url": "photos"}, explicit=True)

    assert ASLEEP[leaf] <= REFUSED
    assert leaf in resolve([pictures]).resolved.ignored_options


# Effects that no other module shows.


def test_lokr_factor_is_the_size_of_the_small_factor(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"lora_type": "lokr", "lokr_factor": 2, "max_train_steps": 1}
    train(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    tensors = load_file(tmp_path / "outputs" / "lora.safetensors")
    sizes = {tuple(tensor.shape[:2]) for name, tensor in tensors.items() if "lokr_w1" in name}
    # Every width of the tiny model but the latents' own is even, so that 2 divides it.
    assert sizes == {(2, 2)}


def test_half_the_largest_norm_halves_the_step(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    # With an epsilon far above the gradients, Adam's first step is lr * g / epsilon: like g.
    leaves = {"adam_epsilon": 1e3, "max_train_steps": 1, "adam_weight_decay": 0.0}
    moved = []
    norm = 0.0
    for share in (0.0, 0.5):
        folder = tmp_path / str(share)
        config = configuration(sd15_folder, photo_folder, max_grad_norm=share * norm, **leaves)
        events = train(config, folder)
        (norm,) = [event.grad_norm for event in events if isinstance(event, StepEvent)]
        tensors = load_file(folder / "outputs" / "pytorch_lora_weights.safetensors")
        name = next(name for name in tensors if name.endswith("conv1.lora_B.weight"))
        moved.append(float(tensors[name].norm()))
    assert moved[1] / moved[0] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("kohya_dora", "suffixes"), [("paper", [""]), ("comfyui", ["_comfyui"])])
def test_the_output_options_decide_names_and_number_formats(
    kohya_dora: str, suffixes: list[str], sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves: dict[str, Any] = {"use_dora": True, "max_train_steps": 1, "save_dtype": "fp16"}
    naming = {"output_name": "My result", "kohya_dora": kohya_dora}
    train(configuration(sd15_folder, photo_folder, **leaves, **naming), tmp_path)
    names = sorted(path.name for path in (tmp_path / "outputs").glob("*.safetensors"))
    ours = [f"My result{suffix}.safetensors" for suffix in suffixes]
    assert names == [*ours, "pytorch_lora_weights.safetensors"]
    for name in names:
        tensors = load_file(tmp_path / "outputs" / name)
        factors = [key for key in tensors if "lora_down" in key or "lora_A" in key]
        assert {tensors[key].dtype for key in factors} == {torch.float16}


def test_a_step_is_reported_with_the_norm_before_clipping(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    norms = []
    for largest in (0.0, 1e-6):
        config = configuration(sd15_folder, photo_folder, max_grad_norm=largest, max_train_steps=1)
        events = steps(config, tmp_path / str(largest))
        norms += [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert norms[1] == pytest.approx(norms[0])
    assert norms[0] > 1e-3
