"""From layers to one configuration: precedence, conflicts, idle options, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import LEAVES, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.leaves import allowed
from trainer.resolve import Layer, resolve
from trainer.rules.idle import IDLE, IDLE_IN_SUBJECT
from trainer.sections.subjects import INHERITED

PICTURES = {"images_data_url": "photos"}
PRIOR = {"with_prior_preservation": True, "photo_class": "Man"}


def given(**values: object) -> Layer:
    return Layer("train.yaml", {**PICTURES, **values}, explicit=True)


def assumed(**values: object) -> Layer:
    """A layer that nobody set on purpose, such as a preset."""
    return Layer("preset", values, explicit=False)


def of_concepts(*concepts: dict[str, object], **values: object) -> Layer:
    """Concepts a, b … with pictures of their own."""
    listed = [
        {"images_data_url": folder, **options}
        for folder, options in zip("abcdef", concepts, strict=False)
    ]
    return Layer("train.yaml", {"concepts": listed, **values}, explicit=True)


def resolved(*layers: Layer) -> TrainingConfig:
    return resolve(layers)


def problems_of(*layers: Layer) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        resolve(layers)
    return list(caught.value.problems)


def yielded(config: TrainingConfig) -> set[str]:
    return {note.field for note in config.resolved.notes if note.kind == "yielded"}


def warned(config: TrainingConfig) -> set[str]:
    return {note.field for note in config.resolved.notes if note.kind == "warning"}


def ignored(config: TrainingConfig) -> set[str]:
    return set(config.resolved.ignored_options)


# ---------------------------------------------------------------------------------- precedence


def test_a_later_layer_wins_and_what_a_preset_says_is_not_explicit() -> None:
    config = resolved(assumed(rank=4, seed=1), given(rank=8), Layer("flags", {"rank": 16}, True))

    assert (config.adapter.rank, config.run.seed) == (16, 1)
    assert config.resolved.explicit == ("images_data_url", "rank")


def test_what_is_explicit_is_listed_in_the_order_of_the_declarations() -> None:
    one = resolved(given(seed=1, rank=8))
    other = resolved(Layer("a", {"rank": 8}, True), Layer("b", {"seed": 1, **PICTURES}, True))

    assert one == other
    assert one.resolved.explicit == ("images_data_url", "rank", "seed")


# ------------------------------------------------------------------------------------ bad input

BAD_VALUES = [
    ("images_data_url", ""),
    ("data_archive_format", "rar"),
    ("caption_column", ""),
    ("instance_prompt", ""),
    ("rank", 0),
    ("rank", True),
    ("rank", "32"),
    ("rank", 1.5),
    ("alpha", -1),
    ("lokr_factor", 0),
    ("num_new_tokens_per_abstraction", 0),
    ("token_abstraction", "TOK,TOK"),
    ("token_abstraction", "<s0>"),
    ("token_abstraction", ""),
    ("seed", -1),
    ("seed", 2**32),
    ("resolution_width", 770),
    ("resolution_height", 0),
    ("caption_dropout", 1.1),
    ("random_crop_offset_x", -1),
    ("random_rotation_start", 181),
    ("clip_seg_mask_temperature", 0),
    ("clip_seg_mask_bias", -0.1),
    ("class_image_mask_style", "inverse"),
    ("use_lora", "false"),
    ("use_dora", 1),
    ("lora_type", "loraa"),
    ("target_unet_modules", []),
    ("target_unet_modules", [1]),
    ("target_unet_modules", ["to_q", ""]),
    ("train_text_encoder_ti_frac", 0),
    ("train_text_encoder_frac", 1.5),
    ("prior_loss_weight", -1),
    ("photo_class", "Dog"),
    ("snr_gamma", -0.5),
    ("snr_gamma", float("inf")),
    ("noise_offset", -0.1),
    ("max_timestep_trained", 1001),
    ("min_timestep_trained", -1),
    ("optimizer", "sgd"),
    ("learning_rate", 0),
    ("learning_rate", float("nan")),
    ("learning_rate", "1e-4"),
    ("lr_scheduler", "piecewise_constant"),
    ("lr_warmup_steps", -1),
    ("lr_num_cycles", 0),
    ("lr_power", 0),
    ("adam_beta1", 1.0),
    ("adam_epsilon", 0),
    ("adam_weight_decay", -1e-4),
    ("prodigy_beta3", 1.0),
    ("max_grad_norm", -1),
    ("max_train_steps", 0),
    ("num_train_epochs", 0),
    ("batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("mixed_precision", False),
    ("output_name", "../up"),
    ("kohya_dora", "neither"),
    ("model_url", None),
    ("token_retraction", 1.1),
    ("ti_pooling", "mean"),
    ("segmenter", "brightness"),
    ("use_given_masks", "yes"),
    ("text_encoder_rank", 0),
    ("text_encoder_alpha", 0),
    ("class_prompt", ""),
    ("class_images_url", ""),
    ("num_class_images", 0),
    ("class_inference_steps", 0),
    ("class_guidance_scale", -1),
    ("extract_rank", 0),
    ("concepts", []),
    ("concepts", "photos"),
    ("concepts", {"images_data_url": "photos"}),
]


@pytest.mark.parametrize(("leaf", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_by_name_with_what_is_allowed(leaf: str, value: object) -> None:
    (problem,) = problems_of(given(**{leaf: value}))

    assert problem.field == leaf
    assert "allowed: " in problem.message
    assert "Input should" not in problem.message
    assert leaf == "images_data_url" or problem.message.startswith("got ")


def test_a_range_is_quoted_with_the_value_and_its_source() -> None:
    (problem,) = problems_of(given(rank=0))

    assert problem.message == f"got 0 (in train.yaml); allowed: {allowed('rank')}"


def test_every_problem_is_named_at_once() -> None:
    problems = problems_of(
        Layer(
            "train.yaml",
            {
                "rnak": 8,
                "rank": 0,
                "learning_rate": float("nan"),
                "min_timestep_trained": 500,
                "max_timestep_trained": 500,
                "with_prior_preservation": True,
            },
            explicit=True,
        )
    )

    assert {problem.field for problem in problems} == {
        "rnak",
        "rank",
        "learning_rate",
        "images_data_url",
        "min_timestep_trained",
        "photo_class",
    }
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("rnak", "rank"), ("learning-rate", "learning_rate"), ("snrgamma", "snr_gamma")],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    (problem,) = problems_of(given(**{wrong: 1}))

    assert (problem.field, problem.hint) == (wrong, f"did you mean `{right}`?")


def test_an_unknown_option_like_no_other_is_refused_without_a_guess() -> None:
    (problem,) = problems_of(given(zzzzzz=1))

    assert problem.hint == ""


def test_pictures_are_required() -> None:
    (problem,) = problems_of(Layer("train.yaml", {}, explicit=True))

    assert problem.field == "images_data_url"


def test_a_long_value_is_cut_in_the_message() -> None:
    (problem,) = problems_of(given(rank="x" * 10_000))

    assert len(problem.message) < 200


def test_new_tokens_must_fit_into_a_caption() -> None:
    """Three identifiers with 26 tokens each are 78; a CLIP caption holds 75."""
    (problem,) = problems_of(given(token_abstraction="A,B,C", num_new_tokens_per_abstraction=26))

    assert problem.field == "num_new_tokens_per_abstraction"


# ------------------------------------------------------------------------- options in conflict

CONFLICTS = [
    ({"train_text_encoder": True}, {"train_text_encoder_ti": True}),
    ({"lora_type": "lokr"}, {"use_dora": True}),
    ({"center_crop": True}, {"face_aware_cropping": True}),
    ({"face_restore": "gfpgan_1.4"}, {"face_detector": "haar"}),
    ({"random_rotation_start": 5}, {"random_rotation_end": -5}),
    ({"min_timestep_trained": 900}, {"max_timestep_trained": 800}),
    ({"cache_latents": True}, {"center_crop": False}),
    ({"cache_latents": True}, {"random_crop_offset_x": 8}),
    ({"cache_latents": True}, {"random_crop_offset_y": 8}),
    ({"cache_latents": True}, {"random_rotation_end": 3}),
]
CONFLICTS += [(second, first) for first, second in CONFLICTS]


@pytest.mark.parametrize(("one", "other"), CONFLICTS)
def test_two_explicit_options_in_conflict_are_an_error(
    one: dict[str, object], other: dict[str, object]
) -> None:
    (problem,) = problems_of(given(**one), Layer("flags", other, explicit=True))

    assert problem.field in {*one, *other}
    assert next(iter({*one, *other} - {problem.field})) in problem.message
    assert problem.hint


@pytest.mark.parametrize(("explicit", "default"), CONFLICTS)
def test_a_default_yields_to_an_explicit_option_and_that_is_noted_once(
    explicit: dict[str, object], default: dict[str, object]
) -> None:
    (leaf, value), (other, before) = *explicit.items(), *default.items()

    config = resolved(assumed(**default), given(**explicit))

    assert config.leaf(leaf) == value
    assert config.leaf(other) != before
    assert [note.field for note in config.resolved.notes if note.kind == "yielded"] == [other]


def test_between_two_assumptions_the_later_layer_wins() -> None:
    config = resolved(assumed(use_dora=True), assumed(lora_type="loha"), given())

    assert (config.adapter.lora_type, config.adapter.use_dora) == ("loha", False)


def test_dora_does_not_clash_with_an_adapter_type_that_is_not_trained() -> None:
    config = resolved(given(use_lora=False, use_dora=True, lora_type="lokr"))

    assert {"use_dora", "lora_type"} <= ignored(config)


def test_a_denoiser_that_would_never_learn_is_refused() -> None:
    (problem,) = problems_of(
        given(
            train_text_encoder_ti=True,
            disable_unet_during_ti_training=True,
            train_text_encoder_ti_frac=1.0,
        )
    )

    assert problem.field == "disable_unet_during_ti_training"


def test_an_explicit_cache_stops_all_assumed_movement() -> None:
    config = resolved(
        assumed(center_crop=False, random_rotation_start=-2, random_rotation_end=2),
        given(cache_latents=True),
    )

    assert config.data.cache_latents
    assert config.data.center_crop
    assert (config.data.random_rotation_start, config.data.random_rotation_end) == (0, 0)


def test_explicit_movement_beside_an_assumed_one_only_ends_the_cache() -> None:
    config = resolved(assumed(center_crop=False), given(random_crop_offset_x=4))

    assert not config.data.cache_latents
    assert (config.data.center_crop, config.data.random_crop_offset_x) == (False, 4)


def test_mirroring_goes_with_the_cache() -> None:
    config = resolved(given(cache_latents=True, random_flip=True))

    assert config.data.cache_latents
    assert config.data.random_flip


def test_a_fixed_rotation_goes_with_the_cache() -> None:
    config = resolved(given(cache_latents=True, random_rotation_start=90, random_rotation_end=90))

    assert config.data.cache_latents


@pytest.mark.parametrize("side", ["resolution_width", "resolution_height"])
def test_one_side_alone_means_a_square(side: str) -> None:
    config = resolved(given(**{side: 512}))

    assert (config.data.resolution_width, config.data.resolution_height) == (512, 512)
    assert yielded(config) == {"resolution_width", "resolution_height"} - {side}


def test_two_sides_are_taken_as_they_are() -> None:
    config = resolved(given(resolution_width=512, resolution_height=768))

    assert (config.data.resolution_width, config.data.resolution_height) == (512, 768)


def test_epochs_decide_and_the_steps_are_noted_as_ignored() -> None:
    assert "max_train_steps" in ignored(resolved(given(num_train_epochs=3, max_train_steps=10)))
    assert "max_train_steps" not in ignored(resolved(given(max_train_steps=10)))


# ------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 1e-4), ({"use_lora": False}, 1e-6), ({"optimizer": "prodigy"}, 1.0)],
)
def test_an_open_learning_rate_becomes_the_usual_one(
    options: dict[str, object], rate: float
) -> None:
    config = resolved(given(**options))

    assert (config.optim.learning_rate, config.optim.text_encoder_lr) == (rate, rate)


def test_the_text_encoders_follow_the_learning_rate_unless_told_otherwise() -> None:
    assert resolved(given(learning_rate=3e-5)).optim.text_encoder_lr == 3e-5
    assert resolved(given(learning_rate=3e-5, text_encoder_lr=1e-6)).optim.text_encoder_lr == 1e-6


def test_an_assumed_learning_rate_yields_to_prodigy() -> None:
    config = resolved(assumed(learning_rate=8e-5, text_encoder_lr=8e-5), given(optimizer="prodigy"))

    assert (config.optim.learning_rate, config.optim.text_encoder_lr) == (1.0, 1.0)
    assert yielded(config) == {"learning_rate", "text_encoder_lr"}


def test_a_preset_may_bring_prodigy_together_with_its_learning_rate() -> None:
    config = resolved(assumed(optimizer="prodigy", learning_rate=0.5), given())

    assert (config.optim.learning_rate, config.optim.text_encoder_lr) == (0.5, 0.5)


def test_prodigy_takes_one_rate_for_everything() -> None:
    (problem,) = problems_of(
        given(
            optimizer="prodigy",
            train_text_encoder_ti=True,
            learning_rate=1.0,
            text_encoder_lr=0.5,
        )
    )

    assert problem.field == "text_encoder_lr"


def test_prodigy_takes_the_one_rate_that_is_explicit() -> None:
    config = resolved(given(optimizer="prodigy", train_text_encoder_ti=True, text_encoder_lr=0.5))

    assert config.optim.learning_rate == 0.5


def test_a_text_encoder_rate_that_nothing_uses_is_no_conflict_for_prodigy() -> None:
    config = resolved(given(optimizer="prodigy", text_encoder_lr=8e-5))

    assert config.optim.learning_rate == 1.0
    assert "text_encoder_lr" in ignored(config)


# ------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("options", "leaf"),
    [
        ({"optimizer": "prodigy", "learning_rate": 8e-5}, "learning_rate"),
        ({"use_lora": False, "learning_rate": 2e-5}, "learning_rate"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 100, "max_train_steps": 100},)
        + ("lr_warmup_steps",),
        ({"snr_gamma": 0.5}, "snr_gamma"),
        ({"use_lora": False, "train_text_encoder": True, "text_encoder_lr": 1e-4},)
        + ("text_encoder_lr",),
        ({"train_text_encoder_ti": True, "text_encoder_lr": 1e-6}, "text_encoder_lr"),
        ({"train_text_encoder_ti": True, "instance_prompt": "TOKYO"}, "instance_prompt"),
        ({**PRIOR, "prior_loss_weight": 0}, "prior_loss_weight"),
    ],
)
def test_an_odd_value_is_kept_with_one_warning(options: dict[str, object], leaf: str) -> None:
    config = resolved(given(**options))

    assert warned(config) == {leaf}
    assert config.leaf(leaf) == options[leaf]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "prodigy", "learning_rate": 0.5},
        {"learning_rate": 1e-3},
        {"use_lora": False},
        {"lr_warmup_steps": 5000},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 5000, "num_train_epochs": 100},
        {"snr_gamma": 1.0},
        {**PRIOR, "prior_loss_weight": 0.1},
        {"prior_loss_weight": 0},
        {"snr_gamma": 0},
        {"snr_gamma": None},
        {"noise_offset": 0.1},
        {"use_lora": False, "train_text_encoder": True, "text_encoder_lr": 1e-6},
        {"train_text_encoder_ti": True},
        {"train_text_encoder_ti": True, "token_abstraction": "A,B", "instance_prompt": "a B"},
        {"train_text_encoder_ti": True, "token_abstraction": "sks"},
        {"train_text_encoder_ti": True, "instance_prompt": "a cat", "captions_file_url": "c.jsonl"},
        {"instance_prompt": "a cat"},
    ],
)
def test_a_usual_value_gives_no_warning(options: dict[str, object]) -> None:
    assert not warned(resolved(given(**options)))


# -------------------------------------------------------------------------------- idle options

WAKING: dict[str, dict[str, object]] = {
    "rank": {},
    "adapter_layers": {},
    "channels_last": {},
    "checkpointing_share": {},
    "alpha": {},
    "lora_type": {},
    "use_dora": {},
    "target_unet_modules": {},
    "lokr_factor": {"lora_type": "lokr"},
    "kohya_dora": {"use_dora": True},
    "train_text_encoder_frac": {"train_text_encoder": True},
    "target_text_encoder_modules": {"train_text_encoder": True},
    "num_new_tokens_per_abstraction": {"train_text_encoder_ti": True},
    "train_text_encoder_ti_frac": {"train_text_encoder_ti": True},
    "disable_unet_during_ti_training": {"train_text_encoder_ti": True},
    "token_abstraction": {"skip_caption_generation": False},
    "text_encoder_lr": {"train_text_encoder": True},
    "adam_weight_decay_text_encoder": {"train_text_encoder_ti": True},
    "token_retraction": {"train_text_encoder_ti": True},
    "ti_pooling": {"train_text_encoder_ti": True},
    "text_encoder_rank": {"train_text_encoder": True},
    "text_encoder_alpha": {"train_text_encoder": True},
    "extract_rank": {"use_lora": False},
    "hub_model_id": {"push_to_hub": True},
    "hub_private": {"push_to_hub": True},
    "sample_inference_steps": {"validation_prompts": ["a TOK"]},
    "sample_guidance_scale": {"sample_steps": 5},
    "validation_steps": {"validation_images": 1},
    "weights_dtype": {"use_lora": False},
    "fused_backward": {"use_lora": False},
    "adam_beta1": {},
    "adam_beta2": {},
    "adam_epsilon": {},
    "logit_mean": {},
    "logit_std": {},
    "mode_scale": {"timestep_density": "mode"},
    "offload_models": PRIOR,
    "instance_prompt": {},
    "with_prior_preservation": {},
    "prior_loss_weight": PRIOR,
    "photo_class": PRIOR,
    "class_prompt": PRIOR,
    "class_images_url": PRIOR,
    "num_class_images": PRIOR,
    "class_inference_steps": PRIOR,
    "class_guidance_scale": PRIOR,
    "class_image_mask_style": {**PRIOR, "clip_seg_mask_prompt": "head"},
    "segmenter": {"clip_seg_mask_prompt": "head"},
    "clip_seg_mask_temperature": {"clip_seg_mask_prompt": "head"},
    "clip_seg_mask_bias": {"clip_seg_mask_prompt": "head"},
    "clipseg_url": {"clip_seg_mask_prompt": "head"},
    "face_detector": {"face_crop_region": 1.4},
    "face_detector_path": {"face_restore": "gfpgan_1.4"},
    "face_restore_upscale": {"face_restore": "gfpgan_1.4"},
    "face_restorer_path": {"face_restore": "gfpgan_1.4"},
    "preparation_order": {"face_crop_region": 1.4},
    "captioner": {"skip_caption_generation": False},
    "caption_mode": {"skip_caption_generation": False},
    "captioner_load_in_4bit": {"skip_caption_generation": False},
    "lr_warmup_steps": {"lr_scheduler": "cosine"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "prodigy_beta3": {"optimizer": "prodigy"},
    "prodigy_decouple": {"optimizer": "prodigy"},
    "prodigy_use_bias_correction": {"optimizer": "prodigy"},
    "prodigy_safeguard_warmup": {"optimizer": "prodigy"},
    "max_train_steps": {},
    "data_archive_format": {"debug_dataset": True},
    "num_workers": {"cache_latents": False},
    "upscale_vae_32bit": {},
    "revision": {},
    "variant": {},
    "single_file_config": {"model_url": "model.safetensors"},
}
LULLING: dict[str, dict[str, object]] = {
    "checkpointing_share": {"gradient_checkpointing": False},
    **{
        leaf: {"use_lora": False}
        for leaf in (
            *("rank", "alpha", "lora_type", "use_dora", "target_unet_modules"),
            *("adapter_layers", "channels_last"),
        )
    },
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), {"optimizer": "adafactor"}),
    **dict.fromkeys(("logit_mean", "logit_std"), {"timestep_density": "uniform"}),
    "max_train_steps": {"num_train_epochs": 3},
    "upscale_vae_32bit": {"mixed_precision": "no"},
    "revision": {"model_url": "model.safetensors"},
    "variant": {"model_url": "model.safetensors"},
    **{
        leaf: {
            "images_data_url": None,
            "concepts": [{"images_data_url": "a", leaf: value}],
        }
        for leaf, value in {"instance_prompt": "a TOK", "with_prior_preservation": False}.items()
    },
}
MORE_LULLING: list[tuple[str, dict[str, object], str]] = [
    ("target_text_encoder_modules", {"train_text_encoder": True, "use_lora": False}, "all weights"),
    ("text_encoder_rank", {"train_text_encoder": True, "use_lora": False}, "all weights"),
    ("text_encoder_alpha", {"train_text_encoder": True, "use_lora": False}, "all weights"),
    ("num_class_images", {**PRIOR, "class_images_url": "men"}, "class_images_url"),
    ("class_inference_steps", {**PRIOR, "class_images_url": "men"}, "class_images_url"),
    ("class_guidance_scale", {**PRIOR, "class_images_url": "men"}, "class_images_url"),
    ("photo_class", {**PRIOR, "class_prompt": "a dog"}, "class_prompt"),
    ("class_image_mask_style", {"clip_seg_mask_prompt": "head"}, "no class pictures"),
    ("class_image_mask_style", PRIOR, "no class pictures with masks"),
    (
        "class_image_mask_style",
        {**PRIOR, "class_images_url": "men", "use_given_masks": False},
        "no class pictures with masks",
    ),
]


def test_every_idle_option_has_a_waking_case() -> None:
    tables = (*IDLE, *IDLE_IN_SUBJECT)
    assert set(WAKING) == {leaf for leaves, _, _ in tables for leaf in leaves} | set(INHERITED)
    assert set(WAKING) <= set(LEAVES)


@pytest.mark.parametrize("leaf", WAKING)
def test_an_option_is_listed_as_ignored_exactly_where_it_is_idle(leaf: str) -> None:
    assert leaf in ignored(resolved(given(**LULLING.get(leaf, {}))))
    assert leaf not in ignored(resolved(given(**WAKING[leaf])))


@pytest.mark.parametrize(("leaf", "options", "reason"), MORE_LULLING)
def test_an_idle_option_is_ignored_for_the_reason_that_holds(
    leaf: str, options: dict[str, object], reason: str
) -> None:
    assert reason in resolved(given(**options)).resolved.ignored_options[leaf]


@pytest.mark.parametrize(
    ("leaf", "options"),
    [
        ("text_encoder_lr", {"train_text_encoder": True, "use_lora": False}),
        ("train_text_encoder_frac", {"train_text_encoder": True, "use_lora": False}),
        ("class_image_mask_style", {**PRIOR, "class_images_url": "men"}),
        ("class_prompt", {**PRIOR, "class_images_url": "men"}),
        ("token_abstraction", {"token_abstraction": "sks"}),
    ],
)
def test_an_option_that_acts_is_not_ignored(leaf: str, options: dict[str, object]) -> None:
    assert leaf not in ignored(resolved(given(**options)))


def test_an_option_has_one_reason_to_be_ignored() -> None:
    notes = [
        note.field
        for note in resolved(of_concepts({"prior_loss_weight": 2.0})).resolved.notes
        if note.kind == "ignored"
    ]

    assert "prior_loss_weight" in notes
    assert len(notes) == len(set(notes))


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    config = resolved(given(model_url=str(tmp_path), revision="main"))

    assert "revision" in ignored(config)
    assert "variant" not in ignored(config)


@pytest.mark.parametrize(
    "options",
    [
        {"train_text_encoder_ti": True},
        {"train_text_encoder": True},
        {"train_text_encoder": True, "use_lora": False},
        PRIOR,
        {"random_rotation_start": -2, "random_rotation_end": 2, "cache_latents": False},
        {"debug_dataset": True, "debug_loss_masks": True},
    ],
)
def test_every_other_method_can_be_asked_for(options: dict[str, object]) -> None:
    assert resolve([given(**options)])


def test_what_has_yielded_is_not_refused() -> None:
    config = resolve(
        [assumed(random_rotation_start=-2, random_rotation_end=2), given(cache_latents=True)]
    )

    assert yielded(config) == {"random_rotation_start", "random_rotation_end"}


# ------------------------------------------------------------------------------- several concepts


def test_pictures_and_concepts_exclude_each_other() -> None:
    (problem,) = problems_of(given(concepts=[{"images_data_url": "a"}]))

    assert problem.field == "concepts"
    assert problem.message.startswith('got [{"images_data_url": "a"}] with `images_data_url`')
    assert problem.hint == "set `concepts: null` or `images_data_url: null`"


@pytest.mark.parametrize(
    ("explicit", "default"),
    [
        ({"images_data_url": "photos"}, {"concepts": [{"images_data_url": "a"}]}),
        ({"concepts": [{"images_data_url": "a"}]}, {"images_data_url": "photos"}),
    ],
)
def test_the_weaker_of_pictures_and_concepts_yields(
    explicit: dict[str, object], default: dict[str, object]
) -> None:
    config = resolved(assumed(**default), Layer("train.yaml", explicit, explicit=True))

    assert config.leaf(next(iter(explicit))) is not None
    assert config.leaf(next(iter(default))) is None
    assert yielded(config) == set(default)


@pytest.mark.parametrize(
    "leaves",
    [
        {"max_train_steps": 1},
        {"max_train_steps": 10, "train_text_encoder_ti_frac": 0.96},
    ],
)
def test_steps_that_leave_none_for_a_waiting_denoiser_are_refused_at_once(
    leaves: dict[str, object],
) -> None:
    waiting = {"train_text_encoder_ti": True, "disable_unet_during_ti_training": True}
    (problem,) = problems_of(given(**waiting, **leaves))
    config = resolved(
        assumed(disable_unet_during_ti_training=True), given(train_text_encoder_ti=True, **leaves)
    )

    assert problem.field == "disable_unet_during_ti_training"
    assert "raise `max_train_steps`" in problem.hint
    assert yielded(config) == {"disable_unet_during_ti_training"}
    # How many steps epochs have is known with the pictures only, and one step more is enough.
    assert resolved(given(**waiting, **leaves, num_train_epochs=1))
    assert resolved(given(**waiting, max_train_steps=2))


def test_every_fault_inside_concepts_is_named_with_its_place() -> None:
    problems = {
        problem.field: problem
        for problem in problems_of(
            Layer(
                "train.yaml",
                {
                    "concepts": [
                        {"images_data_url": "a", "photo_clas": "Man", "repeats": 0},
                        {"photo_class": "Dog"},
                        3,
                    ],
                    "with_prior_preservation": True,
                    "rank": 0,
                },
                explicit=True,
            )
        )
    }

    assert set(problems) == {
        "concepts[0].photo_clas",
        "concepts[0].repeats",
        "concepts[1].images_data_url",
        "concepts[1].photo_class",
        "concepts[2]",
        "rank",
    }
    assert problems["concepts[0].photo_clas"].hint == "did you mean `photo_class`?"
    assert problems["concepts[0].repeats"].message == (
        "got 0 (in train.yaml); allowed: a whole number, at least 1"
    )
    assert "is missing" in problems["concepts[1].images_data_url"].message
    assert problems["concepts[1].photo_class"].message == (
        'got "Dog" (in train.yaml); allowed: one of Man, Woman, Person, Boy, Girl, Baby, or null'
    )
    assert "each" not in problems["concepts[2]"].message
    assert "got 3" in problems["concepts[2]"].message


def test_concepts_without_tokens_are_called_by_their_places() -> None:
    config = resolved(of_concepts({}, {}, {}))

    assert config.token.token_abstraction == ("TOK", "TOK1", "TOK2")
    assert [subject.token for subject in config.subjects()] == ["TOK", "TOK1", "TOK2"]
    assert [subject.instance_prompt for subject in config.subjects()] == [
        "A photograph of a TOK",
        "A photograph of a TOK1",
        "A photograph of a TOK2",
    ]
    assert yielded(config) == {"token_abstraction"}


def test_tokens_of_concepts_become_the_identifiers_and_may_be_shared() -> None:
    config = resolved(of_concepts({"token": "ohwx"}, {"token": "ohwx"}, {}, {"token": "TOK2"}))

    assert config.token.token_abstraction == ("ohwx", "TOK3", "TOK2")
    assert [subject.token for subject in config.subjects()] == ["ohwx", "ohwx", "TOK3", "TOK2"]
    assert [subject.instance_prompt for subject in config.subjects()] == [
        f"A photograph of a {token}" for token in ("ohwx", "ohwx", "TOK3", "TOK2")
    ]
    assert yielded(config) == {"token_abstraction", "instance_prompt"}


def test_explicit_identifiers_are_handed_out_by_place() -> None:
    config = resolved(
        of_concepts({}, {"token": "A"}, {}, token_abstraction="A,B,C", instance_prompt="an A, AB")
    )

    assert [subject.token for subject in config.subjects()] == ["A", "A", "C"]
    assert config.subjects()[2].instance_prompt == "an C, AB"
    assert not yielded(config)


def test_a_token_that_is_no_explicit_identifier_is_refused_and_so_is_a_place_without_one() -> None:
    problems = problems_of(of_concepts({"token": "X"}, {}, {}, token_abstraction="A,B"))

    assert [problem.field for problem in problems] == ["concepts[0].token", "concepts[2].token"]
    assert all("allowed: one of A, B" in problem.message for problem in problems)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("leaves", [{}, {"train_text_encoder_ti": True}])
def test_a_prompt_that_nobody_chose_names_the_chosen_identifier(
    listed: bool, leaves: dict[str, object]
) -> None:
    leaves = {"token_abstraction": "sks,ohwx", **leaves}
    config = resolved(of_concepts({}, {}, **leaves) if listed else given(**leaves))
    alone = resolved(of_concepts({"token": "sks"}, {"token": "ohwx"}))

    assert config.data.instance_prompt == "A photograph of a sks" == alone.data.instance_prompt
    prompts = [subject.instance_prompt for subject in config.subjects()]
    assert prompts == ["A photograph of a sks", "A photograph of a ohwx"][: len(prompts)]
    (note,) = [note for note in config.resolved.notes if note.kind == "yielded"]
    assert (note.field, warned(config)) == ("instance_prompt", set())
    assert note.message == (
        '"A photograph of a TOK" gave way to "A photograph of a sks": '
        "`TOK` stands for the identifier, which is `sks`"
    )


@pytest.mark.parametrize(
    "leaves",
    [
        {"token_abstraction": "A,TOK"},
        {"token_abstraction": "sks", "instance_prompt": "a photo of a TOK"},
    ],
)
def test_a_prompt_that_names_an_identifier_or_was_chosen_stays(leaves: dict[str, object]) -> None:
    assert not yielded(resolved(given(**leaves)))


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (given(**PRIOR, class_prompt="a TOK man"), "class_prompt"),
        # The words made of the class are meant too.
        (given(**PRIOR, token_abstraction="man"), "class_prompt"),
        (of_concepts({}, {}, **PRIOR, class_prompt="not TOK1"), "class_prompt"),
        (of_concepts({}, {**PRIOR, "class_prompt": "a TOK"}), "concepts[1].class_prompt"),
    ],
)
def test_new_tokens_must_not_be_named_by_pictures_of_the_class(layer: Layer, field: str) -> None:
    (problem,) = problems_of(layer, Layer("flags", {"train_text_encoder_ti": True}, explicit=True))

    assert problem.field == field
    identifier = "man" if "of a man" in problem.message else "TOK"
    assert f"names the identifier `{identifier}" in problem.message
    assert f"`{field}`" in problem.hint
    assert resolve([layer])


def test_words_of_a_class_that_are_not_used_may_name_an_identifier() -> None:
    assert resolved(given(class_prompt="a TOK", train_text_encoder_ti=True))


@pytest.mark.parametrize("token", ["", "  ", "a,b"])
def test_a_token_is_a_word_or_several(token: str) -> None:
    (problem,) = problems_of(of_concepts({"token": token}))

    assert problem.field == "concepts[0].token"


def test_white_space_around_a_token_is_left_out() -> None:
    config = resolved(of_concepts({"token": " ohwx "}, {"token": "ohwx"}))

    assert config.token.token_abstraction == ("ohwx",)


def test_a_captions_file_beside_concepts_is_sent_into_one_of_them() -> None:
    (problem,) = problems_of(of_concepts({}, captions_file_url="captions.jsonl"))
    config = resolved(assumed(captions_file_url="captions.jsonl"), of_concepts({}))

    assert problem.field == "captions_file_url"
    assert "concepts[0].captions_file_url" in problem.hint
    assert "captions_file_url" in yielded(config)
    assert config.data.captions_file_url is None


def test_the_caption_key_acts_where_a_concept_has_a_captions_file() -> None:
    config = resolved(of_concepts({}, {"captions_file_url": "b.jsonl"}))

    assert "caption_column" not in ignored(config)


def test_a_concept_takes_from_the_run_what_it_leaves_open() -> None:
    run = {**PRIOR, "class_images_url": "men", "prior_loss_weight": 0.5, "num_class_images": 7}
    config = resolved(
        of_concepts({}, {"photo_class": "woman", "num_class_images": 3, "repeats": 2}, **run)
    )

    man, woman = config.subjects()
    assert (man.photo_class, man.class_prompt) == ("Man", "a photo of a man")
    assert (man.class_images_url, man.num_class_images, man.repeats) == ("men", 7, 1)
    assert (woman.photo_class, woman.class_prompt) == ("Woman", "a photo of a woman")
    # The run's pictures show men, so they are none of another class.
    assert (woman.class_images_url, woman.num_class_images, woman.repeats) == (None, 3, 2)
    assert (woman.prior_loss_weight, woman.with_prior_preservation) == (0.5, True)


def test_pictures_without_concepts_are_one_subject() -> None:
    (subject,) = resolved(given(**PRIOR, captions_file_url="c.jsonl")).subjects()

    assert (subject.images_data_url, subject.captions_file_url) == ("photos", "c.jsonl")
    assert (subject.token, subject.class_prompt) == ("TOK", "a photo of a man")


@pytest.mark.parametrize(
    ("layer", "fields"),
    [
        (given(with_prior_preservation=True), ["photo_class"]),
        (given(with_prior_preservation=True, class_images_url="dogs"), ["photo_class"]),
        (of_concepts({}, {}, with_prior_preservation=True), ["photo_class"]),
        (
            of_concepts({"photo_class": "Man"}, {}, with_prior_preservation=True),
            ["concepts[1].photo_class"],
        ),
        (of_concepts({}, {"with_prior_preservation": True}), ["concepts[1].photo_class"]),
    ],
)
def test_prior_preservation_without_a_class_is_one_problem(layer: Layer, fields: list[str]) -> None:
    problems = problems_of(layer)

    assert [problem.field for problem in problems] == fields
    assert "allowed: one of Man, Woman, Person, Boy, Girl, Baby" in problems[0].message
    assert "class_prompt" in problems[0].hint


def test_a_wrong_class_is_told_once() -> None:
    (problem,) = problems_of(given(with_prior_preservation=True, photo_class="Dog"))

    assert problem.field == "photo_class"


@pytest.mark.parametrize(
    "layer",
    [
        given(with_prior_preservation=True, class_prompt="a photo of a dog"),
        given(with_prior_preservation=True, class_prompt="a dog", class_images_url="dogs"),
        of_concepts({"class_prompt": "a dog", "with_prior_preservation": True}, {}),
    ],
)
def test_words_for_the_class_are_enough(layer: Layer) -> None:
    assert resolved(layer)


def test_a_concept_may_switch_prior_preservation_on_by_itself() -> None:
    config = resolved(of_concepts({}, {"with_prior_preservation": True}, photo_class="Man"))

    assert [subject.with_prior_preservation for subject in config.subjects()] == [False, True]
    assert not {"photo_class", "prior_loss_weight", "num_class_images"} & ignored(config)
    assert "with_prior_preservation" not in ignored(config)


def test_what_each_concept_has_of_its_own_is_ignored_for_the_run() -> None:
    own = {"photo_class": "Woman", "num_class_images": 3, "instance_prompt": "TOK"}
    config = resolved(of_concepts(own, with_prior_preservation=True, class_prompt="a man"))

    assert {"photo_class", "num_class_images", "instance_prompt", "class_prompt"} <= ignored(config)
    assert not {"prior_loss_weight", "class_inference_steps"} & ignored(config)


def test_a_prompt_of_a_concept_without_its_token_is_warned_of() -> None:
    config = resolved(
        of_concepts({}, {"instance_prompt": "a TOK"}, train_text_encoder_ti=True),
    )

    (note,) = [note for note in config.resolved.notes if note.kind == "warning"]
    assert note.field == "concepts"
    assert "`concepts[1].instance_prompt`" in note.message


def test_idle_options_of_a_concept_are_named_with_their_place() -> None:
    own = {"prior_loss_weight": 2.0, "class_images_url": "men", "num_class_images": 3}
    config = resolved(
        of_concepts(
            {**own, "photo_class": "Man"},
            {**own, "class_prompt": "a man", "with_prior_preservation": False},
            {"photo_class": "Man", "class_prompt": "a man"},
            {},
            with_prior_preservation=True,
            photo_class="Woman",
        )
    )

    off = "with_prior_preservation is false"
    assert {
        name: reason
        for name, reason in config.resolved.ignored_options.items()
        if name.startswith("concepts")
    } == {
        "concepts[0].num_class_images": "class_images_url gives the class pictures",
        **{f"concepts[1].{leaf}": off for leaf in (*own, "class_prompt")},
        "concepts[2].photo_class": "class_prompt has the words for the class",
    }
    # The last concept uses the run's.
    assert not {"photo_class", "num_class_images", "prior_loss_weight"} & ignored(config)


def test_an_option_of_the_run_is_ignored_where_no_concept_that_takes_it_uses_it() -> None:
    config = resolved(
        of_concepts(
            {"class_images_url": "men"},
            {"num_class_images": 3, "photo_class": "Woman", "prior_loss_weight": 1.0},
            {"with_prior_preservation": False},
            **PRIOR,
            class_prompt="a man",
        )
    )

    reasons = config.resolved.ignored_options
    assert reasons["num_class_images"] == (
        "no concept uses it: class_images_url gives the class pictures; "
        "with_prior_preservation is false"
    )
    assert reasons["photo_class"] == (
        "no concept uses it: class_prompt has the words for the class; "
        "with_prior_preservation is false"
    )
    assert not {"class_prompt", "prior_loss_weight", "class_inference_steps"} & set(reasons)


def test_the_reason_speaks_of_concepts_where_each_has_its_own() -> None:
    config = resolved(
        of_concepts({"photo_class": "Woman"}, **PRIOR, class_images_url="men", class_prompt="a man")
    )

    reasons = config.resolved.ignored_options
    assert reasons["photo_class"] == "no concept uses it: each has its own"
    for leaf in ("class_images_url", "class_prompt"):
        assert reasons[leaf] == "no concept uses it: each has its own, or is of another class"


def test_a_weight_of_nothing_is_warned_of_where_it_is_given() -> None:
    one = of_concepts({"prior_loss_weight": 0}, {}, **PRIOR)
    both = of_concepts({"prior_loss_weight": 0}, {}, **PRIOR, prior_loss_weight=0.0)

    assert warned(resolved(one)) == {"concepts[0].prior_loss_weight"}
    assert warned(resolved(both)) == {"concepts[0].prior_loss_weight", "prior_loss_weight"}


@pytest.mark.parametrize("trigger", ["man", "Person", "dogs", "a photo of a woman", "the style"])
def test_everyday_words_are_no_good_identifiers(trigger: str) -> None:
    config = resolved(given(token_abstraction=[trigger], instance_prompt=trigger))

    (message,) = [n.message for n in config.resolved.notes if "ordinary word" in n.message]
    assert message.startswith(f"`{trigger}`")


@pytest.mark.parametrize("trigger", ["TOK", "TOK1", "SIDAI", "photo of SIDAI", "ohwx man", "!"])
def test_a_made_up_word_is_a_good_identifier_also_among_everyday_words(trigger: str) -> None:
    config = resolved(given(token_abstraction=[trigger], instance_prompt=trigger))

    assert not [n for n in config.resolved.notes if "ordinary word" in n.message]


def test_a_new_token_may_have_the_name_of_an_everyday_word() -> None:
    options = {"token_abstraction": ["dog"], "instance_prompt": "a dog"}
    config = resolved(given(**options, train_text_encoder_ti=True))

    assert not [n for n in config.resolved.notes if "ordinary word" in n.message]
