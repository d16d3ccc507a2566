"""From layers to one configuration: precedence, conflicts, idle options, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import LEAVES, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.leaves import allowed
from trainer.resolve import Layer, resolve
from trainer.rules import IDLE, NOT_AVAILABLE_YET

PICTURES = {"images_data_url": "photos"}


def given(**values: object) -> Layer:
    return Layer("train.yaml", {**PICTURES, **values}, explicit=True)


def assumed(**values: object) -> Layer:
    """A layer that nobody set on purpose, such as a preset."""
    return Layer("preset", values, explicit=False)


def resolved(*layers: Layer) -> TrainingConfig:
    return resolve(layers, refuse=False)


def problems_of(*layers: Layer, refuse: bool = False) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        resolve(layers, refuse=refuse)
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
                "train_text_encoder_ti": True,
            },
            explicit=True,
        ),
        refuse=True,
    )

    assert {problem.field for problem in problems} == {
        "rnak",
        "rank",
        "learning_rate",
        "images_data_url",
        "min_timestep_trained",
        "train_text_encoder_ti",
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
        ({"use_lora": False, "learning_rate": 1e-5}, "learning_rate"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 100, "max_train_steps": 100},)
        + ("lr_warmup_steps",),
        ({"snr_gamma": 0.5}, "snr_gamma"),
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
        {"snr_gamma": 0},
        {"snr_gamma": None},
        {"noise_offset": 0.1},
    ],
)
def test_a_usual_value_gives_no_warning(options: dict[str, object]) -> None:
    assert not warned(resolved(given(**options)))


# -------------------------------------------------------------------------------- idle options

WAKING: dict[str, dict[str, object]] = {
    "rank": {},
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
    "prior_loss_weight": {"with_prior_preservation": True},
    "photo_class": {"with_prior_preservation": True},
    "class_image_mask_style": {"with_prior_preservation": True, "clip_seg_mask_prompt": "head"},
    "clip_seg_mask_temperature": {"clip_seg_mask_prompt": "head"},
    "clip_seg_mask_bias": {"clip_seg_mask_prompt": "head"},
    "lr_warmup_steps": {"lr_scheduler": "cosine"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "prodigy_beta3": {"optimizer": "prodigy"},
    "prodigy_decouple": {"optimizer": "prodigy"},
    "prodigy_use_bias_correction": {"optimizer": "prodigy"},
    "prodigy_safeguard_warmup": {"optimizer": "prodigy"},
    "max_train_steps": {},
    "caption_column": {"captions_file_url": "captions.jsonl"},
    "data_archive_format": {"debug_dataset": True},
    "num_workers": {"cache_latents": False},
    "upscale_vae_32bit": {},
    "revision": {},
    "variant": {},
    "single_file_config": {"model_url": "model.safetensors"},
}
LULLING: dict[str, dict[str, object]] = {
    **{
        leaf: {"use_lora": False}
        for leaf in ("rank", "alpha", "lora_type", "use_dora", "target_unet_modules")
    },
    "max_train_steps": {"num_train_epochs": 3},
    "upscale_vae_32bit": {"mixed_precision": "no"},
    "revision": {"model_url": "model.safetensors"},
    "variant": {"model_url": "model.safetensors"},
}


def test_every_idle_option_has_a_waking_case() -> None:
    assert set(WAKING) == {leaf for leaves, _, _ in IDLE for leaf in leaves}
    assert set(WAKING) <= set(LEAVES)


@pytest.mark.parametrize("leaf", WAKING)
def test_an_option_is_listed_as_ignored_exactly_where_it_is_idle(leaf: str) -> None:
    assert leaf in ignored(resolved(given(**LULLING.get(leaf, {}))))
    assert leaf not in ignored(resolved(given(**WAKING[leaf])))


def test_a_local_folder_has_no_revision(tmp_path: Path) -> None:
    config = resolved(given(model_url=str(tmp_path), revision="main"))

    assert "revision" in ignored(config)
    assert "variant" not in ignored(config)


# ----------------------------------------------------------------------------- not available yet

ASKING: dict[str, object] = {
    "train_text_encoder_ti": True,
    "train_text_encoder": True,
    "with_prior_preservation": True,
    "clip_seg_mask_prompt": "head",
    "random_rotation_start": -2,
    "random_rotation_end": 2,
    "face_aware_cropping": True,
    "debug_dataset": True,
    "debug_loss_masks": True,
}


@pytest.mark.parametrize("leaf", NOT_AVAILABLE_YET)
def test_what_cannot_act_yet_is_refused_with_the_value_that_switches_it_off(leaf: str) -> None:
    (problem,) = problems_of(given(**{leaf: ASKING[leaf]}), refuse=True)

    assert problem.field == leaf
    assert "not available yet" in problem.message
    assert problem.hint.startswith(f"set `{leaf}: ")


def test_the_value_named_by_a_refusal_is_accepted() -> None:
    off = {leaf: value for leaf, (value, _) in NOT_AVAILABLE_YET.items()}

    assert resolve([assumed(**ASKING), given(**off)]).resolved.explicit


def test_what_has_yielded_is_not_refused() -> None:
    config = resolve(
        [assumed(random_rotation_start=-2, random_rotation_end=2), given(cache_latents=True)]
    )

    assert yielded(config) == {"random_rotation_start", "random_rotation_end"}
